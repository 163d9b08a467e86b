"""Expert load as a picture: layers down, experts across, colour says how far a load is from its layer's mean.

One fixed colour scale everywhere (pictures, TensorBoard, report), so that two pictures can be compared by eye: 1.0 is
the mean and neutral, below is blue, above is orange, full colour at 0 and at 4 times the mean.

Names: L MoE layers, E experts. Ratios are load / mean load of the layer.
"""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

FULL_RATIO = 4.0
"""Ratio at which the upper end of the colour scale is reached."""

MAX_ANNOTATED_CELLS = 128
"""Cells of larger matrices carry no number."""

DPI = 110

# Anchors (position, lightness, chroma, hue in degrees) in OKLCh; lightness is linear on both sides of the middle, so
# that equal steps look equal. https://bottosson.github.io/posts/oklab/
_LIGHT_ANCHORS = (
    (0.0, 0.36, 0.125, 262.0),
    (0.5, 0.975, 0.004, 262.0),
    (0.5, 0.975, 0.004, 55.0),
    (1.0, 0.49, 0.155, 38.0),
)
_DARK_ANCHORS = (
    (0.0, 0.74, 0.135, 250.0),
    (0.5, 0.285, 0.012, 262.0),
    (0.5, 0.285, 0.012, 55.0),
    (1.0, 0.78, 0.150, 60.0),
)


def load_ratio(load_LE: ArrayLike) -> NDArray[np.float64]:
    """Load / mean load of each row, (L, E) or (E,); a row without any load is all ones.

    Args:
        load_LE: tokens per expert, counts >= 0.
    """
    load = np.asarray(load_LE, dtype=np.float64)
    mean = load.mean(axis=-1, keepdims=True)
    return np.divide(load, mean, out=np.ones_like(load), where=mean > 0)


def color_position(ratio: ArrayLike) -> NDArray[np.float64]:
    """Place of a ratio on the colour scale, 0 to 1: linear from 0 at ratio 0 to 0.5 at the mean, then logarithmic
    to 1 at :data:`FULL_RATIO` and above."""
    values = np.asarray(ratio, dtype=np.float64)
    above = 0.5 + 0.5 * np.log(np.maximum(values, 1.0)) / np.log(FULL_RATIO)
    return np.clip(np.where(values < 1.0, 0.5 * values, above), 0.0, 1.0)


def ratio_at(position: ArrayLike) -> NDArray[np.float64]:
    """Inverse of :func:`color_position` for positions 0 to 1."""
    places = np.asarray(position, dtype=np.float64)
    return np.where(places < 0.5, 2.0 * places, FULL_RATIO ** np.maximum(2.0 * places - 1.0, 0.0))


def palette(size: int = 256, *, dark: bool = False) -> NDArray[np.uint8]:
    """The colour scale as (size, 3) sRGB bytes, for a light or a dark page."""
    anchors = np.array(_DARK_ANCHORS if dark else _LIGHT_ANCHORS)
    places = np.linspace(0.0, 1.0, size)
    lower = places <= 0.5
    lab = np.empty((size, 3))
    for part, (first, second) in ((lower, anchors[:2]), (~lower, anchors[2:])):
        share = ((places[part] - first[0]) / (second[0] - first[0]))[:, None]
        lightness_chroma = first[1:3] + share * (second[1:3] - first[1:3])
        hue = np.deg2rad(first[3] + share[:, 0] * (second[3] - first[3]))
        lab[part, 0] = lightness_chroma[:, 0]
        lab[part, 1] = lightness_chroma[:, 1] * np.cos(hue)
        lab[part, 2] = lightness_chroma[:, 1] * np.sin(hue)
    return _oklab_to_srgb(lab)


def _oklab_to_srgb(lab: NDArray[np.float64]) -> NDArray[np.uint8]:
    lms = (
        lab
        @ np.array(
            [
                [1.0, 1.0, 1.0],
                [0.3963377774, -0.1055613458, -0.0894841775],
                [0.2158037573, -0.0638541728, -1.2914855480],
            ]
        )
    ) ** 3
    linear = lms @ np.array(
        [
            [4.0767416621, -1.2684380046, -0.0041960863],
            [-3.3077115913, 2.6097574011, -0.7034186147],
            [0.2309699292, -0.3413193965, 1.7076147010],
        ]
    )
    linear = np.clip(linear, 0.0, 1.0)
    srgb = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return np.round(srgb * 255).astype(np.uint8)


