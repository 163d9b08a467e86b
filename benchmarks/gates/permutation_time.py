"""What the relaxed permutation of local search costs, forward and backward, by how it is solved.

    OMP_NUM_THREADS=1 python benchmarks/gates/permutation_time.py

Along the default schedule of ``local_search`` (tau from 0.1 to 1e-3, Sinkhorn iterations from 20 to 150), in turn, on
scores that a search has spread: Sinkhorn iterations that autograd records, the exact matrix by Schur-Newton with an
implicit gradient (``gates/solvers/relaxed_permutation.py``), and Sinkhorn-Newton-Sparse (forward alone). Expected:
Newton pays, and more the colder it gets; SNS needs larger matrices to.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent.parent)

import torch
from torch import Tensor

from gates import build_gate
from gates.local_search import LocalSearchGate
from gates.solvers.entropic import schur_newton
from gates.solvers.relaxed_permutation import relaxed_permutation, solve
from gates.solvers.sns import sinkhorn_newton_sparse

SPREAD = 0.3  # of the scores, where the search for a planted permutation ends


def methods(gate: LocalSearchGate, score_EE: Tensor, upstream_EE: Tensor) -> dict[str, Callable[[], object]]:
    """Each method as a call; the first two leave the gradient of the scores behind."""
    tau = float(gate.tau)
    size = len(score_EE)
    ones_E = torch.ones(size, dtype=torch.float64)
    return {
        "Sinkhorn, recorded": lambda: (gate._relaxed(score_EE) * upstream_EE).sum().backward(),
        "exact, implicit": lambda: (relaxed_permutation(score_EE, tau) * upstream_EE).sum().backward(),
        "SNS, forward alone": lambda: sinkhorn_newton_sparse(score_EE.detach(), 1 / tau, ones_E, ones_E),
        "Newton, forward alone": lambda: schur_newton(score_EE.detach().double(), 1 / tau, ones_E, ones_E),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, nargs="+", default=[8, 16, 64])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    print(f"ms, median (least to most) of {args.rounds} rounds in turn")
    for size in args.experts:
        gate = build_gate({"name": "local_search", "solver": "sinkhorn", "search": 100, "max_experts": size}, 8, size)
        assert isinstance(gate, LocalSearchGate)
        for step in (0, 50, 99):
            gate.begin_step(step)
            times: dict[str, list[float]] = {}
            for number in range(args.rounds + 1):
                rng = torch.Generator().manual_seed(number)
                score_EE = (SPREAD * torch.randn(size, size, generator=rng)).requires_grad_()
                upstream_EE = torch.randn(size, size, generator=rng)
                for name, call in methods(gate, score_EE, upstream_EE).items():
                    begin = time.perf_counter()
                    call()
                    if number:  # the first round warms up
                        times.setdefault(name, []).append(1e3 * (time.perf_counter() - begin))
            columns = gate._relaxed(score_EE.detach()).sum(0) - 1
            off = {"Sinkhorn": float(columns.abs().mean()), "Newton": solve(score_EE, float(gate.tau)).marginal_error}
            print(f"{size} experts, tau {float(gate.tau):.1e}, {int(gate.iterations)} Sinkhorn iterations", end="; ")
            print(", ".join(f"{name} off by {error:.0e}" for name, error in off.items()))
            base = times["Sinkhorn, recorded"]
            for name, taken in times.items():
                ratio = statistics.median(b / t for b, t in zip(base, taken, strict=True))
                spread = f"{statistics.median(taken):7.2f} ({min(taken):.2f} to {max(taken):.2f})"
                print(f"  {name:20s} {spread:26s} {ratio:5.1f} times as fast")
            rows.append({"experts": size, "tau": float(gate.tau), "off": off, "ms": times})
            assert all(math.isfinite(error) for error in off.values())
    if args.json:
        head = {"machine": platform.machine(), "torch": torch.__version__}
        args.json.write_text(json.dumps({**head, "rows": rows}) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
