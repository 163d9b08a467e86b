"""The load heatmap: colour scale, picture size and legibility limits, and when the callback draws."""

from __future__ import annotations

import io
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from launch.callbacks.heatmap import HeatmapWriter
from launch.heatmap import FULL_RATIO, color_position, draw_load_heatmap, load_ratio, palette, ratio_at
from launch.records import LogRecord, RunInfo

pytestmark = pytest.mark.unit


def info(start_step: int = 0, layers: tuple[int, ...] = (0, 1)) -> RunInfo:
    return RunInfo("r", Path("r"), 100, start_step, 1, 64, 4, layers, {}, {})


def record(step: int, load_LE: list[list[int]]) -> LogRecord:
    return LogRecord(step, 1.0, {}, {}, 1e-3, 1.0, 1.0, 1, 1.0, 1.0, 1.0, 0.0, 0.0, 0.1, load_LE, {})


def opened(png: bytes) -> Image.Image:
    picture = Image.open(io.BytesIO(png))
    picture.load()
    return picture


def test_ratio_is_load_over_its_layers_mean_and_a_layer_without_load_is_even() -> None:
    ratio = load_ratio([[1, 3, 0, 4], [0, 0, 0, 0]])
    np.testing.assert_array_equal(ratio, [[0.5, 1.5, 0.0, 2.0], [1.0, 1.0, 1.0, 1.0]])


def test_color_scale_has_the_mean_in_its_middle_and_is_monotone_and_invertible() -> None:
    assert color_position(1.0) == 0.5
    assert color_position(0.0) == 0.0
    assert color_position(FULL_RATIO) == color_position(50.0) == 1.0
    ratios = np.linspace(0, FULL_RATIO, 101)
    assert (np.diff(color_position(ratios)) > 0).all()
    np.testing.assert_allclose(ratio_at(color_position(ratios)), ratios, atol=1e-12)


@pytest.mark.parametrize("dark", [False, True])
def test_palette_is_neutral_in_the_middle_blue_below_and_orange_above(dark: bool) -> None:
    colors = palette(257, dark=dark).astype(int)
    low, middle, high = colors[0], colors[128], colors[256]
    assert np.ptp(middle) <= 14
    assert low[2] > low[0] + 60
    assert high[0] > high[2] + 60
    # Away from the mean a light page's colours only get darker, a dark page's only lighter.
    luminance = colors @ np.array([0.2126, 0.7152, 0.0722]) * (1 if dark else -1)
    assert (np.diff(luminance[:128]) <= 1.5).all()
    assert (np.diff(luminance[129:]) >= -1.5).all()


@pytest.mark.parametrize(
    ("layers", "experts"), [(1, 1), (1, 4), (4, 8), (8, 16), (2, 64), (1, 128), (16, 64), (48, 256)]
)
def test_picture_is_small_and_readable_for_any_size(layers: int, experts: int) -> None:
    load = np.random.default_rng(0).integers(0, 1000, (layers, experts))
    png = draw_load_heatmap(load, title="expert load, training steps 1 to 100")
    assert len(png) < 60_000
    width, height = opened(png).size
    assert 400 <= width <= 2200
    assert 200 <= height <= 900


def test_picture_shows_the_loads() -> None:
    """Cells have their colours: the pixels between the numbers of a 1 x 4 matrix are those of the palette."""
    load = [[0, 100, 100, 200]]
    picture = np.asarray(opened(draw_load_heatmap(load, title="t")).convert("RGB")).astype(int)
    colors = palette(256).astype(int)
    for ratio, share in ((0.0, 0.125), (1.0, 0.375), (1.0, 0.625), (2.0, 0.875)):
        wanted = colors[round(float(color_position(ratio)) * 255)]
        column = int(0.72 * 110 + share * 4.4 * 110)
        near = np.abs(picture[:, column - 40] - wanted).max(axis=1) <= 4
        assert near.sum() > 60, f"ratio {ratio}"
    assert (picture[0, 0] == 255).all(), "the background is white"


def test_the_same_loads_give_the_same_bytes_from_any_thread() -> None:
    load = np.arange(1, 33).reshape(4, 8)
    expected = draw_load_heatmap(load, title="t", layers=[1, 2, 3, 4])
    found: list[bytes] = []
    threads = [
        threading.Thread(target=lambda: found.append(draw_load_heatmap(load, title="t", layers=[1, 2, 3, 4])))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [expected] * 3


def test_drawing_uses_no_global_state_of_matplotlib() -> None:
    before = "matplotlib.pyplot" in sys.modules
    draw_load_heatmap([[1, 2]], title="t")
    assert ("matplotlib.pyplot" in sys.modules) == before


@pytest.mark.parametrize("load", [[], [1, 2], [[]]])
def test_something_else_than_a_matrix_is_refused(load: list[object]) -> None:
    with pytest.raises(ValueError, match="layers x experts"):
        draw_load_heatmap(load, title="t")


def test_callback_draws_every_interval_and_at_the_end_from_the_loads_since(tmp_path: Path, monkeypatch) -> None:
    drawn = []

    def spy(load_LE, *, title, layers):
        drawn.append((np.asarray(load_LE).tolist(), title, tuple(layers)))
        return b"png"

    monkeypatch.setattr("launch.heatmap.draw_load_heatmap", spy)
    writer = HeatmapWriter(tmp_path / "heatmaps", interval=20)
    writer.on_start(info(layers=(1, 3)))
    for step in range(10, 51, 10):
        writer.on_log(record(step, [[step, 1], [0, 2]]))
    writer.on_end()
    assert drawn == [
        ([[30, 2], [0, 4]], "expert load, training steps 1 to 20", (1, 3)),
        ([[70, 2], [0, 4]], "expert load, training steps 21 to 40", (1, 3)),
        ([[50, 1], [0, 2]], "expert load, training steps 41 to 50", (1, 3)),
    ]
    names = sorted(p.name for p in (tmp_path / "heatmaps").iterdir())
    assert names == ["step_000020.png", "step_000040.png", "step_000050.png"]


def test_callback_after_a_resume_with_intervals_that_do_not_divide(tmp_path: Path) -> None:
    writer = HeatmapWriter(tmp_path, interval=25)
    writer.on_start(info(start_step=30))
    for step in (40, 50, 60, 70, 80):
        writer.on_log(record(step, [[1, 2, 3, 4], [4, 3, 2, 1]]))
    writer.on_end()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_000050.png", "step_000080.png"]
    assert opened((tmp_path / "step_000050.png").read_bytes()).format == "PNG"


@pytest.mark.parametrize("load_LE", [[], [[3, 4], [4, 3]]])
def test_interval_zero_draws_once_at_the_end_and_a_dense_model_never(tmp_path: Path, load_LE: list[list[int]]) -> None:
    writer = HeatmapWriter(tmp_path, interval=0)
    writer.on_start(info())
    for step in (10, 20):
        writer.on_log(record(step, load_LE))
    writer.on_end()
    assert [p.name for p in tmp_path.iterdir()] == (["step_000020.png"] if load_LE else [])
