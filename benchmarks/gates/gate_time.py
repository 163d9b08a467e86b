"""Forward and backward of each gate as in training, beside what its routing costs at least and Mixtral's router.

    OMP_NUM_THREADS=1 python benchmarks/gates/gate_time.py --json gate_time.json

Every gate runs once a round, in an order that rotates, with its losses and metrics; ratios are taken within a round, so
that a slow spell of the machine hits both sides. The bare router is logits, softmax, torch.topk and nothing else.
Mixtral is transformers' router with its load balancing loss, on the same tokens and the same weights as topk.
DeepSpeed's are its gating functions after the same projection, with the capacity of switch (one expert) and gshard
(two); they return the dense (T, E, C) masks that its layer multiplies by, and so does nothing else here. Freed memory
is kept, as launch/train.py does; --give-memory-back leaves the C library as it is.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parent.parent.parent)

import numpy as np
import torch
from torch import Tensor

from gates.base import Gate, GateInput, Mode
from gates.registry import build_gate, gate_names
from launch.memory import keep_freed_memory

BARE, MIXTRAL = "bare topk", "transformers Mixtral"
DEEPSPEED = {"switch": "DeepSpeed top1gating", "gshard": "DeepSpeed top2gating"}
STEP, TOTAL_STEPS, SEQUENCES = 50, 100, 8
SKIPPED = {"replay", "forced"}  # they repeat or prescribe a routing: nothing that a model trains with
# (gate, what its time is divided by): at most.
TARGETS = {
    ("topk", BARE): 1.2,
    ("topk", MIXTRAL): 1.0,
    ("comet", "topk"): 4.0,
    ("sparse_ot", "topk"): 8.0,
    ("sinkhorn", "topk"): 4.0,
    ("expert_choice", "topk"): 2.0,
    ("switch", DEEPSPEED["switch"]): 1.0,
    ("gshard", DEEPSPEED["gshard"]): 1.0,
}
Call = Callable[[], None]


def configs(k: int) -> dict[str, dict[str, Any]]:
    """Every gate with ``k`` experts per token where it has that option, and its defaults otherwise."""
    from gates.registry import gate_type

    found: dict[str, dict[str, Any]] = {}
    for name in gate_names():
        if name in SKIPPED:
            continue
        fields = gate_type(name).config_type.model_fields
        one = name in ("switch", "hash")
        found[name] = {"name": name, **({"k": k} if "k" in fields and not one else {})}
    return found


def train_input(num_tokens: int, dim: int) -> GateInput:
    rng = torch.Generator().manual_seed(0)
    at_T = torch.arange(num_tokens)
    length = -(-num_tokens // SEQUENCES)
    return GateInput(
        torch.randn(num_tokens, dim, generator=rng).requires_grad_(),
        ids_T=torch.randint(0, 32_000, (num_tokens,), generator=rng),
        segment_T=at_T // length,
        position_T=at_T % length,
        step=STEP,
        mode=Mode.TRAIN,
        rng=rng,
    )


def gate_call(gate: Gate, inp: GateInput, grad_N: Tensor) -> Call:
    """One training pass: route, then gradients from the weights and from every loss by its coefficient."""
    coefs = gate.config.aux_coefs()

    def call() -> None:
        inp.x_TD.grad = None
        gate.zero_grad()
        out = gate(inp)
        loss = (out.plan.weight_N * grad_N[: out.plan.num_pairs]).sum()
        for name, value in out.aux.items():
            loss = loss + coefs.get(name, 1.0) * value
        if loss.requires_grad:
            loss.backward()

    return call


def bare_call(weight_ED: Tensor, x_TD: Tensor, k: int, grad_N: Tensor) -> Call:
    def call() -> None:
        x_TD.grad = weight_ED.grad = None
        value_TK, _ = torch.topk(x_TD @ weight_ED.t(), k, dim=-1)
        (value_TK.softmax(-1).reshape(-1) * grad_N[: value_TK.numel()]).sum().backward()

    return call


def mixtral_call(weight_ED: Tensor, x_TD: Tensor, k: int, grad_N: Tensor) -> Call:
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter, load_balancing_loss_func

    experts, dim = weight_ED.shape
    router = MixtralTopKRouter(
        MixtralConfig(hidden_size=dim, num_local_experts=experts, num_experts_per_tok=k)  # type: ignore[call-arg]
    )
    with torch.no_grad():
        router.weight.copy_(weight_ED)

    def call() -> None:
        x_TD.grad = router.weight.grad = None
        logits_TE, weight_TK, _ = router(x_TD)
        balance = load_balancing_loss_func((logits_TE,), experts, k)
        ((weight_TK.reshape(-1) * grad_N[: weight_TK.numel()]).sum() + 0.01 * balance).backward()

    return call


def deepspeed_call(gate: Gate, x_TD: Tensor) -> Call:
    from deepspeed.moe import sharded_moe  # type: ignore[import-not-found]

    (weight_ED,) = (weight.detach().clone().requires_grad_() for weight in gate.parameters())
    factor, least = gate.config.capacity_factor, gate.config.min_capacity  # type: ignore[attr-defined]

    def call() -> None:
        x_TD.grad = weight_ED.grad = None
        logits_TE = x_TD @ weight_ED.t()
        if gate.config.name == "switch":
            loss, weight_TEC, _, _ = sharded_moe.top1gating(logits_TE, factor, least, use_rts=False)
        else:
            loss, weight_TEC, _, _ = sharded_moe.top2gating(logits_TE, factor, least)
        (weight_TEC.sum() + 0.01 * loss).backward()

    return call


def calls_for(num_tokens: int, dim: int, experts: int, k: int, names: list[str] | None = None) -> dict[str, Call]:
    inp = train_input(num_tokens, dim)
    grad_N = torch.randn(num_tokens * experts, generator=torch.Generator().manual_seed(1))
    calls: dict[str, Call] = {}
    for name, config in configs(k).items():
        if names and name not in names:
            continue
        torch.manual_seed(0)
        gate = build_gate(config, dim, experts).train()
        gate.reset_parameters(torch.Generator().manual_seed(0))
        gate.begin_step(STEP, TOTAL_STEPS)
        calls[name] = gate_call(gate, inp, grad_N)
        if name in DEEPSPEED:
            try:
                calls[DEEPSPEED[name]] = deepspeed_call(gate, inp.x_TD)
            except ImportError as error:
                print(f"no {DEEPSPEED[name]}: {error}", file=sys.stderr)
        if name == "topk":
            (weight_ED,) = gate.parameters()
            calls[BARE] = bare_call(weight_ED.detach().clone().requires_grad_(), inp.x_TD, k, grad_N)
            try:
                calls[MIXTRAL] = mixtral_call(weight_ED.detach(), inp.x_TD, k, grad_N)
            except ImportError as error:
                print(f"no {MIXTRAL}: {error}", file=sys.stderr)
    return calls


def measure(calls: dict[str, Call], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each call in each round."""
    took: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for number in range(-2, rounds):  # the first two warm up
        at = number % len(names)
        for name in names[at:] + names[:at]:
            begin = time.perf_counter()
            calls[name]()
            if number >= 0:
                took[name].append((time.perf_counter() - begin) * 1e3)
    return took


