"""Does local search find the experts that a gate was matched with wrongly? A planted permutation (experiment R10).

    OMP_NUM_THREADS=1 python benchmarks/gates/local_search.py --json local_search.json --plot local_search.png

Tokens come from E clusters; the right answer for a token of cluster c is a linear map of its own, which one expert
knows already (experts are trained before, and frozen). The gate tells clusters apart from the start, but sends each to
the wrong expert: its columns are permuted at random. What is measured after ``--steps`` of Adam: the mean squared error
as a share of that of the right match, how many clusters visit their expert most, and for local search how much of the
frozen permutation is the planted one (the best match of the relaxed one, by the Hungarian method).

Expected: local search recovers the permutation, the gate alone stalls.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

sys.path[0] = str(Path(__file__).resolve().parent.parent.parent)

import torch
from torch import Tensor

from benchmarks.gates import plots
from gates import Gate, GateInput, Mode, build_gate
from gates.local_search import LocalSearchGate

TOP2: dict[str, Any] = {"name": "topk", "k": 2, "balance_coef": 0.0}
TOP1: dict[str, Any] = {"name": "topk", "k": 1, "renormalise": False, "balance_coef": 0.0}
GATES: dict[str, dict[str, Any]] = {
    "topk k=2": TOP2,
    "topk k=2, local search": {"name": "local_search", "gate": TOP2, "search": 0.5},
    "topk k=2, local search (sinkhorn)": {"name": "local_search", "gate": TOP2, "search": 0.5, "solver": "sinkhorn"},
    "topk k=2, local search (paper)": {"name": "local_search", "gate": TOP2, "search": 0.5, "preset": "paper"},
    "topk k=1": TOP1,
    "topk k=1, local search": {"name": "local_search", "gate": TOP1, "search": 0.5},
}


class Planted(NamedTuple):
    """Clusters, experts, and which expert knows which cluster.

    Attributes:
        centre_ED: (E, D) of the clusters.
        expert_EDD: (E, D, D) maps of the experts.
        expert_of_E: (E,) the expert that is right for each cluster.
    """

    centre_ED: Tensor
    expert_EDD: Tensor
    expert_of_E: Tensor


def plant(experts: int, dim: int, seed: int) -> Planted:
    """Well separated clusters and unlike experts; no cluster is matched rightly by chance."""
    rng = torch.Generator().manual_seed(seed)
    centre_ED = 3 * torch.randn(experts, dim, generator=rng) / dim**0.5
    expert_EDD = torch.randn(experts, dim, dim, generator=rng) / dim**0.5
    order_E = torch.randperm(experts, generator=rng)
    # One cycle through all: everybody's right expert is the next one's.
    expert_of_E = torch.empty_like(order_E)
    expert_of_E[order_E] = order_E.roll(-1)
    return Planted(centre_ED, expert_EDD, expert_of_E)


def draw(planted: Planted, tokens: int, rng: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens (T, D), what they should become, and their clusters."""
    cluster_T = torch.randint(len(planted.centre_ED), (tokens,), generator=rng)
    noise_TD = torch.randn(tokens, planted.centre_ED.shape[1], generator=rng)
    x_TD = planted.centre_ED[cluster_T] + 0.3 * noise_TD / noise_TD.shape[1] ** 0.5
    right_TDD = planted.expert_EDD[planted.expert_of_E[cluster_T]]
    return x_TD, torch.einsum("td,tdo->to", x_TD, right_TDD), cluster_T


def start(config: dict[str, Any], planted: Planted, seed: int) -> Gate:
    """The gate, its projection pointing at the clusters, so that cluster c prefers expert c, who is wrong."""
    experts, dim = planted.centre_ED.shape
    gate = build_gate(config, dim, experts)
    gate.reset_parameters(torch.Generator().manual_seed(seed))
    inner = gate.inner if isinstance(gate, LocalSearchGate) else gate
    with torch.no_grad():
        inner.get_parameter("weight").copy_(2 * planted.centre_ED)
    return gate


