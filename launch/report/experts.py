"""Expert loads for the page: a table or picture of layers x experts, and for each layer experts x time.

Pictures are indexed PNGs with one pixel a cell that the page enlarges; the same pixels with another palette serve dark
pages. Names: L MoE layers, E experts, C columns (moments in time).
"""

from __future__ import annotations

import base64
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from launch.heatmap import color_position, load_ratio, palette
from launch.report.read_run import LoadBin

SHADES = 64
"""Colour classes of table cells."""

MAX_TABLE_EXPERTS = 32
MAX_TABLE_CELLS = 768
MAX_PIXELS = 600_000
"""Bound on all cells over time of one page; longer histories get fewer columns."""


@dataclass(frozen=True)
class Cell:
    text: str
    shade: int
    title: str


@dataclass(frozen=True)
class Picture:
    """An image with its numbers: ``positions`` is base64 of one byte a cell, the place on the colour scale."""

    light: str
    dark: str
    positions: str
    rows: int
    columns: int
    alt: str


@dataclass(frozen=True)
class LoadMatrix:
    """Layers x experts: as a table of numbers when small, else as a picture."""

    title: str
    summary: str
    layers: Sequence[int]
    num_experts: int
    table: list[list[Cell]] | None
    picture: Picture | None


@dataclass(frozen=True)
class LayerHistory:
    """Experts x time of one layer; columns are named by the steps that they begin and end with."""

    layer: int
    picture: Picture
    last_imbalance: float
    dead_now: int


def load_matrix(title: str, load_LE: ArrayLike, layers: Sequence[int]) -> LoadMatrix:
    """A view of one load matrix.

    Args:
        load_LE: tokens per expert, (L, E).
        layers: block index of each row.
    """
    load = np.asarray(load_LE, dtype=np.int64)
    ratio_LE = load_ratio(load)
    num_layers, num_experts = load.shape
    small = num_experts <= MAX_TABLE_EXPERTS and load.size <= MAX_TABLE_CELLS
    table = None
    if small:
        shades = np.round(color_position(ratio_LE) * (SHADES - 1)).astype(int)
        table = [
            [
                Cell(
                    f"{ratio_LE[row, expert]:.2f}" if load[row, expert] else "dead",
                    int(shades[row, expert]),
                    f"layer {layers[row]}, expert {expert}: {load[row, expert]:,} tokens",
                )
                for expert in range(num_experts)
            ]
            for row in range(num_layers)
        ]
    worst_L = ratio_LE.max(axis=1)
    dead = int((load == 0).sum())
    summary = (
        f"imbalance (max / mean) {worst_L.mean():.2f}, worst {worst_L.max():.2f} in layer"
        f" {layers[int(worst_L.argmax())]}; {dead:,} of {load.size:,} experts dead"
    )
    picture = None if small else _picture(ratio_LE, f"{title}, layers by experts: {summary}")
    return LoadMatrix(title, summary, layers, num_experts, table, picture)


def layer_histories(bins: Sequence[LoadBin], layers: Sequence[int]) -> tuple[list[LayerHistory], list[tuple[int, int]]]:
    """One picture a layer, and the (first, last) steps of their common columns. Needs at least one bin."""
    cells = bins[0].load_LE.size
    most = max(8, MAX_PIXELS // cells)
    stride = -(-len(bins) // most)
    groups = [bins[i : i + stride] for i in range(0, len(bins), stride)]
    load_CLE = np.stack([np.sum([b.load_LE for b in group], axis=0) for group in groups])
    ratio_CLE = load_ratio(load_CLE)
    histories = []
    for row, layer in enumerate(layers):
        last = ratio_CLE[-1, row]
        alt = f"Load of each expert of layer {layer} over time; at the end max / mean is {last.max():.2f}"
        picture = _picture(ratio_CLE[:, row].T, alt)
        histories.append(LayerHistory(layer, picture, float(last.max()), int((load_CLE[-1, row] == 0).sum())))
    return histories, [(group[0].first_step + 1, group[-1].last_step) for group in groups]


def shade_colors(dark: bool) -> list[tuple[str, str]]:
    """(background, text colour) of each of the :data:`SHADES` table classes."""
    colors = palette(SHADES, dark=dark)
    luminance = colors @ np.array([0.2126, 0.7152, 0.0722])
    return [
        (f"#{r:02x}{g:02x}{b:02x}", "#14171c" if bright > 118 else "#ffffff")
        for (r, g, b), bright in zip(colors.tolist(), luminance, strict=True)
    ]


def scale_gradient(dark: bool) -> str:
    """The colour scale as stops of a CSS gradient, from ratio 0 to the top."""
    return ", ".join(f"#{r:02x}{g:02x}{b:02x}" for r, g, b in palette(17, dark=dark).tolist())


def _picture(ratio_RC: NDArray[np.float64], alt: str) -> Picture:
    positions = np.round(color_position(ratio_RC) * 255).astype(np.uint8)
    light, dark = (_data_uri(indexed_png(positions, palette(256, dark=d))) for d in (False, True))
    rows, columns = positions.shape
    return Picture(light, dark, base64.b64encode(positions.tobytes()).decode(), rows, columns, alt)


def indexed_png(index_RC: NDArray[np.uint8], colors: NDArray[np.uint8]) -> bytes:
    """A PNG of palette indices (rows, columns) with a palette of (256, 3) bytes. PNG specification, section 11."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    rows, columns = index_RC.shape
    lines = b"".join(b"\0" + row.tobytes() for row in index_RC)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", columns, rows, 8, 3, 0, 0, 0))
        + chunk(b"PLTE", colors.tobytes())
        + chunk(b"IDAT", zlib.compress(lines, 9))
        + chunk(b"IEND", b"")
    )


def _data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()
