"""How long the planners take for one layer, on one core: what a rank spends every step, before anything travels.

    python benchmarks/planner_time.py --json planner.json

Loads are drawn anew for every call (Dirichlet with concentration 0.3: a few hot experts), so no call finds its data in
the cache of the one before. Times are medians, with the 10th and 90th percentile in brackets.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parent.parent)

import numpy as np

from parallel.placement import Placement, even_owners
from parallel.planner import plan_copies, plan_more_copies, plan_spill
from parallel.sharder import plan_owners

RANKS_PER_NODE, ROWS_PER_RANK, SHARDED_LAYERS = 8, 8192, 12
# (E, W, t, m): experts, ranks, overlap degree, copies per rank.
SIZES = [
    (8, 4, 2, 1),
    (16, 4, 4, 2),
    (64, 8, 8, 4),
    (64, 32, 8, 4),
    (64, 32, 16, 8),
    (128, 32, 16, 8),
    (128, 64, 16, 8),
    (256, 64, 8, 4),
    (256, 64, 8, 8),
    (256, 64, 16, 8),
    (256, 64, 32, 8),
]


def times_ms(call: Callable[[np.ndarray], Any], loads: list[np.ndarray]) -> list[float]:
    """(10th percentile, median, 90th) over one call for each load."""
    took = []
    call(loads[0])
    for load in loads:
        begin = time.perf_counter()
        call(load)
        took.append((time.perf_counter() - begin) * 1e3)
    return [round(float(value), 3) for value in np.percentile(took, [10, 50, 90])]


def measure(experts: int, world: int, overlap: int, copies: int, calls: int) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    node_W = [rank // RANKS_PER_NODE for rank in range(world)]
    owner_LE = even_owners(SHARDED_LAYERS, experts, world)
    sharding = Placement(owner_LE[0], world_size=world)
    loads = [rng.multinomial(ROWS_PER_RANK * world, rng.dirichlet(np.full(experts, 0.3))) for _ in range(calls)]
    current = plan_copies(sharding, loads[0], overlap, copies // 2, node_W)
    slots_W = np.bincount(owner_LE.ravel(), minlength=world)
    stacks = [np.array(loads[i : i + SHARDED_LAYERS]) for i in range(0, min(calls, 60), SHARDED_LAYERS)]
    return {
        "experts": experts,
        "ranks": world,
        "overlap_degree": overlap,
        "max_copies": copies,
        "copies_ms": times_ms(lambda load: plan_copies(sharding, load, overlap, copies, node_W), loads),
        "more_copies_ms": times_ms(
            lambda load: plan_more_copies(current, load, overlap, copies, node_W, ns_per_row=1, ns_per_copy=1), loads
        ),
        "spill_ms": times_ms(lambda load: plan_spill(sharding, load, copies, min_rows=64), loads),
        "owners_12_layers_ms": times_ms(
            lambda load_LE: plan_owners(load_LE, owner_LE, overlap, slots_W, node_W), stacks
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the result here as one JSON object")
    parser.add_argument("--calls", type=int, default=120, help="loads drawn for each size, at least 12")
    args = parser.parse_args()
    rows = []
    columns = ("copies_ms", "more_copies_ms", "spill_ms", "owners_12_layers_ms")
    print(f"{'E':>4} {'W':>3} {'t':>3} {'m':>3}" + "".join(f"{name:>26}" for name in columns))
    for size in SIZES:
        row = measure(*size, calls=max(args.calls, SHARDED_LAYERS))
        rows.append(row)
        cells = "".join(f"{row[c][1]:>11.3f} [{row[c][0]:.3f}-{row[c][2]:.3f}]".rjust(26) for c in columns)
        print("{:>4} {:>3} {:>3} {:>3}".format(*size) + cells, flush=True)
    if args.json:
        machine = {"machine": platform.machine(), "python": platform.python_version(), "numpy": np.__version__}
        args.json.write_text(json.dumps({**machine, "rows": rows}) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
