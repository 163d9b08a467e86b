"""Run directories: never overwritten, found again, truncated on resume, resolved to models with clear errors."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from launch.config import RunConfig, TrainConfig
from launch.config_file import load_config
from launch.run_dir import RunDir, RunDirError, find_latest_run, list_runs, resolve_model_dir

pytestmark = pytest.mark.unit


def config_in(root: Path, name: str = "demo") -> TrainConfig:
    return TrainConfig(run=RunConfig(root=str(root), name=name))


def test_two_runs_of_one_second_get_two_folders(tmp_path: Path) -> None:
    first = RunDir.create(config_in(tmp_path), ["train.py", "a b"])
    second = RunDir.create(config_in(tmp_path), ["train.py"])
    assert first.path != second.path
    assert (first.path / "command.txt").read_text() == "train.py 'a b'\n"
    assert load_config(str(first.path / "config.yaml")).config == config_in(tmp_path)
    assert json.loads((first.path / "env.json").read_text())["packages"]["torch"]


def test_a_root_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunDirError, match=r"cannot create the run directory .*file.*; set run\.root"):
        RunDir.create(config_in(tmp_path / "file"), [])


def test_latest_run_needs_a_complete_checkpoint_and_the_exact_name(tmp_path: Path) -> None:
    old = RunDir.create(config_in(tmp_path), []).path
    (old / "checkpoints" / "step_000010").mkdir()
    new = RunDir.create(config_in(tmp_path), []).path
    (new / "checkpoints" / "step_000020.partial").mkdir()
    other = RunDir.create(config_in(tmp_path, "demo-2"), []).path
    (other / "checkpoints" / "step_000001").mkdir()
    assert find_latest_run(tmp_path, "demo") == old
    assert find_latest_run(tmp_path, "nothing") is None
    assert set(list_runs(tmp_path)) == {old, new, other}


def test_the_newest_run_is_the_one_that_started_last_whatever_was_written_since(tmp_path: Path) -> None:
    names = ["demo-20260101-000000", "demo-20260102-000000", "demo-20260102-000000-2", "demo-20260102-000000-10"]
    for name in reversed(names):
        (tmp_path / name / "checkpoints" / "step_000001").mkdir(parents=True)
        (tmp_path / name / "config.yaml").touch()
    (tmp_path / names[0] / "report.html").touch()
    assert [run.name for run in list_runs(tmp_path, "demo")] == names
    latest = find_latest_run(tmp_path, "demo")
    assert latest is not None
    assert latest.name == names[-1]


def test_truncation_drops_the_final_evaluation_that_a_resumed_run_makes_again(tmp_path: Path) -> None:
    run = RunDir.create(config_in(tmp_path), [])
    rows = [{"kind": "eval", "step": 2, "final": False}, {"kind": "eval", "step": 4, "final": True}]
    metrics = run.path / "metrics.jsonl"
    metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run.truncate_metrics(after_step=4)
    assert [json.loads(line) for line in metrics.read_text().splitlines()] == rows[:1]


def test_truncation_drops_later_rows_and_a_torn_last_row(tmp_path: Path) -> None:
    run = RunDir.create(config_in(tmp_path), [])
    rows = [{"kind": "train", "step": s, "loss": s / 3} for s in (1, 2, 3)]
    metrics = run.path / "metrics.jsonl"
    metrics.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"kind": "train", "st')
    run.truncate_metrics(after_step=2)
    assert [json.loads(line) for line in metrics.read_text().splitlines()] == rows[:2]


def test_two_processes_cannot_train_into_one_folder(tmp_path: Path) -> None:
    run = RunDir.create(config_in(tmp_path), [])
    with run.locked(), pytest.raises(RunDirError, match=rf"is being trained by process {os.getpid()} on .*; wait"):
        run.locked().__enter__()
    with run.locked():
        pass


def test_open_refuses_other_folders(tmp_path: Path) -> None:
    with pytest.raises(RunDirError, match=r"not a run directory: it has no config\.yaml"):
        RunDir.open(tmp_path)


def test_resolve_model_dir_takes_runs_and_models_and_says_what_to_do(tmp_path: Path) -> None:
    run = RunDir.create(config_in(tmp_path), []).path
    with pytest.raises(RunDirError, match=rf"moeyard export {run}"):
        resolve_model_dir(run)
    (run / "model").mkdir()
    (run / "model" / "config.json").write_text("{}")
    assert resolve_model_dir(run) == resolve_model_dir(run / "model") == run / "model"
    with pytest.raises(RunDirError, match=r"Did you mean .*demo-"):
        resolve_model_dir(str(run) + "x")
    with pytest.raises(RunDirError, match="neither a run directory"):
        resolve_model_dir(tmp_path)
