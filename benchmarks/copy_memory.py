"""Memory that copies of experts take: what the operating system counted, beside the formula.

    torchrun --nproc-per-node 4 benchmarks/copy_memory.py
    torchrun --nproc-per-node 4 benchmarks/copy_memory.py --dtype bfloat16

The modes train the same model in the same processes, one after the other. Of each, the peak of a rank's resident memory
over two steps is read (VmHWM, reset before them) less what was resident before the mode's model was built. What a mode
takes more than expert parallelism is what its copies cost; on the fullest rank this is compared with the formula of
:func:`parallel.cost_model.memory_ratio`: kept, copies of all layers and the gradients of the largest; released, copies
and gradients of the largest layer alone. Few tokens, so that activations, which differ with the balance of ranks, weigh
little beside experts. The last lines are the formula alone, at the shapes of Hecate (arXiv:2502.02581, section 5.4).
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import torch

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from benchmarks.expert_step import Contestant, make_traces
from parallel.cost_model import memory_ratio
from parallel.topology import Topology, connect

MODES = ("ep", "fssdp-rm", "fssdp-keep")
PAPER_OWNED = 12 * 64 / 32
PAPER_COPIES_L = np.array([1.18] + [(12 - 1.18) / 11] * 11) * 4.73 * PAPER_OWNED / 12
"""4.73 copies for each owned expert; released, 90.2 % fewer: the largest layer is 18 % above the mean."""

M_MMAP_THRESHOLD = -3
LIBC = ctypes.CDLL(None)


@dataclass(frozen=True)
class Measured:
    """Of one rank: peak of resident memory above that before the model, and by formula what experts take."""

    peak_bytes: int
    owned_bytes: int
    copy_bytes: int


def resident_bytes(line: str) -> int:
    found = re.search(rf"^{line}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


def forget_peak() -> None:
    gc.collect()
    LIBC.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of activations and copies")
    parser.add_argument("--degree", type=int, default=8, help="experts of each layer that get copies")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=16, help="of each rank and step")
    parser.add_argument("--rounds", type=int, default=3, help="how often each mode is measured")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    # Freed tensors shall be gone from the resident memory at once.
    LIBC.mallopt(M_MMAP_THRESHOLD, 65536)
    torch.set_num_threads(1)
    fixed = {"max_copies": None, "planner": "predict", "split": "even", "vocab": 64, "heads": 4, "k": 2, "drift": 0.0}
    options = argparse.Namespace(**vars(args), **fixed, overlap_degree=args.degree, seq=args.tokens, imbalance=2.0)
    compute_dtype = None if args.dtype == "float32" else torch.bfloat16
    with connect(300) as topology:
        make_traces(options, topology.world_size)
        measure(MODES[0], options, topology, compute_dtype)  # loads what is loaded once
        measured = [[measure(mode, options, topology, compute_dtype) for mode in MODES] for _ in range(args.rounds)]
        if topology.is_first:
            report(args, measured)


def measure(
    mode: str, options: argparse.Namespace, topology: Topology, compute_dtype: torch.dtype | None
) -> list[Measured]:
    """One mode by itself; what each rank measured."""
    forget_peak()
    before = resident_bytes("VmRSS")
    contestant = Contestant(mode, options, topology, compute_dtype)
    contestant.run(3)
    forget_peak()
    contestant.run(2)
    peak = resident_bytes("VmHWM") - before
    engine = contestant.engine
    item = (compute_dtype or torch.float32).itemsize
    numbers = sum(bank.chunks_eX.numel() for bank in engine.experts)
    # Weights, gradients and both moments in fp32, and in mixed precision the weights once more.
    owned = numbers * (16 + (item if item < 4 else 0))
    chunk = engine.experts[0].chunk_numel * item
    copies_L = [len(bank.copied) for bank in engine.experts]
    # Gradients of kept copies may become sums over micro-batches and are fp32, others are of the copies' dtype.
    kept = sum(copies_L) * chunk + max(copies_L) * engine.experts[0].chunk_numel * 4
    copies = {"ep": 0, "fssdp-rm": 2 * max(copies_L) * chunk, "fssdp-keep": kept}[mode]
    contestant.parallel.close()
    return topology.gather_objects(Measured(peak, owned, copies))


def report(args: argparse.Namespace, measured: list[list[list[Measured]]]) -> None:
    ranks = len(measured[0][0])
    rows = []
    for index, mode in enumerate(MODES[1:], start=1):
        # The rank on which the formula expects most.
        fullest = max(range(ranks), key=lambda rank: measured[0][index][rank].copy_bytes)
        ratios = [
            1
            + (of_modes[index][fullest].peak_bytes - of_modes[0][fullest].peak_bytes) / of_modes[0][fullest].owned_bytes
            for of_modes in measured
        ]
        there = measured[0][index][fullest]
        formula = 1 + there.copy_bytes / there.owned_bytes
        rows.append(
            {
                "mode": mode,
                "measured": median(ratios),
                "spread": [min(ratios), max(ratios)],
                "formula": formula,
                "measured_over_formula": median(ratios) / formula,
            }
        )
    paper = [
        {"mode": mode, "formula": memory_ratio(PAPER_COPIES_L, PAPER_OWNED, 2, keep=mode == "fssdp-keep")}
        for mode in MODES[1:]
    ]
    if args.json:
        print(json.dumps({"args": vars(args), "ranks": ranks, "measured": rows, "paper": paper}))
        return
    print(f"{ranks} ranks; {vars(args)}")
    print("memory of experts on the fullest rank, over that of expert parallelism")
    for row in rows:
        low, high = row["spread"]
        times = f"{row['measured']:.3f} ({low:.3f} to {high:.3f})"
        off = row["measured_over_formula"] - 1
        print(f"  {row['mode']:11} measured {times}, formula {row['formula']:.3f}: {off:+.1%}")
    print("by formula alone, in half precision, with the copies that Hecate reports for its 12 layers of 64 experts")
    for row in paper:
        print(f"  {row['mode']:11} {row['formula']:.3f}")


if __name__ == "__main__":
    main()