def draw_load_heatmap(load_LE: ArrayLike, *, title: str, layers: Sequence[int] | None = None) -> bytes:
    """The picture as PNG bytes, under 60 kB.

    Thread-safe: it uses no pyplot and no other global state of matplotlib.

    Args:
        load_LE: tokens per expert, (L, E), L and E at least 1.
        title: what the loads are and when they were counted; imbalance and dead experts are written below it.
        layers: block index of each row; default 0..L-1.

    Raises:
        ValueError: load_LE is no such matrix.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure
    from PIL import Image

    counts_LE = np.asarray(load_LE)
    if counts_LE.ndim != 2 or 0 in counts_LE.shape:
        raise ValueError(f"load_LE must be a matrix of layers x experts, not of shape {counts_LE.shape}")
    ratio_LE = load_ratio(counts_LE)
    num_layers, num_experts = ratio_LE.shape
    rows = list(range(num_layers)) if layers is None else list(layers)
    colors = palette() / 255.0

    annotate = num_layers * num_experts <= MAX_ANNOTATED_CELLS
    cell_width = _cell(max(9.0 / num_experts, 0.14), 0.82) if annotate else _cell(9.0 / num_experts, 0.2)
    grid_width = max(4.4, cell_width * num_experts)
    cell_height = _cell(5.2 / num_layers, 0.5 if annotate else 0.26)
    grid_height = max(1.0, cell_height * num_layers)
    left, right, top, bottom = 0.72, 1.02, 0.86, 0.62
    width, height = grid_width + left + right, grid_height + top + bottom
    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_axes((left / width, bottom / height, grid_width / width, grid_height / height))
    ink, faint = "#1d2129", "#667080"

    axes.imshow(
        color_position(ratio_LE),
        cmap=ListedColormap(colors),
        vmin=0.0,
        vmax=1.0,
        aspect="auto",
        interpolation="nearest",
    )
    if cell_width > 0.12:
        line = 1.6 if cell_width > 0.3 else 0.6
        axes.vlines(np.arange(0.5, num_experts - 1), -0.5, num_layers - 0.5, colors="white", linewidths=line)
        axes.hlines(np.arange(0.5, num_layers - 1), -0.5, num_experts - 0.5, colors="white", linewidths=line)
    axes.tick_params(which="both", length=0, labelsize=9, labelcolor=faint, pad=5)
    for spine in axes.spines.values():
        spine.set_visible(not annotate)
        spine.set_color("#d4d9e0")
    axes.set_xticks(_ticks(num_experts, 16 if num_experts <= 16 else 9))
    places = _ticks(num_layers, max(2, int(grid_height / 0.2)))
    axes.set_yticks(places, [str(rows[place]) for place in places])
    axes.set_xlabel("expert", fontsize=10, color=faint, labelpad=6)
    axes.set_ylabel("layer", fontsize=10, color=faint, labelpad=6)

    dead = counts_LE == 0
    if annotate:
        upright = cell_width >= 0.34
        size = float(np.clip(cell_width * 15, 6.0, 10.0)) if upright else 6.5
        luminance = colors[np.round(color_position(ratio_LE) * 255).astype(int)] @ np.array([0.2126, 0.7152, 0.0722])
        for (row, column), value in np.ndenumerate(ratio_LE):
            text = "dead" if dead[row, column] else f"{value:.2f}" if value < 9.95 else f"{value:.0f}"
            color = ink if luminance[row, column] > 0.5 else "white"
            rotation = 0 if upright else 90
            axes.text(column, row, text, ha="center", va="center", fontsize=size, color=color, rotation=rotation)
    elif dead.any():
        y, x = np.nonzero(dead)
        axes.scatter(x, y, s=(cell_width * 72 * 0.42) ** 2, marker="x", c="white", linewidths=max(0.4, cell_width * 5))

    imbalance = float(ratio_LE.max(axis=1).mean())
    worst = int(ratio_LE.max(axis=1).argmax())
    dead_count = int(dead.sum())
    summary = f"imbalance (max / mean) {imbalance:.2f}"
    if num_layers > 1:
        summary += f", worst {ratio_LE[worst].max():.2f} in layer {rows[worst]}"
    summary += f"  ·  {dead_count} of {dead.size} experts dead" if dead_count else "  ·  no dead experts"
    figure.text(left / width, 1 - 0.34 / height, title, fontsize=12.5, weight="bold", color=ink, va="center")
    figure.text(left / width, 1 - 0.62 / height, summary, fontsize=9.5, color=faint, va="center")

    bar_height = min(grid_height, 2.6)
    bar = figure.add_axes(
        (
            (left + grid_width + 0.2) / width,
            (bottom + (grid_height - bar_height) / 2) / height,
            0.14 / width,
            bar_height / height,
        )
    )
    bar.imshow(
        np.linspace(0, 1, 256)[:, None], cmap=ListedColormap(colors), aspect="auto", origin="lower", extent=(0, 1, 0, 1)
    )
    marks = [0.0, 0.5, 1.0, 2.0, FULL_RATIO] if bar_height >= 1.0 else [0.0, 1.0, FULL_RATIO]
    names = {0.0: "0", 0.5: "½", 1.0: "1  mean", 2.0: "2", FULL_RATIO: f"≥ {FULL_RATIO:g}"}
    bar.set_yticks(color_position(marks), [names[mark] for mark in marks])
    bar.set_xticks([])
    bar.yaxis.tick_right()
    bar.axhline(0.5, color=ink, linewidth=0.9)
    bar.tick_params(length=0, labelsize=8.5, labelcolor=faint, pad=4)
    for spine in bar.spines.values():
        spine.set_color("#d4d9e0")

    canvas.draw()
    picture = Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3])
    buffer = io.BytesIO()
    # 256 fixed colours, the scale and greys for the text, take a quarter of the bytes and show no difference.
    greys = np.append(np.linspace(0, 238, 55), 255).astype(np.uint8)  # none near white, or white would be rounded to it
    few = Image.new("P", (1, 1))
    few.putpalette(np.concatenate([palette(200), greys[:, None].repeat(3, 1)]).tobytes())
    picture.quantize(palette=few, dither=Image.Dither.NONE).save(buffer, "png", compress_level=9)
    return buffer.getvalue()


def _cell(wanted: float, most: float) -> float:
    """Inches of a cell's side: whole pixels, so that all cells of a large matrix are equal."""
    return max(2, int(min(wanted, most) * DPI)) / DPI


def _ticks(count: int, most: int) -> list[int]:
    """Round places 0..count-1, at most about ``most`` of them."""
    if count <= most:
        return list(range(count))
    stride = next(
        s for base in (1, 10, 100, 1000) for s in (base, 2 * base, 4 * base, 5 * base, 8 * base) if count / s <= most
    )
    return list(range(0, count, stride))
