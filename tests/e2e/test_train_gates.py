"""Every gate trains a language model through gate.name alone: over ranks as on one, resumed as uninterrupted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training_program import losses, only_run, options, run_forked

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

# A micro-batch of one sequence: gates that look at the whole batch see the same batches on any number of ranks.
STEPS = ("train.steps=8", "train.global_batch=4", "train.micro_batch=1", "model.moe.num_experts=8")
REFUSED = {
    "soft": "gate.name: 'soft' routes a token by looking at later ones (causality BATCH) and declares nothing to use",
    "replay": "gate.path: name the file to repeat",
    "hash gate.table=no.pt gate.vocab_size=99": "gate.table: there is no file no.pt",
    "replay gate.path=no.pt": "gate.path: there is no file no.pt",
}


def rows(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    found = (json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines())
    return [row for row in found if row["kind"] == kind]


# One of each kind of plan; that every gate trains is a unit test (tests/unit/test_gates_in_a_model.py).
@pytest.mark.parametrize("gate", ["base", "expert_choice", "local_search", "relu", "sparse_ot", "zero_computation"])
def test_a_gate_trains_alike_on_one_process_and_on_two(corpus: Path, tmp_path: Path, gate: str) -> None:
    for ranks, mode in ((1, "local"), (2, "fssdp-rm")):
        work = tmp_path / mode
        search = ("gate.search=4",) if gate == "local_search" else ()
        args = (*STEPS, f"gate.name={gate}", *search, f"parallel.mode={mode}")
        result = run_forked(ranks, *options(corpus, work, *args))
        assert result.returncode == 0, result.stdout + result.stderr
    alone, spread = only_run(tmp_path / "local"), only_run(tmp_path / "fssdp-rm")
    # A solver that is cut short takes rounding further: other tokens sit on the fence.
    assert losses(spread) == pytest.approx(losses(alone), rel=1e-4 if gate == "sparse_ot" else 1e-5)
    (first,), (second,) = rows(alone, "eval"), rows(spread, "eval")
    assert second["loss"] == pytest.approx(first["loss"], rel=1e-5)
    if gate != "sparse_ot":
        assert first["load_LE"] == second["load_LE"]
        assert first["surrogate"] == pytest.approx(second["surrogate"], abs=1e-6)
    if gate in ("base", "expert_choice", "sparse_ot"):
        for row in (first, second):
            assert 0 < row["surrogate"]["agreement"] <= 1
            assert row["surrogate"]["max_vio"] >= 0
            assert row["surrogate"]["batch_max_vio"] >= 0
    else:
        assert not first["surrogate"]


@pytest.mark.parametrize("gate", sorted(REFUSED))
def test_those_that_cannot_are_refused_with_the_way_out(corpus: Path, tmp_path: Path, gate: str) -> None:
    for how in ((), ("--dry-run",)):
        result = run_forked(1, *how, *options(corpus, tmp_path, *STEPS, *f"gate.name={gate}".split()))
        assert result.returncode == 2
        assert REFUSED[gate] in " ".join(result.stderr.split())
        assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("ids", "message"), [(9, "gate.vocab_size: the table has 9 ids, fewer than"), (400, "must hold an int64 tensor")]
)
def test_tables_that_do_not_fit_are_refused_without_a_traceback(
    corpus: Path, tmp_path: Path, ids: int, message: str
) -> None:
    table = tmp_path / "table.pt"
    torch.save(torch.zeros(9, 1, dtype=torch.int64), table)
    gate = ("gate.name=hash", f"gate.table={table}", f"gate.vocab_size={ids}")
    result = run_forked(1, *options(corpus, tmp_path, *STEPS, *gate))
    assert result.returncode == 2
    assert message in " ".join(result.stderr.split())
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    "gate",
    [
        ("gate.name=local_search", "gate.search=5", "gate.gate={name: topk, balance: bias}"),
        ("gate.name=expert_choice", "gate.thresholds_from=3"),
        ("gate.name=sparse_ot",),
        ("gate.name=relu", "gate.l1_start=0.01"),
    ],
    ids=lambda gate: gate[0].removeprefix("gate.name="),
)
def test_schedules_and_controllers_survive_a_resume_to_the_bit(
    corpus: Path, tmp_path: Path, gate: tuple[str, ...]
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run_forked(2, *options(corpus, whole, *STEPS, *gate)).returncode == 0
    assert run_forked(2, *options(corpus, parts, *STEPS, *gate, "train.stop_after=4")).returncode == 0
    assert run_forked(2, "--resume", str(only_run(parts)), "train.stop_after=null").returncode == 0
    assert losses(only_run(parts)) == losses(only_run(whole))
    found, expected = (only_run(work) / "model" / "model.safetensors" for work in (parts, whole))
    assert found.read_bytes() == expected.read_bytes()


def test_controllers_move_under_recomputation_too(corpus: Path, tmp_path: Path) -> None:
    for recompute in ("none", "block"):
        args = (*STEPS, "gate.name=expert_choice", f"model.recompute={recompute}")
        result = run_forked(1, *options(corpus, tmp_path / recompute, *args))
        assert result.returncode == 0, result.stderr
    plain, recomputed = only_run(tmp_path / "none"), only_run(tmp_path / "block")
    assert losses(recomputed) == pytest.approx(losses(plain), rel=1e-6)
    (first,), (second,) = rows(plain, "eval"), rows(recomputed, "eval")
    assert second["surrogate"] == pytest.approx(first["surrogate"], abs=1e-3), "thresholds moved differently"


def test_a_schedule_that_outlasts_training_is_refused(corpus: Path, tmp_path: Path) -> None:
    result = run_forked(1, *options(corpus, tmp_path, *STEPS, "gate.name=dense_to_sparse", "gate.decay=20"))
    assert result.returncode == 2
    assert "gate.decay: the schedule ends after 20 steps, training after 8" in " ".join(result.stderr.split())


def test_a_checkpoint_of_another_gate_is_refused(corpus: Path, tmp_path: Path) -> None:
    assert run_forked(1, *options(corpus, tmp_path, *STEPS, "train.stop_after=4")).returncode == 0
    result = run_forked(1, "--resume", str(only_run(tmp_path)), "gate.name=comet")
    assert result.returncode == 2
    said = " ".join(result.stderr.split())
    assert "gate.name: 'topk' -> 'comet'" in said
    assert "without --resume a new run begins" in said
    assert "Traceback" not in said


def test_a_search_ends_where_dense_parameters_are_sliced(corpus: Path, tmp_path: Path) -> None:
    """The permutation is taken from a parameter of which each rank has a slice."""
    gate = ("gate.name=local_search", "gate.search=3")
    for ranks, mode in ((1, "local"), (2, "fsdp")):
        result = run_forked(ranks, *options(corpus, tmp_path / mode, *STEPS, *gate, f"parallel.mode={mode}"))
        assert result.returncode == 0, result.stdout + result.stderr
    alone, sliced = only_run(tmp_path / "local"), only_run(tmp_path / "fsdp")
    assert losses(sliced) == pytest.approx(losses(alone), rel=1e-5)
