"""Expert parallelism beside DeepSpeed-MoE's: one MoE layer, forward and backward, same shapes, ranks and inputs.

    pip install deepspeed==0.19.8
    DS_ACCELERATOR=cpu python -m benchmarks.cluster.run --nodes 4 --inter-mbit 200 --only-first -- \
        python benchmarks/deepspeed_ep.py

Both are dropless top-2 over the same SwiGLU experts, one a rank's share. DeepSpeed pads every expert to the busiest
one's rows when it may not drop tokens; so the comparison is made for an even and for a skewed gate. Set a private
TORCH_EXTENSIONS_DIR: DeepSpeed compiles an extension on first use.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from moe.experts import SwiGLU
from moe.layer import MoELayer
from parallel.config import ParallelConfig
from parallel.engine import ExpertEngine
from parallel.topology import Topology, connect


def ours(args: argparse.Namespace, topology: Topology, skew: float) -> tuple[Callable[[Tensor], None], nn.Module]:
    layer = MoELayer(args.dim, args.hidden, args.experts, {"name": "topk", "k": 2})
    _skew(layer.gate.get_parameter("weight"), skew)
    engine = ExpertEngine(layer, topology, ParallelConfig(mode="ep"))

    def run(x: Tensor) -> None:
        engine.begin_step()
        engine.forward_begins()
        engine.backward(layer(x).y.square().mean())
        engine.finish()

    return run, layer


def deepspeeds(args: argparse.Namespace, topology: Topology, skew: float) -> tuple[Callable[[Tensor], None], nn.Module]:
    import deepspeed
    from deepspeed.moe.layer import MoE

    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
    expert = SwiGLU(args.dim, args.hidden)
    layer = MoE(
        hidden_size=args.dim,
        expert=expert,
        num_experts=args.experts,
        ep_size=topology.world_size,
        k=2,
        drop_tokens=False,
        use_rts=False,
    )
    layer.set_deepspeed_parallelism()
    _skew(layer.deepspeed_moe.gate.wg.weight, skew)

    def run(x: Tensor) -> None:
        layer.zero_grad(set_to_none=False)
        y, _, _ = layer(x)
        y.square().mean().backward()

    return run, layer


@torch.no_grad()
def _skew(weight_ED: Tensor, skew: float) -> None:
    torch.manual_seed(0)
    weight_ED.normal_(0, 0.02)
    weight_ED[: max(1, weight_ED.shape[0] // 8)] += skew  # inputs have a positive mean: these experts become popular


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=2048, help="of each rank")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    results = []
    with connect(600) as topology:
        for name, skew in (("even gate", 0.0), ("skewed gate", 0.05)):
            torch.manual_seed(topology.rank)
            x = torch.randn(1, args.tokens, args.dim) + 0.3
            contestants = {"ours": ours(args, topology, skew), "deepspeed": deepspeeds(args, topology, skew)}
            seconds: dict[str, list[float]] = {key: [] for key in contestants}
            for index in range(args.rounds + 1):
                for key, (run, _) in contestants.items():
                    topology.barrier()
                    begin = time.perf_counter()
                    run(x.clone().requires_grad_())
                    taken = max(topology.gather_objects(time.perf_counter() - begin))
                    if index:
                        seconds[key].append(taken)
            ratios = [theirs / own for own, theirs in zip(seconds["ours"], seconds["deepspeed"], strict=True)]
            results.append(
                {
                    "case": name,
                    **{f"{key}_s": median(taken) for key, taken in seconds.items()},
                    "times_as_fast": median(ratios),
                    "spread": [min(ratios), max(ratios)],
                }
            )
        if topology.is_first:
            for r in results if not args.json else []:
                low, high = r["spread"]
                print(
                    f"{r['case']:12} ours {r['ours_s']:.2f} s, DeepSpeed {r['deepspeed_s']:.2f} s:"
                    f" {r['times_as_fast']:.2f} times as fast ({low:.2f} to {high:.2f})"
                )
            if args.json:
                print(json.dumps({"args": vars(args), "cases": results}))


if __name__ == "__main__":
    main()
