"""How fast maximum likelihood finds a Gaussian mixture of experts: measured slopes beside the ones the papers prove.

    python benchmarks/gates/rates.py --experiment R1 --json r1.json --plot r1.png

R1  softmax gate, exact-specified (2 experts, 2 fitted), the authors' parameters               about 1 minute
R2  top-1 gate, exact-specified; and top-2 of 3, where the likelihood does inform the gate     about 1.5 minutes
R3  over-specified (3 experts fitted to 2)                LONG-RUNNING: about 20 minutes, or 1 minute with --quick
R4  temperature: standard dense-to-sparse gate (identity) against activation gate (sigmoid)    about 3 minutes

Times are for one core (OMP_NUM_THREADS=1). Slopes are those of the median error over replications; brackets hold a 95%
bootstrap interval over replications. A proved rate is an upper bound, uniform over truths near the limit; the slope at
one fixed truth may be steeper. Sources [D], [S], [A]: see gaussian_moe.py, also for the suffixes; S numbers the sizes.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import numpy as np
import torch
from torch import Generator, Tensor

from benchmarks.gates import gaussian_moe as gm
from benchmarks.gates import plots
from benchmarks.gates.gaussian_moe import GateSpec, Mixture

# [S], the authors' experiment: one input, uniform on [0, 1].
AUTHORS = Mixture.of([[25], [0]], [-8, 0], [[-20], [20]], [15, -5], [0.3, 0.4])
# For top-2 of 3, x uniform on [-1, 1]. The dropped expert never has more than exp(-8) of the softmax gate's weight.
THREE = Mixture.of([[16], [-16], [0]], [-8, -8, 0], [[-2], [3], [1]], [2, -1, 0], [0.3, 0.4, 0.5])
# Two fitted experts share a true one ([D], [S]): its a and nu go with n^(-1/r), its b and b1 with n^(-1/2r), r = 4.
SPLIT = {"D2": -0.5, "a": -0.25, "nu": -0.25, "b": -0.125, "b1": -0.125, "a farthest": -0.25, "a single": -0.5}

Box = tuple[float, float]
Starts = Callable[[int, Generator], list[Mixture]]


def fit_rate(sizes: list[int], error_SR: np.ndarray, draws: int = 1000, seed: int = 0) -> tuple[float, float, float]:
    """Least-squares slope of log(median error) on log(n), and a 95% interval: replications drawn anew for each n.

    nan where a median is 0 or infinite, and for the interval if that happens in any drawing.
    """
    log_n_S = np.log(sizes) - np.mean(np.log(sizes))
    weight_S = log_n_S / (log_n_S**2).sum()

    def slope(errors: np.ndarray) -> np.ndarray:
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.asarray((np.log(np.median(errors, axis=-1)) * weight_S).sum(-1))

    at = np.random.default_rng(seed).integers(0, error_SR.shape[1], (draws, *error_SR.shape))
    slopes = slope(np.take_along_axis(np.broadcast_to(error_SR, at.shape), at, axis=2))
    low, high = np.percentile(slopes, [2.5, 97.5]) if np.isfinite(slopes).all() else (math.nan, math.nan)
    value = float(slope(error_SR))
    return value if math.isfinite(value) else math.nan, float(low), float(high)


@dataclass
class Design:
    """One truth, one fitted gate, and the errors found: a series holds R errors for each size."""

    title: str
    sizes: list[int]
    expected: dict[str, float | None]  # slope; None where no rate is claimed
    series: dict[str, list[list[float]]] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)

    def add(self, name: str, error_R: Tensor) -> None:
        self.series.setdefault(name, []).append(error_R.tolist())


def near(
    truth: Mixture, reps: int, gate: float, expert: float, rng: Generator, of: list[int], tau: float = 0
) -> Mixture:
    """A start: the true experts named in `of`, with normal noise; copies of one expert share its mass."""

    def noisy(part: Tensor, scale: float) -> Tensor:
        return part + scale * torch.randn(reps, *part.shape[1:], dtype=part.dtype, generator=rng)

    shared_E = torch.tensor([math.log(of.count(e)) for e in of], dtype=torch.float64)
    return Mixture(
        noisy(truth.gate_slope_RED[:, of], gate),
        noisy(truth.gate_bias_RE[:, of] - shared_E, gate),
        noisy(truth.slope_RED[:, of], expert),
        noisy(truth.intercept_RE[:, of], expert),
        noisy(truth.log_var_RE[:, of], expert),
        noisy(truth.log_tau_R, tau),
    )


def fits(
    design: Design, truth: Mixture, specs: tuple[GateSpec, GateSpec], box: Box, reps: int, starts: Starts
) -> list[Mixture]:
    """The fitted mixtures for each size: data from the first gate, fitted with the second. Remarks on how it went."""
    runs = []
    for n in design.sizes:
        begin, draw = time.perf_counter(), Generator().manual_seed(n)
        x_RND, y_RN = gm.sample(truth, specs[0], reps, n, *box, draw)
        runs.append(gm.fit(specs[1], starts(n, draw), x_RND, y_RN, limit=600))
        print(f"  {design.title}: n={n} {time.perf_counter() - begin:.1f} s", file=sys.stderr, flush=True)
    steps = max(end.iterations_R.median().item() for _, end in runs)
    rough = sum(int((end.gradient_R > 1e-5).sum()) for _, end in runs)
    design.remarks.append(f"median L-BFGS iterations up to {steps:.0f}; gradient left above 1e-5 in {rough} fits")
    return [fitted for fitted, _ in runs]


def exact(
    title: str, truth: Mixture, spec: GateSpec, box: Box, sizes: list[int], reps: int, starts: Starts
) -> tuple[Design, list[Mixture]]:
    """As many experts fitted as there are: the loss D1, and each parameter's error summed over the experts."""
    expected: dict[str, float | None] = dict.fromkeys(("D1", "a", "b", "nu", "b1", "b0"), -0.5)
    design = Design(title, sizes, expected)
    found = fits(design, truth, (spec, spec), box, reps, starts)
    results = [gm.voronoi(fitted, truth) for fitted in found]
    for result in results:
        for name in expected:
            design.add(name, result.loss_R if name == "D1" else result.error_RJ[name].sum(1))
    design.remarks.append(f"fits that lost a true expert: {sum(int(r.loss_R.isinf().sum()) for r in results)}")
    return design, found