def run(
    config: dict[str, Any], experts: int, dim: int, steps: int, tokens: int, rate: float, seed: int
) -> dict[str, float]:
    """Train one gate on the planted problem; see the module for what is measured."""
    begin = time.perf_counter()
    planted = plant(experts, dim, seed)
    gate = start(config, planted, seed)
    optimizer = torch.optim.Adam(gate.parameters(), lr=rate)
    rng = torch.Generator().manual_seed(seed)
    coefs = gate.config.aux_coefs()
    for step in range(steps):
        gate.begin_step(step, steps)
        x_TD, wanted_TD, _ = draw(planted, tokens, rng)
        out = gate(GateInput(x_TD, mode=Mode.TRAIN, step=step, rng=rng))
        loss = (mix(planted, x_TD, out.plan.dense_weight_TE()) - wanted_TD).square().mean()
        optimizer.zero_grad()
        (loss + sum(coefs[name] * value for name, value in out.aux.items())).backward()
        optimizer.step()
        gate.end_step(out.plan.offered_E, out.signals)
    with torch.no_grad():
        x_TD, wanted_TD, cluster_T = draw(planted, 4096, rng)
        weight_TE = gate(GateInput(x_TD)).plan.dense_weight_TE()
        error = (mix(planted, x_TD, weight_TE) - wanted_TD).square().mean() / wanted_TD.square().mean()
        use_EE = torch.zeros(experts, experts).index_add(0, cluster_T, weight_TE)
    found = {"error": float(error), "matched": float((use_EE.argmax(1) == planted.expert_of_E).float().mean())}
    if isinstance(gate, LocalSearchGate):
        found["recovered"] = float((gate.expert_of_E == planted.expert_of_E).float().mean())
    return {**found, "seconds": time.perf_counter() - begin}


def mix(planted: Planted, x_TD: Tensor, weight_TE: Tensor) -> Tensor:
    return torch.einsum("te,td,edo->to", weight_TE, x_TD, planted.expert_EDD)


def draw_plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Error and clusters matched, a dot per seed."""
    figure, axes = plots.panels(2, height=2.4, width=3.6, share_y=True)
    labels = {"error": "squared error / squared answer", "matched": "clusters matched (share)"}
    for one, (key, label) in zip(axes, labels.items(), strict=True):
        plots.dots(one, {row["gate"]: [run[key] for run in row["runs"]] for row in rows}, label)
        one.set_xlabel(label, fontsize=9)
        one.set_xlim(left=-0.05)
    plots.save(figure, path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--dim", type=int, default=16)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rate", type=float, default=1e-2, help="learning rate of Adam")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--gates", nargs="*", default=list(GATES), choices=list(GATES))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path, help="write a PNG here")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{args.experts} experts, {args.seeds} seeds, {args.steps} steps; mean (least to most)")
    print(f"{'gate':34s} {'expected':>8s} {'error / answer':>22s} {'clusters matched':>22s} {'P recovered':>22s}     s")
    rows = []
    for name in args.gates:
        runs = [
            run(GATES[name], args.experts, args.dim, args.steps, args.tokens, args.rate, seed)
            for seed in range(args.seeds)
        ]
        cells = []
        for key in ("error", "matched", "recovered"):
            values = [one[key] for one in runs if key in one]
            cells.append(f"{statistics.mean(values):.3f} ({min(values):.2f} to {max(values):.2f})" if values else "")
        seconds = statistics.mean(one["seconds"] for one in runs)
        expected = "recovers" if "search" in GATES[name] else "stalls"
        print(f"{name:34s} {expected:>8s} {cells[0]:>22s} {cells[1]:>22s} {cells[2]:>22s} {seconds:5.1f}", flush=True)
        rows.append({"gate": name, "config": GATES[name], "runs": runs})
    if args.json:
        head = {"machine": platform.machine(), "torch": torch.__version__}
        options = {key: value for key, value in vars(args).items() if key not in ("json", "gates", "plot")}
        args.json.write_text(json.dumps({**head, **options, "rows": rows}) + "\n", encoding="utf-8")
    if args.plot:
        draw_plot(rows, args.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
