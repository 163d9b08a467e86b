"""TensorBoard and wandb: which numbers they get, how many, and what a resume does."""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from launch.callbacks.tensorboard_writer import TensorBoardWriter
from launch.callbacks.tracker_values import eval_values, normalized_entropy, train_values
from launch.callbacks.wandb_writer import WandbWriter
from launch.records import EvalRecord, LogRecord, RunInfo, SampleRecord
from moe.errors import UserError

pytestmark = pytest.mark.unit

LOAD_LE = [[10, 10, 10, 10], [40, 0, 0, 0]]


def info(run_dir: Path, start_step: int = 0) -> RunInfo:
    return RunInfo("r", run_dir, 40, start_step, 1, 64, 4, (1, 3), {"parameters": "12"}, {"train": {"steps": 40}})


def log_record(step: int, load_LE: list[list[int]] = LOAD_LE, aux: Mapping[str, float] | None = None) -> LogRecord:
    return LogRecord(
        step, 2.5, {"balance": 1.1} if aux is None else aux, {"entropy": 0.5}, 1e-3, 0.7, 900.0, step * 64, 1.0, 2.0,
        2.5, 0.375, 0.01, 0.25, load_LE, {"forward": 0.1},
    )  # fmt: skip


def eval_record(step: int) -> EvalRecord:
    return EvalRecord(step, 2.0, 1.4, 100, 200, 0.5, LOAD_LE, False)


def test_entropy_is_one_for_even_loads_and_zero_for_one_expert() -> None:
    assert normalized_entropy([[5, 5, 5, 5]]) == pytest.approx(1.0)
    assert normalized_entropy([[5, 0, 0, 0]]) == 0.0
    assert normalized_entropy([[1, 1, 0, 0], [0, 0, 0, 0]]) == pytest.approx(0.5)
    share = np.array([1, 2, 3, 4]) / 10
    assert normalized_entropy([[1, 2, 3, 4]]) == pytest.approx(-(share * np.log(share)).sum() / math.log(4))
    assert math.isnan(normalized_entropy([]))
    assert math.isnan(normalized_entropy([[0, 0]]))


def test_values_of_a_log_record() -> None:
    values = train_values(log_record(10, aux={"balance": 1.1, "z": 3.0}), (1, 3))
    assert values == {
        "train/loss": 2.5,
        "train/lr": 1e-3,
        "train/grad_norm": 0.7,
        "speed/tokens_per_s": 900.0,
        "speed/memory_gib": 0.25,
        "train/aux/balance": 1.1,
        "train/aux/z": 3.0,
        "seconds_per_step/forward": 0.1,
        "experts/imbalance": 2.5,
        "experts/dead_fraction": 0.375,
        "experts/dropped_fraction": 0.01,
        "experts/entropy": pytest.approx(0.5),
        "experts/router_z": 3.0,
        "imbalance_by_layer/layer_01": 1.0,
        "imbalance_by_layer/layer_03": 4.0,
    }
    assert eval_values(eval_record(10)) == {"eval/loss": 2.0, "eval/bits_per_byte": 1.4}


def test_number_of_series_does_not_grow_with_experts() -> None:
    few = train_values(log_record(1, [[1] * 4] * 2), (0, 1))
    many = train_values(log_record(1, [[1] * 256] * 2), (0, 1))
    assert few.keys() == many.keys()


def test_a_dense_model_has_no_expert_series() -> None:
    assert not [name for name in train_values(log_record(1, [], {}), ()) if "experts" in name or "layer" in name]


def test_tensorboard_has_scalars_heatmap_and_sample(tmp_path: Path) -> None:
    writer = TensorBoardWriter(tmp_path / "tensorboard")
    writer.on_start(info(tmp_path))
    for step in (10, 20):
        writer.on_log(log_record(step))
    writer.on_eval(eval_record(20))
    writer.on_sample(SampleRecord(20, "To be", " or <b>not</b>"))
    writer.on_log(log_record(30))
    writer.on_end()
    writer.on_end()
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"images": 0}).Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(10, 2.5), (20, 2.5), (30, 2.5)]
    assert [e.value for e in events.Scalars("eval/bits_per_byte")] == pytest.approx([1.4])
    images = events.Images("experts/load")
    assert [image.step for image in images] == [20, 30]
    assert images[0].encoded_image_string.startswith(b"\x89PNG")
    sample = events.Tensors("sample/text_summary")[0].tensor_proto.string_val[0]
    assert sample == b"    To be or <b>not</b>"


