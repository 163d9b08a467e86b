"""Training with dense parameters in slices as a user runs it: the same curve, and to and from whole parameters."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.training_program import losses, only_run, options, run_forked

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

STEPS = ("train.steps=12", "train.global_batch=12", "train.micro_batch=1", "model.moe.num_experts=6")
SLICED = ("parallel.dense=fsdp", "parallel.mode=fssdp-rm")


@pytest.fixture(scope="module")
def plain(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """The curve of one process."""
    work = tmp_path_factory.mktemp("plain")
    result = run_forked(1, *options(corpus, work, *STEPS))
    assert result.returncode == 0, result.stderr
    return losses(only_run(work))


def test_a_whole_run_with_evaluations_samples_and_an_export(
    corpus: Path, tmp_path: Path, plain: dict[int, float]
) -> None:
    more = ("eval.interval=4", "eval.final_sequences=7", "eval.sample_interval=5", "model.recompute=block")
    result = run_forked(2, *options(corpus, tmp_path, *STEPS, *SLICED, *more))
    assert result.returncode == 0, result.stdout + result.stderr
    assert "FSDP2-wrapped" not in result.stderr
    assert losses(only_run(tmp_path)) == pytest.approx(plain, rel=1e-5)
    assert (result.stdout.count("validation:"), result.stdout.count("sample:")) == (3, 3)
    assert (only_run(tmp_path) / "model" / "model.safetensors").is_file()


def test_pain_5_a_run_goes_on_with_slices_and_without_them_again(
    corpus: Path, tmp_path: Path, plain: dict[int, float]
) -> None:
    first = run_forked(2, *options(corpus, tmp_path, *STEPS, "train.stop_after=3"))
    assert first.returncode == 0, first.stderr
    folder = only_run(tmp_path)
    for ranks, dense, mode, stop in ((3, "fsdp", "ep", "7"), (1, "ddp", "local", "null")):
        more = (f"parallel.dense={dense}", f"parallel.mode={mode}", f"train.stop_after={stop}")
        result = run_forked(ranks, "--resume", str(folder), *more)
        assert result.returncode == 0, result.stderr
    assert losses(folder) == pytest.approx(plain, rel=1e-5)


def test_a_resumed_run_is_bit_equal_to_the_uninterrupted_one(corpus: Path, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run_forked(2, *options(corpus, whole, *STEPS, *SLICED)).returncode == 0
    assert run_forked(2, *options(corpus, parts, *STEPS, *SLICED, "train.stop_after=7")).returncode == 0
    assert run_forked(2, "--resume", str(only_run(parts)), "train.stop_after=null").returncode == 0
    assert losses(only_run(parts)) == losses(only_run(whole))


def test_experts_on_every_rank_are_refused_before_anything_begins(corpus: Path, tmp_path: Path) -> None:
    result = run_forked(1, *options(corpus, tmp_path, *STEPS, "parallel.dense=fsdp"))
    assert result.returncode == 2
    assert "parallel.dense: fsdp needs experts that are spread over ranks" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "runs").exists()
