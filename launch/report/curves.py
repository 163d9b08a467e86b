"""Line charts as inline SVG: scaling, ticks, thinning and paths. The page stretches the SVG; labels are HTML."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

MAX_POINTS = 2000
"""Points of one drawn curve."""

WIDTH, HEIGHT = 1000.0, 400.0


@dataclass(frozen=True)
class Series:
    """One curve; points with a y that is not finite are gaps."""

    name: str
    steps: Sequence[int]
    values: Sequence[float]
    style: str = "line"
    """line | marks (few points, each visible) | band-low, band-high (edges of a shaded band, drawn without line)"""


@dataclass(frozen=True)
class Chart:
    """One picture with an x axis in steps.

    Attributes:
        from_zero: the y axis begins at 0.
        floor: the y axis begins no higher than this.
    """

    title: str
    unit: str
    series: Sequence[Series]
    note: str = ""
    from_zero: bool = False
    floor: float | None = None
    log: bool = False


@dataclass(frozen=True)
class DrawnSeries:
    name: str
    style: str
    path: str
    marks: list[tuple[float, float]]
    last: str


@dataclass(frozen=True)
class DrawnChart:
    """What the template needs; positions are per cent of the plot from the left and from the top."""

    title: str
    unit: str
    note: str
    summary: str
    y_ticks: list[tuple[float, str]]
    x_ticks: list[tuple[float, str]]
    series: list[DrawnSeries]
    band: str
    data: Markup


def draw(chart: Chart, last_step: int) -> DrawnChart | None:
    """Scale and thin a chart; None when it has no finite point.

    Args:
        last_step: right end of the x axis, the same for all charts of a page.
    """
    thin = [Series(s.name, *downsample(s.steps, s.values), s.style) for s in chart.series]
    finite = [y for s in thin for y in s.values if math.isfinite(y) and (not chart.log or y > 0)]
    if not finite:
        return None
    lines = [s for s in thin if not s.style.startswith("band")]
    log = chart.log and max(finite) > 20 * min(finite)
    ticks = _log_ticks(min(finite), max(finite)) if log else _linear_ticks(chart, finite)
    low, high = (math.log10(ticks[0]), math.log10(ticks[-1])) if log else (ticks[0], ticks[-1])
    span_x = max(1, last_step)

    def place(step: int, value: float) -> tuple[float, float]:
        scaled = math.log10(value) if log else value
        return step / span_x * WIDTH, HEIGHT - (scaled - low) / (high - low) * HEIGHT

    def path(series: Series) -> str:
        parts, pen_down = [], False
        for step, value in zip(series.steps, series.values, strict=True):
            if not math.isfinite(value) or (log and value <= 0):
                pen_down = False
                continue
            x, y = place(step, value)
            parts.append(f"{'L' if pen_down else 'M'}{x:.1f} {y:.1f}")
            pen_down = True
        return "".join(parts)

    drawn = []
    for series in lines:
        points = [(s, v) for s, v in zip(series.steps, series.values, strict=True) if math.isfinite(v)]
        visible = len(points) <= 60 and (series.style == "marks" or len(points) == 1)
        marks = [place(s, v) for s, v in points if visible and not (log and v <= 0)]
        last = format_value(points[-1][1]) if points else "none"
        percent = [(round(x / WIDTH * 100, 2), round(y / HEIGHT * 100, 2)) for x, y in marks]
        drawn.append(DrawnSeries(series.name, series.style, path(series), percent, last))
    return DrawnChart(
        title=chart.title,
        unit=chart.unit,
        note=chart.note,
        summary=_summary(chart, lines),
        y_ticks=[(round(place(0, tick)[1] / HEIGHT * 100, 2), format_value(tick)) for tick in ticks],
        x_ticks=[(round(tick / span_x * 100, 2), f"{tick:,}" if tick else "step 0") for tick in _step_ticks(span_x)],
        series=drawn,
        band=_band(thin, place),
        data=_data(thin, span_x, log, low, high),
    )


def downsample(steps: Sequence[int], values: Sequence[float], limit: int = MAX_POINTS) -> tuple[list[int], list[float]]:
    """At most ``limit`` points; of each bucket its lowest and highest stay, so that no peak is lost.

    The first and the last point always stay. Buckets without a finite value keep one gap.
    """
    count = len(steps)
    if count <= limit:
        return list(steps), list(values)
    buckets = (limit - 2) // 2
    keep = {0, count - 1}
    for bucket in range(buckets):
        begin, end = 1 + (count - 2) * bucket // buckets, 1 + (count - 2) * (bucket + 1) // buckets
        places = [i for i in range(begin, end) if math.isfinite(values[i])]
        if places:
            keep |= {min(places, key=lambda i: values[i]), max(places, key=lambda i: values[i])}
        elif end > begin:
            keep.add(begin)
    order = sorted(keep)
    return [steps[i] for i in order], [values[i] for i in order]


def format_value(value: float) -> str:
    """Short number: ``0.0012`` -> ``1.2e-3``, ``12345`` -> ``12.3k``, ``1.875`` -> ``1.875``."""
    if not math.isfinite(value):
        return str(value)
    size = abs(value)
    for bound, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= bound:
            return f"{value / (1e3 if unit == 'k' else bound):.4g}{unit}"
    if size >= 1000:
        return f"{value:,.0f}"
    if 0 < size < 0.001:
        mantissa, _, exponent = f"{value:.1e}".partition("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    return f"{value:.4g}"


def _summary(chart: Chart, lines: Sequence[Series]) -> str:
    """The chart in words, for those who cannot see it."""
    parts = []
    for series in lines:
        points = [(s, v) for s, v in zip(series.steps, series.values, strict=True) if math.isfinite(v)]
        if points:
            values = [v for _, v in points]
            parts.append(
                f"{series.name} from {format_value(values[0])} at step {points[0][0]:,} to {format_value(values[-1])}"
                f" at step {points[-1][0]:,}, lowest {format_value(min(values))}, highest {format_value(max(values))}"
            )
    return f"{chart.title}{f' in {chart.unit}' if chart.unit else ''}: " + "; ".join(parts)


def _band(series: Sequence[Series], place: Callable[[int, float], tuple[float, float]]) -> str:
    """Closed path between the two band edges, empty when there is no band."""
    low = next((s for s in series if s.style == "band-low"), None)
    high = next((s for s in series if s.style == "band-high"), None)
    if low is None or high is None:
        return ""
    edges = []
    for edge in (list(zip(high.steps, high.values, strict=True)), list(zip(low.steps, low.values, strict=True))[::-1]):
        edges += [place(step, value) for step, value in edge if math.isfinite(value)]
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in edges) + "Z" if len(edges) > 2 else ""


def _data(series: Sequence[Series], span_x: int, log: bool, low: float, high: float) -> Markup:
    """The numbers for hovering, as JSON that is safe inside a script element."""
    value = {
        "x": span_x,
        "log": log,
        "low": low,
        "high": high,
        "series": [
            {
                "name": s.name,
                "style": s.style,
                "steps": list(s.steps),
                "values": [float(f"{v:.6g}") if math.isfinite(v) else None for v in s.values],
            }
            for s in series
        ],
    }
    text = json.dumps(value, separators=(",", ":"))
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def _linear_ticks(chart: Chart, finite: Sequence[float]) -> list[float]:
    low, high = min(finite), max(finite)
    if chart.from_zero:
        low = min(0.0, low)
    if chart.floor is not None:
        low = min(chart.floor, low)
    if high <= low:
        high = low + (abs(low) * 0.1 or 1.0)
    stride = _nice((high - low) / 4)
    first, last = math.floor(low / stride + 1e-9), math.ceil(high / stride - 1e-9)
    return [round(i * stride, 12) for i in range(first, last + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    stride = max(1, math.ceil((last - first) / 6))
    return [10.0**power for power in range(first, last + stride, stride)]


def _step_ticks(last: int) -> list[int]:
    stride = max(1, int(_nice(last / 5)))
    return list(range(0, last + 1, stride))


def _nice(rough: float) -> float:
    """The first of 1, 2, 2.5, 5, 10 times a power of ten that is at least ``rough``."""
    power = 10.0 ** math.floor(math.log10(rough))
    return next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * (1 - 1e-9))