def r1(quick: bool) -> list[Design]:
    """[D], exact-specified setting."""
    reps, sizes = (8, [300, 1000, 3000]) if quick else (40, [300, 1000, 3000, 10_000, 30_000, 100_000])

    def starts(_: int, draw: Generator) -> list[Mixture]:
        return [near(AUTHORS, reps, 0.1, 0.1, draw, [0, 1])]

    return [exact("softmax, 2 of 2", AUTHORS, GateSpec(), (0, 1), sizes, reps, starts)[0]]


def r2(quick: bool) -> list[Design]:
    """[S], exact-specified: K = 1, whose likelihood has no gradient in the gate, and K = 2 of 3, where it has one.

    The likelihood jumps where the choice of experts changes: some fits end at such a jump with a gradient left.
    """
    reps, sizes = (8, [300, 1000, 3000]) if quick else (40, [300, 1000, 3000, 10_000, 30_000])
    designs = []
    for title, factor in (("top-1, authors' start", 1.0), ("top-1, gate started at truth", 0.0)):
        begun: list[Mixture] = []

        def starts(n: int, draw: Generator, factor: float = factor, begun: list[Mixture] = begun) -> list[Mixture]:
            scale = 0.005 * n**-0.083  # the authors'
            begun.append(near(AUTHORS, reps, factor * scale, scale, draw, [0, 1]))
            return begun[-1:]

        design, found = exact(title, AUTHORS, GateSpec(top_k=1), (0, 1), sizes, reps, starts)
        design.expected |= {"b1": None, "b0": None}
        stayed = all(torch.equal(f.gate_slope_RED, m.gate_slope_RED) for f, m in zip(found, begun, strict=True))
        design.remarks.append(f"fitted gate slopes equal the start's, bit by bit, in all replications: {stayed}")
        designs.append(design)

    def starts_of_three(_: int, draw: Generator) -> list[Mixture]:
        return [near(THREE, reps, 0.1, 0.1, draw, [0, 1, 2])]

    return [*designs, exact("top-2 of 3", THREE, GateSpec(top_k=2), (-1, 1), sizes, reps, starts_of_three)[0]]


