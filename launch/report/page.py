"""Puts a run's numbers, curves and pictures into the page template."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from launch.callbacks.console import format_duration
from launch.callbacks.tracker_values import normalized_entropy
from launch.heatmap import color_position, load_ratio
from launch.report.curves import Chart, DrawnChart, Series, draw, format_value
from launch.report.experts import LoadMatrix, layer_histories, load_matrix, scale_gradient, shade_colors
from launch.report.phases import PhaseTimes, phase_times
from launch.report.ranks import rank_card, rank_charts
from launch.report.read_run import Row, RunData, mapping, number, read_run, whole

REPORT_FILE = "report.html"
MAX_SAMPLES = 24
MAX_EVAL_ROWS = 200
TARGET_COMPUTE_SHARE = 0.85


def write_report(run: Path) -> Path:
    """Write ``RUN/report.html``, one page that needs no other file and no network.

    A run that is unfinished, empty or cut short mid-row is reported as far as it came.

    Args:
        run: the run directory.

    Returns:
        The page's path.

    Raises:
        ReportError: ``run`` is no run directory.
    """
    target = run / REPORT_FILE
    page = render(read_run(run))
    partial = target.with_suffix(".partial")
    partial.write_text(page, encoding="utf-8")
    os.replace(partial, target)
    return target


def render(run: RunData) -> str:
    """The page as HTML text; every value from the run is escaped."""
    pages = templates()
    pages.filters["short"] = format_value
    pages.filters["duration"] = format_duration
    matrices = _matrices(run)
    layers = _layers(run, matrices)
    histories, columns = layer_histories(run.timeline.bins, layers) if run.timeline.bins else ([], [])
    tokens_per_step = _tokens_per_step(run)
    phases = phase_times(run.train, tokens_per_step)
    tables = {
        "The run": _flat(dict(mapping(run.start.get("derived")))),
        "The machine": _flat(run.environment),
    }
    return pages.get_template("report/page.html").render(
        style=source(pages, "report/page.css"),
        script=source(pages, "report/page.js"),
        shades=[shade_colors(dark) for dark in (False, True)],
        gradients=[scale_gradient(dark) for dark in (False, True)],
        scale_marks=[(round(float(color_position(r)) * 100, 2), t) for r, t in _SCALE_MARKS],
        name=str(run.start.get("name") or mapping(run.config.get("run")).get("name") or run.path.name),
        folder=run.path.name,
        status=_status(run),
        notes=_notes(run),
        cards=_cards(run, phases, matrices),
        learning=_charts(run, _learning),
        expert_charts=_charts(run, _expert_health),
        ranks=_charts(run, lambda run: rank_charts(run.train)),
        optimisation=_charts(run, _optimisation),
        speed=_charts(run, _speed),
        matrices=matrices,
        histories=histories,
        columns=columns,
        phases=phases,
        target_share=TARGET_COMPUTE_SHARE,
        samples=[
            {key: str(row.get(key, "")) for key in ("step", "prompt", "text")}
            for row in _spread(run.samples, MAX_SAMPLES)
        ],
        num_samples=len(run.samples),
        evals=[_eval_view(row) for row in _spread(run.evals, MAX_EVAL_ROWS)],
        num_evals=len(run.evals),
        config_text=run.config_text,
        command=run.command,
        tables={title: rows for title, rows in tables.items() if rows},
    )


def templates() -> Environment:
    """The page templates of this package, which escape every value that they show."""
    loader = PackageLoader("launch", "")
    return Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, loader=loader)


def source(pages: Environment, name: str) -> Markup:
    """A file of the package as it is: styles and scripts."""
    assert pages.loader is not None
    return Markup(pages.loader.get_source(pages, name)[0])


_SCALE_MARKS = ((0.0, "0"), (0.5, "½"), (1.0, "mean"), (2.0, "2×"), (4.0, "≥ 4×"))


# --- the top of the page ---------------------------------------------------------------------------------------------


def _status(run: RunData) -> tuple[str, str]:
    """(good | warn, text) of the badge."""
    if run.evals and run.evals[-1].get("final"):
        return "good", f"finished: {run.last_step:,} steps"
    if not run.train and not run.evals:
        return "warn", "no steps recorded"
    of = f" of {run.steps:,}" if run.steps else ""
    return "warn", f"unfinished: step {run.last_step:,}{of}, no final evaluation"


def _notes(run: RunData) -> list[str]:
    """What a reader should know before trusting the page: what is missing, cut or resumed."""
    notes = []
    if not run.start and not run.train:
        notes.append("metrics.jsonl has no rows yet: the run has not begun, or it ended before its first log line.")
    elif not run.train:
        notes.append(
            "There is no training row yet: curves, expert loads and phase times appear after the first log interval."
        )
    if run.train and not run.evals:
        notes.append("No evaluation has been done yet, so there are no bits per byte.")
    if run.train and not run.timeline.bins:
        notes.append("No expert loads are recorded: the model has no MoE layers.")
    resumes = [begin for begin in run.starts if begin]
    if resumes:
        notes.append("Resumed at step " + ", ".join(f"{begin:,}" for begin in resumes[-10:]) + ".")
    if run.broken_rows:
        rows = "row" if run.broken_rows == 1 else "rows"
        notes.append(f"{run.broken_rows} unreadable {rows} of metrics.jsonl left out (a kill can cut the last one).")
    if not run.config_text:
        notes.append("config.yaml is missing.")
    return notes


def _cards(run: RunData, phases: PhaseTimes | None, matrices: list[LoadMatrix]) -> list[tuple[str, str, str]]:
    """(label, value, detail) of the summary cards; what is not known is left out."""
    cards = []
    scored = [row for row in run.evals if math.isfinite(number(row.get("bits_per_byte")))]
    if scored:
        last = scored[-1]
        best = min(number(row["bits_per_byte"]) for row in scored)
        what = "final validation" if last.get("final") else f"validation at step {whole(last.get('step')):,}"
        cards.append(("Bits per byte", f"{number(last['bits_per_byte']):.3f}", f"{what}; best {best:.3f}"))
    derived = mapping(run.start.get("derived"))
    counts = re.findall(r"\d[\d,]*", str(derived.get("parameters", "")))
    if counts:
        total, active = (int(text.replace(",", "")) for text in (counts[0], counts[min(1, len(counts) - 1)]))
        share = f" ({active / total:.0%})" if total else ""
        cards.append(("Parameters", _count(total), f"{_count(active)} active per token{share}"))
    model, gate = mapping(run.config.get("model")), mapping(run.config.get("gate"))
    experts = whole(run.start.get("num_experts")) or whole(mapping(model.get("moe")).get("num_experts"))
    layers = run.start.get("moe_layers")
    if experts:
        detail = f"in each of {len(layers)} MoE layers" if isinstance(layers, list) else ""
        cards.append(("Experts", f"{experts:,}", detail))
    if gate.get("name"):
        options = ", ".join(f"{k}={gate[k]}" for k in ("k", "capacity_factor") if gate.get(k) is not None)
        cards.append(("Gate", str(gate["name"]), options))
    if run.train:
        last = run.train[-1]
        seen, elapsed = number(last.get("tokens_seen")), number(last.get("elapsed_s"))
        if math.isfinite(seen):
            cards.append(("Tokens", _count(int(seen)), f"{whole(last['step']):,} steps of {_tokens_per_step(run):,}"))
        if math.isfinite(elapsed):
            world = whole(run.start.get("world_size")) or 1
            cards.append(("Time", format_duration(elapsed), f"on {world} rank{'s' if world > 1 else ''}"))
    if phases:
        rate = phases.steps * _tokens_per_step(run) / phases.wall_s
        cards.append(("Tokens per second", f"{rate:,.0f}", "average, all ranks, evaluations included"))
        cards.append(("Model work", f"{phases.compute_share:.1%}", "of wall time in forward, backward, optimizer"))
    if matrices:
        ratio = load_ratio([[int(n) for n in row] for row in run.timeline.bins[-1].load_LE])
        detail = "max / mean load in training, last interval; 1 is even"
        cards.append(("Imbalance", f"{ratio.max(axis=1).mean():.2f}", detail))
    of_ranks = rank_card(run.train)
    if of_ranks:
        cards.append(of_ranks)
    return cards


def _count(value: int) -> str:
    """Three digits and a unit: ``2345678`` -> ``2.35 M``."""
    for bound, unit in ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "k")):
        if value >= bound:
            return f"{value / bound:.3g} {unit}"
    return str(value)


# --- curves ----------------------------------------------------------------------------------------------------------


def _charts(run: RunData, make: Callable[[RunData], list[Chart]]) -> list[DrawnChart]:
    drawn = [draw(chart, run.last_step) for chart in make(run)]
    return [chart for chart in drawn if chart is not None]


def _learning(run: RunData) -> list[Chart]:
    return [
        Chart(
            "Loss",
            "nats per token",
            [_train(run, "loss", "training"), _eval(run, "loss", "validation")],
        ),
        Chart("Bits per byte", "validation", [_eval(run, "bits_per_byte", "validation")]),
    ]


def _expert_health(run: RunData) -> list[Chart]:
    steps = [b.last_step for b in run.timeline.bins]
    worst = [load_ratio(b.load_LE).max(axis=1) for b in run.timeline.bins]
    edges = [
        Series("least of the layers", steps, [float(w.min()) for w in worst], "band-low"),
        Series("most of the layers", steps, [float(w.max()) for w in worst], "band-high"),
    ]
    entropy = [normalized_entropy([[int(n) for n in row] for row in b.load_LE]) for b in run.timeline.bins]
    return [
        Chart(
            "Imbalance",
            "max / mean load",
            [_train(run, "imbalance", "mean of the layers"), *(edges if worst and len(worst[0]) > 1 else [])],
            note="1 is even; the band spans the layers",
            floor=1.0,
        ),
        Chart(
            "Load entropy",
            "share of log E",
            [Series("mean of the layers", steps, entropy)],
            note="1 is even",
            floor=0.9,
        ),
        Chart(
            "Dead and dropped",
            "per cent",
            [
                _train(run, "dead_expert_fraction", "dead", 100),
                _train(run, "dropped_fraction", "dropped", 100),
            ],
            note="experts without a token; pairs over capacity",
            from_zero=True,
        ),
    ]


def _optimisation(run: RunData) -> list[Chart]:
    names = sorted({name for row in run.train for name in mapping(row.get("aux"))})
    gate_names = sorted({name for row in run.train for name in mapping(row.get("gate"))})
    gate_series = [_nested(run, "gate", name) for name in gate_names]
    changing = [series for series in gate_series if len({v for v in series.values if math.isfinite(v)}) > 1]
    return [
        Chart("Learning rate", "", [_train(run, "lr", "learning rate")], from_zero=True),
        Chart("Gradient norm", "before clipping", [_train(run, "grad_norm", "gradient norm")], log=True),
        *(Chart(f"Auxiliary loss: {name}", "unweighted", [_nested(run, "aux", name)], log=True) for name in names[:8]),
        *(Chart(f"Gate: {series.name}", "mean of the layers", [series]) for series in changing[:8]),
    ]


def _speed(run: RunData) -> list[Chart]:
    return [
        Chart("Throughput", "tokens per second", [_train(run, "tokens_per_s", "tokens per second")], from_zero=True),
        Chart("Memory", "GiB, peak of rank 0", [_train(run, "memory_gib", "memory")], from_zero=True),
    ]


def _train(run: RunData, key: str, name: str, factor: float = 1.0) -> Series:
    return Series(name, [r["step"] for r in run.train], [factor * number(r.get(key)) for r in run.train])


def _eval(run: RunData, key: str, name: str) -> Series:
    return Series(name, [whole(r.get("step")) for r in run.evals], [number(r.get(key)) for r in run.evals], "marks")


def _nested(run: RunData, group: str, name: str) -> Series:
    values = [number(mapping(r.get(group)).get(name)) for r in run.train]
    return Series(name, [r["step"] for r in run.train], values)


# --- the rest --------------------------------------------------------------------------------------------------------


def _layers(run: RunData, matrices: Sequence[LoadMatrix]) -> list[int]:
    return list(matrices[0].layers) if matrices else []


def _matrices(run: RunData) -> list[LoadMatrix]:
    """Training loads of the last tenth of the steps, and those of the last evaluation."""
    if not run.timeline.bins:
        return []
    shape = run.timeline.bins[0].load_LE.shape
    named = run.start.get("moe_layers")
    layers = [whole(n) for n in named] if isinstance(named, list) and len(named) == shape[0] else list(range(shape[0]))
    late = [b for b in run.timeline.bins if b.last_step > 0.9 * run.last_step] or run.timeline.bins[-1:]
    title = f"Training, steps {late[0].first_step + 1:,} to {late[-1].last_step:,}"
    matrices = [load_matrix(title, sum(b.load_LE for b in late), layers)]
    for row in reversed(run.evals):
        loads = row.get("load_LE")
        if isinstance(loads, list) and [len(r) for r in loads if isinstance(r, list)] == [shape[1]] * shape[0]:
            matrices.append(load_matrix(f"Validation, step {whole(row.get('step')):,}", loads, layers))
            break
    return matrices


def _eval_view(row: Row) -> dict[str, Any]:
    loads = row.get("load_LE")
    ratio = load_ratio(loads).max(axis=1).mean() if isinstance(loads, list) and loads else math.nan
    return {
        "step": whole(row.get("step")),
        "bits_per_byte": number(row.get("bits_per_byte")),
        "loss": number(row.get("loss")),
        "tokens": whole(row.get("tokens")),
        "text_bytes": whole(row.get("text_bytes")),
        "elapsed_s": number(row.get("elapsed_s")),
        "imbalance": float(ratio),
        "final": bool(row.get("final")),
    }


def _tokens_per_step(run: RunData) -> int:
    stated = whole(run.start.get("tokens_per_step"))
    if stated or not run.train:
        return stated
    last = run.train[-1]
    return whole(last.get("tokens_seen")) // max(1, whole(last["step"]))


def _spread(rows: Sequence[Row], most: int) -> list[Row]:
    """At most ``most`` rows, evenly spaced, the first and the last among them."""
    if len(rows) <= most:
        return list(rows)
    return [rows[round(i * (len(rows) - 1) / (most - 1))] for i in range(most)]


def _flat(value: Row, prefix: str = "") -> dict[str, object]:
    """Nested mapping as one level of ``a b: value``."""
    flat: dict[str, object] = {}
    for key, inner in value.items():
        name = f"{prefix} {key}".strip()
        flat |= _flat(inner, name) if isinstance(inner, dict) else {name: inner}
    return flat
