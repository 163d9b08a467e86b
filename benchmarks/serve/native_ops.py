"""The native ops beside torch, for few rows: one layer's experts, and one dense projection.

    python benchmarks/serve/native_ops.py --json native_ops.json

Generating text reads weights, so what counts is bytes per second beside a plain read of the same bytes. There are more
matrices than a cache holds, and each call takes the next ones. Sides take turns; times are medians with the smallest
and the largest of all rounds, speed-ups are medians of each round's ratio. ``--clock cpu`` counts the time of the
process instead of the wall's: for one thread on a machine that others use too.

Every expert of the layer has the same number of rows. "packed loop" is moe.ops.packed_experts without the native op,
"grouped_mm" is training's layout and op, "read" adds up the squares of the same weights.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.serve.rounds import machine, ratios, spread, take_turns, write
from moe.experts import Experts
from moe.ops.native import LEVELS, NativeOps, choose_native_ops
from moe.ops.packed_experts import PackedExperts

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
W = TypeVar("W")
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


class Side:
    """One way to compute. Every call takes the next of the weights, which all sides take from one ``turn``."""

    def __init__(self, clock: Callable[[], float], turn: Iterator[W], call: Callable[[W], object]) -> None:
        self._clock, self._turn, self._call = clock, turn, call

    def __call__(self) -> float:
        """Milliseconds of one call."""
        weights = next(self._turn)
        begin = self._clock()
        self._call(weights)
        return (self._clock() - begin) * 1e3


class Layer(NamedTuple):
    """The same experts in both layouts."""

    trained: Experts
    packed: PackedExperts

    def weights(self) -> list[Tensor]:
        """Packed."""
        return [self.packed.w_gate_up_EGD, self.packed.w_down_EDF]


def read(weights: Sequence[Tensor]) -> None:
    """Every weight, read once: a product of a vector with itself has nothing else to do."""
    for weight in weights:
        view = weight.view(torch.float32).flatten()
        torch.dot(view, view)


def report(title: str, sides: dict[str, list[float]], read_bytes: int, base: str) -> dict[str, Any]:
    """Prints one line for each side; their numbers, the speed-up being that over ``base``."""
    rows: dict[str, Any] = {}
    for name, values in sides.items():
        faster = ratios(sides[base], values)
        rows[name] = {
            "ms": statistics.median(values),
            "ms_all": values,
            "gb_per_s": read_bytes / statistics.median(values) / 1e6,
            "of_read": statistics.median(ratios(sides["read"], values)),
            "speed_up": statistics.median(faster),
        }
        print(
            f"{title:>22} {name:<12}{spread(values, 2):>26} ms {rows[name]['gb_per_s']:>7.1f} GB/s"
            f" {rows[name]['of_read']:>6.0%} of a read {spread(faster, 2):>20} x {base}",
            flush=True,
        )
        title = ""
    return rows


def measure_experts(ops: NativeOps, args: argparse.Namespace, dtype: torch.dtype) -> list[dict[str, Any]]:
    """One call is all experts of a layer, each with as many rows."""
    torch.manual_seed(0)
    trained = [Experts(args.experts, args.dim, args.hidden).to(dtype).requires_grad_(False) for _ in range(args.layers)]
    layers = [Layer(experts, PackedExperts(copy.deepcopy(experts), native=False)) for experts in trained]
    turn = cycle(layers)
    layer_bytes = sum(weight.nbytes for weight in layers[0].weights())
    results = []
    for rows in args.rows:
        x_ND = torch.randn(rows * args.experts, args.dim).to(dtype)
        load_E = torch.full((args.experts,), rows)

        def native(layer: Layer, x_ND: Tensor = x_ND, load_E: Tensor = load_E) -> Tensor:
            return ops.expert_mlp(x_ND, layer.packed.w_gate_up_EGD, layer.packed.w_down_EDF, load_E, args.level)

        def loop(layer: Layer, x_ND: Tensor = x_ND, load_E: Tensor = load_E) -> Tensor:
            return layer.packed.forward(x_ND, load_E)

        def grouped(layer: Layer, x_ND: Tensor = x_ND, load_E: Tensor = load_E) -> Tensor:
            return layer.trained.forward(x_ND, load_E)

        calls: dict[str, Callable[[Layer], object]] = {
            "native": native,
            "packed loop": loop,
            "grouped_mm": grouped,
            "read": lambda layer: read(layer.weights()),
        }
        sides = {name: Side(args.now, turn, call) for name, call in calls.items()}
        take_turns(sides, 1)
        values = take_turns(sides, args.rounds)
        title = f"{args.experts} experts x {rows} rows"
        results.append({"rows": rows, "sides": report(title, values, layer_bytes, "packed loop")})
    return results


def measure_linear(ops: NativeOps, args: argparse.Namespace, dtype: torch.dtype) -> list[dict[str, Any]]:
    """One call is as many (D, D) projections as weigh 32 MiB."""
    torch.manual_seed(0)
    matrix_bytes = args.dim**2 * dtype.itemsize
    batch = max(1, 2**25 // matrix_bytes)
    matrices = [torch.randn(args.dim, args.dim).to(dtype) for _ in range(batch * args.layers * 4)]
    turn = cycle([matrices[start : start + batch] for start in range(0, len(matrices), batch)])
    results = []
    for rows in args.rows:
        x_ND = torch.randn(rows, args.dim).to(dtype)

        def native(part: list[Tensor], x_ND: Tensor = x_ND) -> list[Tensor]:
            return [ops.linear_rows(x_ND, w_DD, args.level) for w_DD in part]

        def by_torch(part: list[Tensor], x_ND: Tensor = x_ND) -> list[Tensor]:
            return [F.linear(x_ND, w_DD) for w_DD in part]

        calls: dict[str, Callable[[list[Tensor]], object]] = {"native": native, "F.linear": by_torch, "read": read}
        sides = {name: Side(args.now, turn, call) for name, call in calls.items()}
        take_turns(sides, 1)
        values = take_turns(sides, args.rounds)
        title = f"linear, {rows} rows"
        results.append({"rows": rows, "sides": report(title, values, batch * matrix_bytes, "F.linear")})
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the result here as one JSON object")
    parser.add_argument("--dim", type=int, default=1024)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--layers", type=int, default=6, help="so many layers' experts take turns")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8, 16, 64])
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--level", choices=LEVELS, help="a lower level than the best of this CPU")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    args = parser.parse_args()
    args.now = CLOCKS[args.clock]
    torch.set_num_threads(args.threads)
    ops, reason = choose_native_ops()
    if ops is None:
        parser.error(f"no native ops: {reason}")
    if args.level not in (None, *ops.levels()):
        parser.error(f"--level {args.level}: this CPU has {', '.join(ops.levels())}")
    print(
        f"{machine()}\n{reason}; level {args.level or ops.best_level}, {args.threads} thread(s), {args.dtype},"
        f" {args.clock} clock",
        flush=True,
    )
    with torch.inference_mode():
        experts = measure_experts(ops, args, DTYPES[args.dtype])
        linear = measure_linear(ops, args, DTYPES[args.dtype])
    settings = {key: value for key, value in vars(args).items() if key not in ("json", "now")}
    settings["level"] = args.level or ops.best_level
    write(args.json, {**settings, "expert_mlp": experts, "linear_rows": linear})


if __name__ == "__main__":
    main()