def r3(quick: bool) -> list[Design]:
    """Three experts fitted to two, best of three starts: softmax gate ([D]), and top-2 fitted to top-1 data ([S]).

    Errors of the shared expert, weighted by exp(b0) but for the farthest. Of the second design expect no rate: where
    the unshared expert rules, top-2 also takes a wrong one, which no finite gate silences.
    """
    reps, sizes = (8, [1000, 3000, 10_000]) if quick else (24, [1000, 3000, 10_000, 30_000, 100_000])
    top, designs = (GateSpec(top_k=1), GateSpec(top_k=2)), []
    for title, specs in (("softmax, 3 for 2", (GateSpec(), GateSpec())), ("top-1 data, top-2 of 3", top)):
        design = Design(title, sizes, dict(SPLIT))

        def starts(_: int, draw: Generator) -> list[Mixture]:
            return [near(AUTHORS, reps, 0.3, 0.3, draw, of) for of in ([0, 1, 1], [0, 0, 1], [0, 1, 1])]

        second, lost = [], 0
        for fitted in fits(design, AUTHORS, specs, (0, 1), reps, starts):
            result = gm.voronoi(fitted, AUTHORS)
            single_RJ = result.size_RJ < result.size_RJ.amax(1, keepdim=True)
            design.add("D2", result.loss_R)
            for name in ("a", "nu", "b", "b1"):
                design.add(name, result.error_RJ[name].masked_fill(single_RJ, 0).sum(1))
            design.add("a farthest", result.farthest_RJ["a"].masked_fill(single_RJ, 0).sum(1))
            design.add("a single", result.error_RJ["a"].masked_fill(~single_RJ, 0).sum(1))
            second.append(int((result.size_RJ[:, 1] == 2).sum()))
            lost += int(result.loss_R.isinf().sum())
        design.remarks.append(f"second expert split, by n: {second} of {reps} replications; infinite D2: {lost}")
        designs.append(design)
    return designs


def r4(quick: bool) -> list[Design]:
    """[A]: tau is estimated too; best of three starts. x is uniform on [-4, 4]: there the sigmoid is not almost linear.

    tau* differs between the gates so that both use a like range of logits. b1 / tau is what the standard gate can know;
    what error its b1 and tau keep is the start's.
    """
    reps, sizes = (8, [500, 1000, 2000]) if quick else (20, [500, 1000, 2000, 4000, 8000, 16_000, 32_000])
    designs, box = [], (-4.0, 4.0)
    grid_RND = torch.linspace(*box, 2001, dtype=torch.float64)[None, :, None].expand(reps, -1, -1)
    for title, sigmoid, true_tau in (("identity (standard)", False, 1.0), ("sigmoid (activation)", True, 0.1)):
        spec = GateSpec(sigmoid=sigmoid, learn_tau=True)
        truth = Mixture.of([[2.5], [-1.5], [0]], [-0.25, 0, 0], [[3], [-3], [3]], [-3, 0, 3], [0.3] * 3, true_tau)
        rate = -0.5 if sigmoid else None
        design = Design(title, sizes, {"b1": rate, "tau": rate, "b1/tau": -0.5, "a + b": -0.5, "gate TV": -0.5})

        def starts(_: int, draw: Generator, truth: Mixture = truth) -> list[Mixture]:
            return [near(truth, reps, 0.3, 0.1, draw, [0, 1, 2], tau=0.3) for _ in range(3)]

        true_REN = gm.gate_log_weights(truth, spec, grid_RND[:1]).exp()
        for fitted in fits(design, truth, (spec, spec), box, reps, starts):
            tau_R, b1_RED = fitted.log_tau_R.exp(), fitted.gate_slope_RED
            if not sigmoid:  # all slopes may move together
                b1_RED = b1_RED - b1_RED[:, -1:]
            design.add("b1", (b1_RED - truth.gate_slope_RED).abs().mean((1, 2)))
            design.add("tau", (tau_R / true_tau - 1).abs())
            design.add("b1/tau", (b1_RED / tau_R[:, None, None] - truth.gate_slope_RED / true_tau).abs().mean((1, 2)))
            a_off_RE, b_off_RE = (fitted.slope_RED - truth.slope_RED)[..., 0], fitted.intercept_RE - truth.intercept_RE
            design.add("a + b", (a_off_RE.abs() + b_off_RE.abs()).mean(1))
            off_REN = (gm.gate_log_weights(fitted, spec, grid_RND).exp() - true_REN).abs()
            design.add("gate TV", 0.5 * off_REN.sum(1).mean(1))
        design.remarks += seen(truth, spec, box, reps, starts)
        designs.append(design)
    return designs


