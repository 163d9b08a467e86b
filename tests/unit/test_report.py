"""The report page: complete for a finished run, honest about an unfinished, cut or empty one, safe, self-contained."""

from __future__ import annotations

import base64
import io
import json
import math
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from launch.callbacks.metrics_file import MetricsFile
from launch.heatmap import color_position, load_ratio, palette
from launch.records import EvalRecord, LogRecord, RunInfo, SampleRecord
from launch.report import write_report
from launch.report.curves import MAX_POINTS, Chart, Series, downsample, draw, format_value
from launch.report.experts import indexed_png, layer_histories, load_matrix
from launch.report.phases import phase_times
from launch.report.read_run import MAX_LOAD_BINS, LoadTimeline, ReportError, read_run

pytestmark = pytest.mark.unit

VOID = {"meta", "img", "source", "br"}


class Page(HTMLParser):
    """Checks that tags nest, and collects what tests look at."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.text: list[str] = []
        self.json: list[dict] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self._script_type: str | None = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self._script_type = dict(attrs).get("type")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open
        assert self.open.pop() == tag

    def handle_data(self, data):
        inside = self.open[-1] if self.open else ""
        if inside == "script" and self._script_type == "application/json":
            self.json.append(json.loads(data))
        elif inside not in ("script", "style"):
            self.text.append(data)

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.text).split())

    def sections(self) -> list[str | None]:
        return [attrs.get("id") for tag, attrs in self.tags if tag == "section" and "id" in attrs]


def make_run(
    run: Path, *, steps: int = 40, until: int | None = None, layers: int = 2, experts: int = 4, name: str = "tiny"
) -> Path:
    """A run as the metrics callback writes it; ``until`` < steps leaves it unfinished."""
    run.mkdir()
    until = steps if until is None else until
    (run / "config.yaml").write_text("run:\n  name: tiny\ngate:\n  name: topk\n  k: 2\n")
    (run / "command.txt").write_text("torchrun launch/train.py\n")
    (run / "env.json").write_text(json.dumps({"python": "3.11", "packages": {"torch": "2.13.0"}}))
    file = MetricsFile(run / "metrics.jsonl")
    derived = {"parameters": "1,200,000 (300,000 active per token)", "ranks": "2"}
    file.on_start(RunInfo(name, run, steps, 0, 2, 512, experts, tuple(range(1, layers + 1)), derived, {}))
    rng = np.random.default_rng(0)
    for step in range(10, until + 1, 10):
        load_LE = rng.integers(1, 99, (layers, experts)).tolist()
        phases = {"forward": 0.04, "backward": 0.05, "optimizer": 0.002, "data": 0.001, "eval": 0.003}
        file.on_log(
            LogRecord(
                step, 5 - step / steps, {"balance": 1.0}, {"spread": step / 100, "fixed": 2.0},
                1e-3, 1.0, 5120.0, step * 512, step * 0.1, 1.0, 1.5, 0.25, 0.125, 0.5, load_LE, phases,
            )
        )  # fmt: skip
        if step % 20 == 0:
            file.on_eval(EvalRecord(step, 4.0, 1.9 - step / 1000, 900, 2000, 0.5, load_LE, step == steps))
            file.on_sample(SampleRecord(step, "To be", f" or not {step}"))
    file.on_end()
    return run


def report(run: Path) -> Page:
    path = write_report(run)
    assert path == run / "report.html"
    return Page(path.read_text(encoding="utf-8"))


def test_a_finished_run_has_every_part(tmp_path: Path) -> None:
    page = report(make_run(tmp_path / "tiny-1"))
    assert page.sections() == ["learning", "experts", "speed", "optimisation", "samples", "evaluations", "setup"]
    for words in (
        "finished: 40 steps",
        "Bits per byte 1.860 final validation; best 1.860",
        "Parameters 1.2 M 300 k active per token (25%)",
        "Experts 4 in each of 2 MoE layers",
        "Gate topk k=2",
        "Tokens 20.5 k 40 steps of 512",
        "Time 4s on 2 ranks",
        "Tokens per second 5,120",
        "Model work 92.0%",
        "92.0 % of wall time in forward, backward and optimizer",
        "other (in no phase) 4.0 %",
        "To be or not 40",
        "40 (final) 1.8600 4.0000",
        "packages torch 2.13.0",
        "torchrun launch/train.py",
    ):
        assert words in page.words
    titles = {tuple(s["name"] for s in c["series"]) for c in page.json}
    assert ("training", "validation") in titles
    assert ("balance",) in titles
    assert ("spread",) in titles
    assert ("fixed",) not in titles, "what never changes is no curve"
    loss = page.json[0]["series"][0]
    assert loss["steps"] == [10, 20, 30, 40]
    assert loss["values"] == [4.75, 4.5, 4.25, 4.0]


def test_the_page_needs_no_network_and_is_accessible(tmp_path: Path) -> None:
    page = report(make_run(tmp_path / "tiny-1"))
    for tag, attrs in page.tags:
        assert tag not in ("link", "iframe", "object", "embed", "base")
        for key in ("src", "href", "srcset"):
            assert (attrs.get(key) or "data:").startswith("data:"), (tag, key)
        if tag == "img":
            assert attrs["alt"]
        if attrs.get("role") == "img":
            assert attrs["aria-label"]
    assert ("html", {"lang": "en"}) in page.tags
    text = (tmp_path / "tiny-1" / "report.html").read_text()
    assert "http://" not in text
    assert "https://" not in text
    assert "prefers-color-scheme: dark" in text
    assert "Content-Security-Policy" in text


def test_everything_from_the_run_is_escaped(tmp_path: Path) -> None:
    evil = "</script><script>alert(1)</script><img src=x onerror=alert(1)>&amp;"
    run = make_run(tmp_path / "evil", name=evil)
    (run / "config.yaml").write_text(f"# {evil}\n")
    (run / "command.txt").write_text(evil)
    (run / "env.json").write_text(json.dumps({evil: evil}))
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        if row["kind"] == "train":
            row["aux"] = {evil: 1.0}
        elif row["kind"] == "sample":
            row |= {"text": evil, "prompt": evil, "step": evil}
        elif row["kind"] == "start":
            row["derived"] = {evil: evil}
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    clean = report(make_run(tmp_path / "clean"))
    page = report(run)
    scripts = [tag for tag, _ in page.tags].count("script")
    assert scripts == [tag for tag, _ in clean.tags].count("script")
    assert not [attrs for tag, attrs in page.tags if tag == "img" and attrs.get("src") == "x"]
    assert page.words.count(evil) >= 6


def test_an_unfinished_run_with_a_cut_last_row(tmp_path: Path) -> None:
    run = make_run(tmp_path / "tiny-1", steps=100, until=30)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 40, "lo')
    page = report(run)
    assert "unfinished: step 30 of 100, no final evaluation" in page.words
    assert "1 unreadable row of metrics.jsonl left out" in page.words
    assert "validation at step 20; best 1.880" in page.words
    assert page.json[0]["series"][0]["steps"] == [10, 20, 30]


def test_an_empty_run_says_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").touch()
    page = report(tmp_path)
    assert "no steps recorded" in page.words
    assert "metrics.jsonl has no rows yet" in page.words
    assert "config.yaml is missing" in page.words
    assert page.sections() == ["setup"]


def test_a_run_that_only_started(tmp_path: Path) -> None:
    page = report(make_run(tmp_path / "tiny-1", until=0))
    assert "There is no training row yet" in page.words
    assert "Parameters 1.2 M" in page.words
    assert page.sections() == ["setup"]


def test_a_model_without_moe_layers(tmp_path: Path) -> None:
    run = make_run(tmp_path / "dense")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rows = [{**row, "load_LE": []} if "load_LE" in row else row for row in rows]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = report(run)
    assert "the model has no MoE layers" in page.words
    assert "Each layer over time" not in page.words


def test_not_a_run_directory(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match=r"neither metrics\.jsonl nor config\.yaml"):
        write_report(tmp_path)
    with pytest.raises(ReportError, match="is not a folder"):
        write_report(tmp_path / "nothing")


def test_values_of_foreign_types_and_nan_do_not_break_the_page(tmp_path: Path) -> None:
    run = make_run(tmp_path / "tiny-1")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('[1, 2]\n"text"\n{"kind": "train"}\n{"kind": "eval"}\n{"kind": "sample", "step": 1, "text": "x"}\n')
        file.write('{"kind": "train", "step": 50, "loss": NaN, "grad_norm": Infinity, "load_LE": "x", "phase_s": 3}\n')
    page = report(run)
    assert "4 unreadable rows" in page.words
    assert page.json[0]["series"][0]["values"][-1] is None


def test_a_resume_replaces_what_it_trained_again(tmp_path: Path) -> None:
    run = make_run(tmp_path / "tiny-1", steps=100, until=30)
    again = MetricsFile(run / "metrics.jsonl")
    again.on_start(RunInfo("tiny", run, 100, 25, 2, 512, 4, (1, 2), {}, {}))
    again.on_log(
        LogRecord(30, 9.0, {}, {}, 1e-3, 1.0, 512.0, 1, 1.0, 1.0, 1.0, 0.0, 0.0, 0.1, [[1, 1, 1, 1]] * 2, {"data": 1.0})
    )
    again.on_end()
    data = read_run(run)
    assert [(row["step"], row["covers_steps"], row["loss"]) for row in data.train][-2:] == [(20, 10, 4.8), (30, 5, 9.0)]
    assert [(b.first_step, b.last_step) for b in data.timeline.bins] == [(0, 10), (10, 20), (20, 30)]
    assert "Resumed at step 25." in report(run).words


def test_phase_shares_are_of_wall_time() -> None:
    rows = [
        {"covers_steps": 10, "tokens_per_s": 1000.0, "phase_s": {"forward": 0.05, "reduce": 0.01}},
        {"covers_steps": 5, "tokens_per_s": 500.0, "phase_s": {"forward": 0.1, "backward": 0.05, "novel": 0.02}},
        {"covers_steps": 5, "tokens_per_s": math.nan, "phase_s": {"forward": 9.0}},
        {"covers_steps": 5, "tokens_per_s": 500.0},
    ]
    times = phase_times(rows, tokens_per_step=100)
    assert times is not None
    assert (times.wall_s, times.steps) == (pytest.approx(10 * 0.1 + 5 * 0.2), 15)
    seconds = {p.name: p.seconds for p in times.phases}
    assert list(seconds) == ["forward", "backward", "reduce", "novel", "other"]
    assert seconds == pytest.approx({"forward": 1.0, "backward": 0.25, "reduce": 0.1, "novel": 0.1, "other": 0.55})
    assert times.compute_share == pytest.approx(1.25 / 2)
    assert sum(p.share for p in times.phases) == pytest.approx(1)
    assert times.phases[0].ms_per_step == pytest.approx(1000 / 15)
    assert phase_times([], 100) is None


def test_a_huge_run_is_thinned_and_keeps_its_peaks(tmp_path: Path) -> None:
    steps = list(range(1, 50_001))
    values = np.random.default_rng(0).normal(size=50_000)
    values[31_234], values[7] = 99.0, -99.0
    values[100:200] = math.nan
    few_steps, few = downsample(steps, values.tolist())
    assert len(few) <= MAX_POINTS
    assert few_steps == sorted(set(few_steps))
    assert (few_steps[0], few_steps[-1]) == (1, 50_000)
    assert (np.nanmax(few), np.nanmin(few)) == (99.0, -99.0)
    assert few_steps[few.index(99.0)] == 31_235
    assert any(math.isnan(v) for v in few), "the gap stays"


def test_load_timeline_is_bounded_and_loses_no_token() -> None:
    timeline = LoadTimeline()
    loads = np.random.default_rng(0).integers(0, 9, (1001, 2, 3))
    for i, load_LE in enumerate(loads):
        timeline.add(i, i + 1, load_LE.tolist())
    assert len(timeline.bins) <= 2 * MAX_LOAD_BINS
    assert (timeline.bins[0].first_step, timeline.bins[-1].last_step) == (0, 1001)
    assert all(a.last_step == b.first_step for a, b in zip(timeline.bins, timeline.bins[1:], strict=False))
    np.testing.assert_array_equal(sum(b.load_LE for b in timeline.bins), loads.sum(0))


@pytest.mark.parametrize(("layers", "experts"), [(1, 1), (24, 32), (48, 128)])
def test_any_size_of_model(tmp_path: Path, layers: int, experts: int) -> None:
    run = make_run(tmp_path / "run", layers=layers, experts=experts)
    page = report(run)
    pictures = [attrs for tag, attrs in page.tags if "data-positions" in attrs]
    tables = [attrs for tag, attrs in page.tags if attrs.get("class") == "loads"]
    assert len(tables) == (2 if layers * experts <= 768 else 0)
    assert len(pictures) == layers + (0 if tables else 2)
    assert (run / "report.html").stat().st_size < 3_000_000


def test_pictures_show_the_loads() -> None:
    timeline = LoadTimeline()
    timeline.add(0, 10, [[1, 1, 2, 0]])
    timeline.add(10, 20, [[4, 0, 0, 0]])
    (history,), columns = layer_histories(timeline.bins, [7])
    assert columns == [(1, 10), (11, 20)]
    assert (history.layer, history.last_imbalance, history.dead_now) == (7, 4.0, 3)
    wanted = np.round(color_position([[1, 4], [1, 0], [2, 0], [0, 0]]) * 255).astype(int)
    positions = np.frombuffer(base64.b64decode(history.picture.positions), np.uint8).reshape(4, 2)
    np.testing.assert_array_equal(positions, wanted)
    for uri, dark in ((history.picture.light, False), (history.picture.dark, True)):
        picture = Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))
        np.testing.assert_array_equal(np.asarray(picture.convert("RGB")), palette(256, dark=dark)[wanted])


def test_png_writer_agrees_with_pillow() -> None:
    index = np.random.default_rng(0).integers(0, 256, (5, 7)).astype(np.uint8)
    picture = Image.open(io.BytesIO(indexed_png(index, palette(256))))
    np.testing.assert_array_equal(np.asarray(picture), index)


def test_load_matrix_counts_and_numbers() -> None:
    matrix = load_matrix("t", [[30, 10, 0, 0], [5, 5, 5, 5]], [2, 5])
    assert matrix.table is not None
    assert [[cell.text for cell in row] for row in matrix.table] == [["3.00", "1.00", "dead", "dead"], ["1.00"] * 4]
    assert matrix.table[0][0].title == "layer 2, expert 0: 30 tokens"
    assert matrix.summary == "imbalance (max / mean) 2.00, worst 3.00 in layer 2; 2 of 8 experts dead"
    np.testing.assert_array_equal(load_ratio([30, 10, 0, 0]), [3, 1, 0, 0])


def test_chart_places_points_and_ticks() -> None:
    drawn = draw(Chart("Loss", "nats", [Series("training", [0, 50, 75, 100], [4.0, 2.0, math.nan, 0.0])]), 100)
    assert drawn is not None
    assert drawn.series[0].path == "M0.0 0.0L500.0 200.0M1000.0 400.0"
    assert drawn.y_ticks == [(100.0, "0"), (75.0, "1"), (50.0, "2"), (25.0, "3"), (0.0, "4")]
    assert drawn.x_ticks[0] == (0.0, "step 0")
    assert drawn.x_ticks[-1] == (100.0, "100")
    assert drawn.summary == ("Loss in nats: training from 4 at step 0 to 0 at step 100, lowest 0, highest 4")
    assert draw(Chart("t", "", [Series("a", [1], [math.nan])]), 10) is None


def test_log_chart_and_constant_chart() -> None:
    drawn = draw(Chart("t", "", [Series("a", [0, 10], [1.0, 100.0])], log=True), 10)
    assert drawn is not None
    assert drawn.y_ticks == [(100.0, "1"), (50.0, "10"), (0.0, "100")]
    assert drawn.series[0].path == "M0.0 400.0L1000.0 0.0"
    constant = draw(Chart("t", "", [Series("a", [0, 10], [0.0, 0.0])]), 10)
    assert constant is not None
    assert constant.series[0].path == "M0.0 400.0L1000.0 400.0"


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (1.875, "1.875"), (0.0012, "0.0012"), (0.00012, "1.2e-4"), (5e-5, "5e-5"), (1234.0, "1,234"),
     (12345.0, "12.35k"), (2.5e6, "2.5M"), (-2e9, "-2G"), (math.nan, "nan")],
)  # fmt: skip
def test_format_value(value: float, text: str) -> None:
    assert format_value(value) == text