def test_tensorboard_after_a_resume_forgets_what_is_trained_again(tmp_path: Path) -> None:
    for start, stop in ((0, 30), (20, 40)):
        writer = TensorBoardWriter(tmp_path)
        writer.on_start(info(tmp_path, start))
        for step in range(start + 10, stop + 1, 10):
            writer.on_log(log_record(step))
        writer.on_end()
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [e.step for e in events.Scalars("train/loss")] == [10, 20, 30, 40]


def test_missing_tensorboard_is_one_line_that_says_what_to_do(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match=r"track\.tensorboard is on .*: pip install tensorboard, or set") as caught:
        TensorBoardWriter(tmp_path)
    assert "\n" not in str(caught.value)


def test_missing_wandb_is_one_line_that_says_what_to_do(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"track\.wandb is on .*: pip install 'moeyard\[track\]', or set") as caught:
        WandbWriter(tmp_path, "project")
    assert "\n" not in str(caught.value)


class RecordingWandb:
    """Stands in for the wandb package, so that what is sent to it can be seen; the real one is tested below."""

    def __init__(self) -> None:
        self.inits: list[dict[str, object]] = []
        self.rows: list[dict[str, object]] = []
        self.finished = 0

    def init(self, **options: object) -> RecordingWandb:
        self.inits.append(options)
        return self

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        assert (name, step_metric) in [("step", None), ("*", "step")]

    def log(self, row: dict[str, object]) -> None:
        self.rows.append(row)

    def finish(self) -> None:
        self.finished += 1

    def Image(self, picture: object) -> tuple[str, object]:
        return "image", picture

    def Html(self, text: str) -> tuple[str, str]:
        return "html", text


def test_wandb_goes_on_in_the_same_run_after_a_resume(tmp_path: Path, monkeypatch) -> None:
    wandb = RecordingWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    for start in (0, 20):
        writer = WandbWriter(tmp_path, "shakespeare")
        writer.on_start(info(tmp_path, start))
        writer.on_log(log_record(start + 10))
        writer.on_eval(eval_record(start + 10))
        writer.on_sample(SampleRecord(start + 10, "<", "&"))
        writer.on_end()
        writer.on_end()
    first, second = wandb.inits
    assert first["id"] == second["id"] == (tmp_path / "wandb_id.txt").read_text().strip()
    assert first["resume"] == second["resume"] == "allow"
    assert first["project"] == "shakespeare"
    assert first["name"] == tmp_path.name
    assert first["config"] == {"train": {"steps": 40}, "derived": {"parameters": "12"}}
    assert wandb.finished == 2
    assert [row["step"] for row in wandb.rows] == [10] * 4 + [30] * 4
    assert wandb.rows[0]["experts/imbalance"] == 2.5
    assert wandb.rows[1] == {"step": 10, "eval/loss": 2.0, "eval/bits_per_byte": 1.4}
    assert wandb.rows[2]["experts/load"][0] == "image"
    assert wandb.rows[3]["sample"] == ("html", "<pre>&lt;&amp;</pre>")


@pytest.mark.peer
@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="needs: pip install 'moeyard[track]'")
def test_real_wandb_takes_everything_offline(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    writer = WandbWriter(tmp_path, "moeyard")
    writer.on_start(info(tmp_path))
    writer.on_log(log_record(10))
    writer.on_eval(eval_record(10))
    writer.on_sample(SampleRecord(10, "a", "b"))
    writer.on_end()
    run_id = (tmp_path / "wandb_id.txt").read_text().strip()
    assert list((tmp_path / "wandb").glob(f"offline-run-*-{run_id}/*.wandb"))