def seen(truth: Mixture, spec: GateSpec, box: Box, reps: int, starts: Starts) -> list[str]:
    """What the likelihood sees: its information on the free parameters, and where three starts for one sample end."""
    draw, n = Generator().manual_seed(0), 2000
    x_RND, y_RN = gm.sample(truth, spec, reps, n, *box, draw)
    free_P = gm.free_parameters(truth, spec).bool()
    information_PP = gm.score_information(truth, spec, x_RND.flatten(0, 1), y_RN.flatten())[free_P][:, free_P]
    least, most = torch.linalg.eigvalsh(information_PP)[[0, -1]].tolist()
    ends = [gm.fit(spec, [start], x_RND, y_RN, limit=600) for start in starts(n, draw)]
    log_tau_SR, value_SR = torch.stack([m.log_tau_R for m, _ in ends]), torch.stack([end.value_R for _, end in ends])
    apart, gap = ((part_SR.amax(0) - part_SR.amin(0)).median().item() for part_SR in (log_tau_SR, value_SR))
    where = f"three starts, n = {n}: they end with log tau {apart:.0e} apart, likelihoods {gap:.0e} (medians)"
    return [f"Fisher information: eigenvalues from {least:.0e} to {most:.0e}", where]


def show(design: Design) -> list[dict[str, Any]]:
    """Print one design's table; the rows as plain data."""
    rows, reps = [], len(next(iter(design.series.values()))[0])
    print(f"\n{design.title}: n = {', '.join(map(str, design.sizes))}; {reps} replications")
    print(f"  {'error of':<10} {'expected':>9} {'slope':>7} {'95% interval':>18}   median error by n")
    for name, error in design.series.items():
        error_SR = np.array(error)
        (slope, low, high), median_S = fit_rate(design.sizes, error_SR), np.median(error_SR, axis=1)
        claim = "none" if (expected := design.expected[name]) is None else f"{expected:.3f}"
        medians = " ".join(f"{value:.2g}" for value in median_S)
        print(f"  {name:<10} {claim:>9} {slope:>7.3f} {f'[{low:.3f}, {high:.3f}]':>18}   {medians}")
        row = {"error": name, "expected": expected, "slope": slope, "interval": [low, high]}
        rows.append({**row, "median": median_S.tolist(), "errors": error})
    print(*(f"  - {remark}" for remark in design.remarks), sep="\n")
    return rows


def draw_plot(designs: list[Design], path: Path) -> None:
    """Median errors against n, one panel for each design, with a dotted line of slope -1/2 to compare."""
    figure, panels = plots.panels(len(designs), height=3.4)
    for panel, (axes, design) in enumerate(zip(panels, designs, strict=True)):
        for index, (name, error) in enumerate(design.series.items()):
            slope = fit_rate(design.sizes, np.array(error), draws=1)[0]
            style: dict[str, Any] = {"marker": plots.MARKERS[index], "markersize": 3, "linewidth": 1}
            axes.loglog(design.sizes, np.median(error, axis=1), **style, label=f"{name} ({slope:.2f})")
        first, ends = np.median(next(iter(design.series.values()))[0]), np.array(design.sizes)[[0, -1]]
        axes.loglog(ends, first * (ends / ends[0]) ** -0.5, "k:", label="slope -0.50")
        axes.set_title(design.title, fontsize=9)
        axes.set_xlabel("n (samples)", fontsize=9)
        plots.whole_decades(axes)
        axes.set_ylabel("" if panel else "median error", fontsize=9)
        # Below the panel: curves fill it, and no corner stays free in all designs.
        axes.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=3)
    plots.save(figure, path)


EXPERIMENTS: dict[str, Callable[[bool], list[Design]]] = {"R1": r1, "R2": r2, "R3": r3, "R4": r4}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experiment", choices=sorted(EXPERIMENTS), required=True)
    parser.add_argument("--quick", action="store_true", help="few replications, small n: a smoke test, no measurement")
    parser.add_argument("--json", type=Path, help="write all errors here as one JSON object")
    parser.add_argument("--plot", type=Path, help="write a PNG here")
    args = parser.parse_args()
    begin = time.perf_counter()
    designs = EXPERIMENTS[args.experiment](args.quick)
    took = round(time.perf_counter() - begin, 1)
    tables = [{"design": d.title, "sizes": d.sizes, "remarks": d.remarks, "rows": show(d)} for d in designs]
    print(f"\n{args.experiment}{' --quick' if args.quick else ''}: {took} s on {torch.get_num_threads()} thread(s)")
    if args.json:
        result = {"experiment": args.experiment, "quick": args.quick, "seconds": took, "designs": tables}
        args.json.write_text(json.dumps({**result, "torch": torch.__version__}) + "\n", encoding="utf-8")
    if args.plot:
        draw_plot(designs, args.plot)


if __name__ == "__main__":
    main()
