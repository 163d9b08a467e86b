"""Step time of the expert engine's modes beside each other, under skewed routing.

    python -m benchmarks.cluster.run --nodes 4 --ranks-per-node 1 --inter-mbit 200 --cpu 0.45 -- \
        python benchmarks/expert_step.py --imbalance 3

All modes train the same model on the same tokens in the same processes, one block of steps after another in turn. Which
expert a token goes to is prescribed by a made-up trace, so that every mode routes alike. ``ideal`` is expert
parallelism with the same number of rows but even routing: what a perfect balance without copies would take.
Times are of CPU ranks on the links that they ran over; they say nothing about GPUs.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from statistics import median
from typing import Literal

import numpy as np
import torch

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from pydantic import Field

from gates import Gate, GateConfig, GateInput, GateOutput, Mode, RoutingPlan, register_gate
from launch.config import OptimConfig
from launch.optim import build_optimizer
from moe import Transformer
from moe.config import ModelConfig, MoEConfig
from moe.transformer import ForwardContext, next_token_loss
from parallel.config import ParallelConfig
from parallel.engine import ExpertEngine
from parallel.load_trace import SyntheticLoads, TraceHeader
from parallel.model import ParallelModel
from parallel.placement import Ints
from parallel.topology import Topology, connect

COUNTS: dict[str, list[Ints]] = {}
"""By trace name, per step the (L, W, E) counts; gates look their layer and rank up here."""


class PrescribedConfig(GateConfig):
    name: Literal["prescribed"] = "prescribed"
    k: int = Field(2, ge=1)
    trace: str = "skewed"

    def experts_per_token(self, num_experts: int) -> float:
        return float(self.k)


@register_gate("prescribed")
class PrescribedGate(Gate):
    """Sends as many tokens to each expert as a trace says; weights are learned as ever."""

    config_type = PrescribedConfig

    def __init__(self, config: PrescribedConfig, dim: int, num_experts: int) -> None:
        super().__init__(config, dim, num_experts)
        self.weight = torch.nn.Parameter(torch.empty(num_experts, dim))
        self.layer = self.rank = 0
        self.chosen = config

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        torch.nn.init.normal_(self.weight, 0, 0.02, generator=generator)

    def forward(self, inp: GateInput) -> GateOutput:
        tokens, k = inp.x_TD.shape[0], self.chosen.k
        trace = COUNTS[self.chosen.trace]
        counts = trace[inp.step % len(trace)][self.layer, self.rank].copy()
        surplus = int((counts - tokens).clip(min=0).sum())
        counts = counts.clip(max=tokens)
        while surplus:  # a draw may give an expert more rows than there are tokens
            least = int(counts.argmin())
            given = min(surplus, tokens - int(counts[least]))
            counts[least] += given
            surplus -= given
        # Pair j belongs to token j mod T: an expert's pairs stand together, so no token has it twice.
        expert_TK = torch.from_numpy(np.repeat(np.arange(counts.size), counts)).view(k, tokens).T.contiguous()
        logits_TE = inp.x_TD.float() @ self.weight.float().T
        weight_TK = torch.softmax(logits_TE.gather(1, expert_TK), -1)
        return GateOutput(RoutingPlan.from_topk(expert_TK, weight_TK, self.num_experts), logits_TE=logits_TE)


class Contestant:
    """One mode with its own copy of the model."""

    def __init__(
        self, name: str, args: argparse.Namespace, topology: Topology, compute_dtype: torch.dtype | None = None
    ) -> None:
        self.compute_dtype = compute_dtype
        self.name, self.args, self.topology = name, args, topology
        moe = MoEConfig(num_experts=args.experts, hidden_dim=args.hidden)
        config = ModelConfig(
            vocab_size=args.vocab,
            dim=args.dim,
            num_layers=args.layers,
            num_heads=args.heads,
            max_seq_len=args.seq,
            moe=moe,
        )
        gate = PrescribedConfig(k=args.k, trace="even" if name == "ideal" else "skewed")
        self.model = Transformer(config, gate, expert_device="meta")
        mode = "ep" if name == "ideal" else name
        parallel = ParallelConfig(
            mode=mode,
            overlap_degree=args.overlap_degree,
            planner=args.planner,
            split=args.split,
            max_copies=args.max_copies,
        )
        self.engine = ExpertEngine(self.model, topology, parallel, compute_dtype=compute_dtype)
        self.model.init_weights(0)
        for layer, (_, made) in enumerate(self.model.gates()):
            assert isinstance(made, PrescribedGate)
            made.layer, made.rank = layer, topology.rank
        self.parallel = ParallelModel(self.model, topology, parallel, self.engine)
        self.optimizer = build_optimizer(self.model, OptimConfig(lr=1e-4))
        self.step = 0
        self.losses: list[float] = []

    def run(self, steps: int) -> tuple[float, dict[str, float]]:
        """Seconds per step on the slowest rank; per step bytes that all ranks sent and mean communication times."""
        self.engine.meter.take()
        self.topology.barrier()
        begin = time.perf_counter()
        for _ in range(steps):
            self._step()
        seconds = max(self.topology.gather_objects((time.perf_counter() - begin) / steps))
        metrics = self.engine.meter.take()
        assert metrics is not None
        figures = {f"{kind}_bytes": count for kind, count in metrics.sent_bytes.items() if count}
        figures["copy_s"] = metrics.copies_hidden_s + metrics.copies_exposed_s
        figures["exposed_s"] = metrics.copies_exposed_s
        figures["copies"] = sum(float(p.copies_E.sum()) for p in self.engine.planned)
        return seconds, figures

    def _step(self) -> None:
        args, world = self.args, self.topology.world_size
        rng = torch.Generator().manual_seed(1000 * self.step + self.topology.rank)
        ids = torch.randint(args.vocab, (args.tokens // args.seq, args.seq + 1), generator=rng)
        tokens = args.tokens * world
        self.parallel.begin_step()
        self.parallel.forward_begins(last=True)
        context = ForwardContext(step=self.step, mode=Mode.TRAIN, compute_dtype=self.compute_dtype)
        output = self.model(ids[:, :-1], context=context)
        nats, _ = next_token_loss(output.logits_BTV, ids[:, 1:])
        self.parallel.backward(nats / tokens, last=True)
        self.parallel.finish()
        self.parallel.clip_(self.parallel.grad_norm(), 1.0)
        self.optimizer.step()
        load_LE = torch.stack([layer.output.plan.load_E for layer in output.routing])
        self.parallel.end_step(self.topology.sum_(load_LE), self.optimizer)
        self.losses.append(float(self.topology.sum_(nats.detach().double())) / tokens)
        self.step += 1


def make_traces(args: argparse.Namespace, world: int) -> float:
    """Fill :data:`COUNTS`; returns the skewed trace's mean imbalance of ranks under expert parallelism."""
    header = TraceHeader(args.layers, world, args.experts, args.k, args.dim, args.hidden)
    rows = args.tokens * args.k
    loads = SyntheticLoads(rows, args.imbalance, drift=args.drift, clustered=True)
    COUNTS["skewed"] = [step.count_LWE for step in loads.steps(header, 64, seed=0)]
    even = np.full(args.experts, rows // args.experts)
    even[: rows % args.experts] += 1
    COUNTS["even"] = [np.broadcast_to(even, header.shape).copy()]
    owner_E = np.arange(args.experts) * world // args.experts
    found = []
    for count_LWE in COUNTS["skewed"]:
        rows_WL = np.zeros((world, args.layers))
        np.add.at(rows_WL, owner_E, count_LWE.sum(1).T)
        found.append((rows_WL.max(0) / rows_WL.mean(0)).mean())
    return float(np.mean(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--modes", default="ep,fssdp-keep,fssdp-rm,ideal", help="first one is what others are compared with"
    )
    parser.add_argument("--imbalance", type=float, default=3.0, help="max/mean rows of ranks under expert parallelism")
    parser.add_argument("--drift", type=float, default=0.02, help="random walk of an expert's logit, a step")
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--k", type=int, default=2)
    parser.add_argument("--vocab", type=int, default=512)
    parser.add_argument("--seq", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=4096, help="of each rank and step")
    parser.add_argument("--overlap-degree", default="auto")
    parser.add_argument("--max-copies", type=int, default=None)
    parser.add_argument("--planner", default="predict")
    parser.add_argument("--split", default="even")
    parser.add_argument("--warmup", type=int, default=5, help="steps that are not timed; the engine measures in them")
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--steps", type=int, default=2, help="of each mode in each block")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    args.overlap_degree = args.overlap_degree if args.overlap_degree == "auto" else int(args.overlap_degree)
    torch.set_num_threads(1)
    with connect(300) as topology:
        imbalance = make_traces(args, topology.world_size)
        contestants = [Contestant(name, args, topology) for name in args.modes.split(",")]
        for contestant in contestants:
            contestant.run(args.warmup)
        seconds: dict[str, list[float]] = {c.name: [] for c in contestants}
        figures: dict[str, list[dict[str, float]]] = {c.name: [] for c in contestants}
        for _ in range(args.blocks):
            for contestant in contestants:
                taken, counted = contestant.run(args.steps)
                seconds[contestant.name].append(taken)
                figures[contestant.name].append(counted)
        for contestant in contestants:
            if contestant.name != "ideal":
                difference = abs(contestant.losses[-1] - contestants[0].losses[-1])
                assert difference < 1e-4, f"{contestant.name} computed something else: {difference}"
        counted = {
            name: {key: median(f.get(key, 0.0) for f in rows) for key in sorted(set().union(*rows))}
            for name, rows in figures.items()
        }
        if topology.is_first:
            degrees = {c.name: c.engine.policy.overlap_degree_L for c in contestants}
            report(args, imbalance, topology.world_size, seconds, counted, degrees)
        for contestant in contestants:
            contestant.parallel.close()


def report(
    args: argparse.Namespace,
    imbalance: float,
    ranks: int,
    seconds: dict[str, list[float]],
    counted: dict[str, dict[str, float]],
    degrees: dict[str, list[int]],
) -> None:
    first = next(iter(seconds))
    rows = []
    for name, taken in seconds.items():
        ratios = [base / own for base, own in zip(seconds[first], taken, strict=True)]
        total = counted[name]
        copy_s, exposed_s = total["copy_s"], total["exposed_s"]
        rows.append(
            {
                "mode": name,
                "step_s": median(taken),
                "times_as_fast": median(ratios),
                "spread": [min(ratios), max(ratios)],
                "hidden": 1 - exposed_s / copy_s if copy_s else None,
                "copies_per_step": total["copies"],
                "overlap_degree": degrees[name],
                "bytes": {key: value for key, value in total.items() if key.endswith("_bytes")},
            }
        )
    if args.json:
        print(json.dumps({"imbalance": imbalance, "args": vars(args), "modes": rows}))
        return
    print(f"rank imbalance under ep: {imbalance:.2f}; {ranks} ranks; {vars(args)}")
    print(f"{'mode':12} {'s/step':>7}  times as fast as {first:14} hidden  copies  MB sent a step by all ranks")
    for row in rows:
        hidden = "     -" if row["hidden"] is None else f"{row['hidden']:6.1%}"
        sent = ", ".join(f"{key.removesuffix('_bytes')} {value / 1e6:.1f}" for key, value in row["bytes"].items())
        low, high = row["spread"]
        times = f"{row['times_as_fast']:.2f} ({low:.2f} to {high:.2f})"
        print(f"{row['mode']:12} {row['step_s']:7.2f}  {times:31} {hidden}  {row['copies_per_step']:6.0f}  {sent}")


if __name__ == "__main__":
    main()