def ratio(took: dict[str, list[float]], name: str, base: str) -> float:
    """Median over rounds of the quotient within a round."""
    return statistics.median(a / b for a, b in zip(took[name], took[base], strict=True))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--k", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--give-memory-back", action="store_true", help="leave the C library's malloc as it is")
    parser.add_argument("--json", type=Path, help="write the result here as one JSON object")
    args = parser.parse_args()
    if args.rounds < 1:
        parser.error("--rounds must be at least 1")
    torch.set_num_threads(1)
    kept = not args.give_memory_back and keep_freed_memory()
    took = measure(calls_for(args.tokens, args.dim, args.experts, args.k), args.rounds)
    print(
        f"T={args.tokens} D={args.dim} E={args.experts} k={args.k}, {args.rounds} rounds, one thread,"
        f" freed memory {'kept' if kept else 'given back as the C library likes'}"
    )
    print(f"{'gate':<22} {'ms (10%-90%)':>24} {'of topk':>8} {'of bare':>8} {'of Mixtral':>10}")
    rows = []
    for name, own in sorted(took.items(), key=lambda item: statistics.median(item[1])):
        low, mid, high = (float(value) for value in np.percentile(own, [10, 50, 90]))
        ratios = {base: ratio(took, name, base) for base in ("topk", BARE, MIXTRAL) if base in took}
        cells = "".join(f"{ratios.get(base, float('nan')):>9.2f}" for base in ("topk", BARE, MIXTRAL))
        print(f"{name:<22} {f'{mid:.2f} ({low:.2f}-{high:.2f})':>24}{cells}")
        rows.append({"gate": name, "ms": [low, mid, high], "ratios": ratios, "runs_ms": own})
    checks = []
    print(f"\n{'target':<32} {'expected':>8} {'observed':>8}")
    for (name, base), most in TARGETS.items():
        if name in took and base in took:
            observed = ratio(took, name, base)
            print(
                f"{f'{name} / {base}':<32} {f'<= {most:g}':>8} {observed:>8.2f}  {'' if observed <= most else 'MISSED'}"
            )
            checks.append({"gate": name, "base": base, "expected": most, "observed": observed})
    if args.json:
        sizes = {key: getattr(args, key) for key in ("tokens", "dim", "experts", "k", "rounds")}
        sizes["freed_memory_kept"] = kept
        head = {"machine": platform.machine(), "torch": torch.__version__, **sizes}
        args.json.write_text(json.dumps({**head, "rows": rows, "targets": checks}) + "\n", encoding="utf-8")
    return 0 if all(check["observed"] <= check["expected"] for check in checks) else 1


if __name__ == "__main__":
    sys.exit(main())
