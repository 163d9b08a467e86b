"""What the pictures of the gate experiments share: size, colours, and small files.

The ground is white and opaque, with dark text: so a picture reads the same in a light and in a dark page. Colours are
those of Okabe and Ito (2008), which colour-blind readers tell apart, without the yellow that vanishes on white.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000", "#8c6d31", "#7f7f7f"]
MARKERS = ["o", "s", "^", "D", "v", "P", "X", "<", ">"]
WIDTH, HEIGHT, DPI = 3.8, 3.0, 90  # inches of one panel, and dots per inch


def panels(count: int, height: float = HEIGHT, width: float = WIDTH, share_y: bool = False) -> tuple[Any, list[Any]]:
    """A figure of ``count`` panels side by side, and their axes; sizes are inches of one panel."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * count, height), layout="constrained", facecolor="white")
    axes = list(figure.subplots(1, count, squeeze=False, sharey=share_y)[0])
    for one in axes:
        one.set_facecolor("white")
        one.set_prop_cycle(color=COLOURS)
        one.grid(True, color="#d9d9d9", linewidth=0.6)
        one.set_axisbelow(True)
        one.tick_params(which="both", labelsize=8)
        one.spines[["top", "right"]].set_visible(False)
    return figure, axes


def dots(axes: Any, values: Mapping[str, Sequence[float]], label: str, row: float = 0.0, colour: int = 0) -> None:
    """One line of dots for each name, a dot per seed and a bar at their mean; the first name on top.

    Args:
        label: what the dots are, for the legend.
        row: how far below its name's line the dots stand, in lines: tells two series of the same names apart.
        colour: index of colour and marker.
    """
    for line, own in enumerate(values.values()):
        style = {"color": COLOURS[colour], "label": label if line == 0 else None}
        axes.plot(own, [line + row] * len(own), MARKERS[colour], markersize=4, alpha=0.6, markeredgewidth=0, **style)
        if own:
            axes.plot([sum(own) / len(own)], [line + row], "|", markersize=10, color=COLOURS[colour])
    axes.set_yticks(range(len(values)), list(values))
    axes.set_ylim(len(values) - 0.5, -0.5)


def whole_decades(axes: Any) -> None:
    """Let a logarithmic x axis span whole powers of ten, and label these alone: what lies between would overlap."""
    from matplotlib.ticker import NullFormatter

    low, high = (math.log10(end) for end in axes.get_xlim())
    axes.set_xlim(10.0 ** math.floor(low), 10.0 ** math.ceil(high))
    axes.xaxis.set_minor_formatter(NullFormatter())


def save(figure: Any, path: Path) -> None:
    """Write a PNG of a limited palette: some 10 to 40 kB, fit for a repository."""
    from PIL import Image

    figure.savefig(path, dpi=DPI, format="png")
    with Image.open(path) as drawn:
        few = drawn.convert("RGB").quantize(64)
    few.save(path, format="PNG", optimize=True)
