"""The report's part on experts over ranks: what is drawn is what the engine counted."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from launch.report.curves import Series
from launch.report.page import write_report
from launch.report.ranks import rank_card, rank_charts
from parallel.engine_metrics import EngineMetrics

pytestmark = pytest.mark.unit

MIB = 2**20


def engine(step: int) -> EngineMetrics:
    return EngineMetrics(
        steps=10,
        imbalance_before_L=[3.0, 2.0],
        imbalance_after_L=[1.5 - step / 100, 1.0],
        copies_L=[float(step), 2.0],
        sent_bytes={"spAG": 4.0 * MIB, "spRS": 2.0 * MIB, "tokens": 6.0 * MIB, "counts": MIB / 2, "owners": 0.0},
        copies_hidden_s=0.3,
        copies_exposed_s=0.1,
        tokens_waited_s=0.2,
        copy_peak_bytes=8 * MIB,
    )


def row(step: int, **changed: object) -> dict[str, object]:
    return {"kind": "train", "step": step, "loss": 3.0, "engine": {**asdict(engine(step)), **changed}}


def lines(rows: list[dict[str, object]]) -> dict[str, dict[str, Series]]:
    """By chart title and curve name."""
    return {chart.title: {series.name: series for series in chart.series} for chart in rank_charts(rows)}


def test_every_curve_is_what_was_counted() -> None:
    drawn = {
        (title, name): (list(series.steps), list(series.values))
        for title, chart in lines([row(10), row(20)]).items()
        for name, series in chart.items()
    }
    steps = [10, 20]
    assert drawn == {
        ("Imbalance of ranks", "with experts on their owners"): (steps, [2.5, 2.5]),
        ("Imbalance of ranks", "as computed"): (steps, pytest.approx([1.2, 1.15])),
        ("Copies of experts", "copies"): (steps, [6.0, 11.0]),
        ("Sent between ranks", "copies"): (steps, [4.0, 4.0]),
        ("Sent between ranks", "gradients"): (steps, [2.0, 2.0]),
        ("Sent between ranks", "tokens"): (steps, [6.5, 6.5]),
        ("Time on the link", "copies hidden"): (steps, [0.3, 0.3]),
        ("Time on the link", "copies exposed"): (steps, [0.1, 0.1]),
        ("Time on the link", "tokens"): (steps, [0.2, 0.2]),
        ("Memory of copies", "copies and their gradients"): (steps, [8.0, 8.0]),
    }


def test_the_card_compares_with_expert_parallelism() -> None:
    card = rank_card([row(20)])
    assert card is not None
    label, value, detail = card
    assert (label, value) == ("Imbalance of ranks", "1.15")
    assert "2.50 if each expert ran on its owner; 75% of the copies' time hidden" in detail
    assert rank_card([{"step": 10}]) is None


@pytest.mark.parametrize("engine", [None, {}, [1], "x"])
def test_a_run_with_experts_on_every_rank_has_no_such_part(engine: object) -> None:
    assert rank_charts([{"step": 10, "engine": engine}]) == []


def test_the_page_has_the_part_and_survives_damaged_fields(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    damaged = row(30, imbalance_after_L="many", sent_bytes=None, copies_hidden_s="long", copies_L=[None])
    rows = [{"kind": "start", "step": 0, "steps": 30}, row(10), row(20), damaged]
    (run / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    page = write_report(run).read_text(encoding="utf-8")
    assert '<section id="ranks"><h2>Experts over ranks</h2>' in page
    for title in ("Imbalance of ranks", "Copies of experts", "Sent between ranks", "Time on the link"):
        assert f"<b>{title}</b>" in page
    assert "as computed from 1.2 at step 10 to 1.15 at step 20" in page
