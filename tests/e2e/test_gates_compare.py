"""``moeyard gates compare`` as a user runs it: trains, reports, goes on where it was, survives a run that fails."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from launch import cli
from tests.training_program import ROOT, environment, losses, only_run, options, run_forked

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

STEPS = ("train.steps=6", "gate.k=2", "eval.final_sequences=4")


class Result(NamedTuple):
    code: int
    said: str


Compare = Callable[..., Result]


def arguments(corpus: Path, work: Path, *more: str) -> list[str]:
    return ["gates", "compare", "--out", str(work / "out"), *options(corpus, work), *STEPS, *more]


@pytest.fixture
def compare(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Compare:
    """Runs the command in this process; what it trains are processes of their own."""
    for name, value in {**environment(), "TERM": "dumb", "COLUMNS": "200"}.items():
        monkeypatch.setenv(name, value)

    def call(*more: str) -> Result:
        capsys.readouterr()
        code = cli.main(arguments(corpus, tmp_path, *more))
        return Result(code, capsys.readouterr().err)

    return call


def results(work: Path) -> dict[str, list[float]]:
    values = json.loads((work / "out" / "results.json").read_text(encoding="utf-8"))
    return {gate["label"]: [run["bits_per_byte"] for run in gate["runs"]] for gate in values["gates"]}


def test_gates_are_compared_and_more_runs_are_added_later(compare: Compare, tmp_path: Path) -> None:
    first = compare("--gates", "topk,expert_choice", "--seeds", "1")
    assert first.code == 0, first.said
    assert "2/2" in first.said
    before = results(tmp_path)
    assert set(before) == {"topk", "expert_choice"}
    text = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert "| topk | " in text
    assert "(1.0x) |" in text
    assert "agreement" in text  # of expert_choice with its thresholds
    assert not list((tmp_path / "out").glob("runs/*/checkpoints"))

    more = compare("--gates", "topk,expert_choice", "--seeds", "2")
    assert more.code == 0, more.said
    assert "seed0 trained" not in more.said  # nothing is trained twice
    assert "topk-seed1 trained" in more.said
    for label, runs in results(tmp_path).items():
        assert len(set(runs)) == 2
        assert runs[:1] == before[label]

    other = compare("--gates", "topk", "optim.lr=0.5")
    assert other.code == 2
    assert "optim.lr" in other.said
    assert "give --out another folder" in other.said


def test_an_interrupt_loses_nothing(corpus: Path, compare: Compare, tmp_path: Path) -> None:
    more = ("--gates", "comet", "--seeds", "1", "train.steps=100", "checkpoint.interval=60")
    command = [sys.executable, "-m", "launch.cli", *arguments(corpus, tmp_path, *more)]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
        # A job in the background of a shell is started with the signal ignored, and so would be its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    deadline = time.monotonic() + 120
    while not _has_logged(tmp_path, "comet", 5):
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        assert time.monotonic() < deadline, "no steps"
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 130, said
    assert "go on with: moeyard gates compare" in said
    assert "Traceback" not in said
    assert "Not finished: 1 of the runs" in (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert list((tmp_path / "out").glob("runs/*/checkpoints/step_*"))

    resumed = compare(*more)
    assert resumed.code == 0, resumed.said
    straight = run_forked(
        1, "--config", str(tmp_path / "out/configs/comet-seed0.yaml"), f"run.root={tmp_path / 'runs'}"
    )
    assert straight.returncode == 0, straight.stderr
    (interrupted,) = (tmp_path / "out" / "runs").iterdir()
    assert losses(interrupted) == losses(only_run(tmp_path))


def test_a_run_that_fails_is_named_and_the_others_are_reported(compare: Compare, tmp_path: Path) -> None:
    file = tmp_path / "gates.yaml"
    file.write_text("diverges: {name: topk, k: 2, z_coef: 1.0e38}\n", encoding="utf-8")
    result = compare("--gates", "topk,diverges", "--seeds", "1", "--options", str(file))
    assert result.code == 1
    assert "failed: diverges-seed0: exit code 1" in result.said
    assert list(results(tmp_path)) == ["topk"]
    assert "diverges-seed0" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (("--gates", "commet"), "Did you mean 'comet'"),
        (("--gates", " , "), "names no gate"),
        (("gate.name=comet",), "--options FILE sets them"),
        (("--gates", "soft"), "declares nothing to use for generation"),
        (("--options", "none.yaml"), "cannot be read"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_trained(
    compare: Compare, tmp_path: Path, wrong: tuple[str, ...], said: str
) -> None:
    result = compare(*wrong)
    assert result.code == 2
    assert said in " ".join(result.said.split())
    assert not (tmp_path / "out").exists()


def _has_logged(work: Path, label: str, step: int) -> bool:
    for metrics in (work / "out" / "runs").glob(f"{label}-seed*/metrics.jsonl"):
        if f'"kind": "train", "step": {step},' in metrics.read_text(encoding="utf-8"):
            return True
    return False
