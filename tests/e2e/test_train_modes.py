"""Training with sharded experts as a user runs it: every mode, from one to the other, and when a rank falls out."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.harness import free_port
from tests.training_program import ROOT, environment, losses, only_run, options, run_forked, start, wait_for_step

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

STEPS = ("train.steps=12", "train.global_batch=12", "train.micro_batch=1", "model.moe.num_experts=6")


@pytest.fixture(scope="module")
def plain(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """The curve of one process."""
    work = tmp_path_factory.mktemp("plain")
    result = run_forked(1, *options(corpus, work, *STEPS))
    assert result.returncode == 0, result.stderr
    return losses(only_run(work))


@pytest.mark.parametrize("mode", ["ep", "fsdp", "fssdp-keep", "fssdp-rm"])
def test_a_whole_run_in_each_mode_has_the_curve_of_one_process(
    corpus: Path, tmp_path: Path, plain: dict[int, float], mode: str
) -> None:
    """With evaluations and samples on the way, and a model exported at the end."""
    more = ("eval.interval=4", "eval.final_sequences=7", "eval.sample_interval=5")
    result = run_forked(2, *options(corpus, tmp_path, *STEPS, *more, f"parallel.mode={mode}"))
    assert result.returncode == 0, result.stdout + result.stderr
    assert losses(only_run(tmp_path)) == pytest.approx(plain, rel=1e-5)
    assert result.stdout.count("validation:") == 3
    assert (only_run(tmp_path) / "model" / "model.safetensors").is_file()


def test_pain_5_a_run_goes_on_in_another_mode_on_another_number_of_ranks(
    corpus: Path, tmp_path: Path, plain: dict[int, float]
) -> None:
    """4 ranks fssdp-rm -> 2 ep -> 1 local -> 3 fssdp-keep, optimizer state and all (DeepSpeed 5716, 8147)."""
    first = run_forked(4, *options(corpus, tmp_path, *STEPS, "parallel.mode=fssdp-rm", "train.stop_after=3"))
    assert first.returncode == 0, first.stderr
    folder = only_run(tmp_path)
    for ranks, mode, stop in ((2, "ep", "6"), (1, "local", "9"), (3, "fssdp-keep", "null")):
        result = run_forked(ranks, "--resume", str(folder), f"parallel.mode={mode}", f"train.stop_after={stop}")
        assert result.returncode == 0, result.stderr
    assert losses(folder) == pytest.approx(plain, rel=1e-5)


@pytest.mark.parametrize(
    "options_of_mode",
    [
        ("parallel.mode=ep",),
        ("parallel.mode=fssdp-keep",),  # link, overlap degree and loads are measured, and part of the checkpoint
        ("parallel.mode=fssdp-rm", "parallel.overlap_degree=2", "parallel.reshard_interval=3"),
    ],
)
def test_a_resumed_run_is_bit_equal_to_the_uninterrupted_one(
    corpus: Path, tmp_path: Path, options_of_mode: tuple[str, ...]
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    args = (*STEPS, *options_of_mode)
    assert run_forked(2, *options(corpus, whole, *args)).returncode == 0
    assert run_forked(2, *options(corpus, parts, *args, "train.stop_after=7")).returncode == 0
    assert run_forked(2, "--resume", str(only_run(parts)), "train.stop_after=null").returncode == 0
    assert losses(only_run(parts)) == losses(only_run(whole))


def biases(work: Path) -> dict[str, Tensor]:
    """The gates' selection biases of the exported model."""
    tensors = load_file(only_run(work) / "model" / "model.safetensors")
    return {name: tensor for name, tensor in tensors.items() if name.endswith("selection_bias")}


def test_pain_15_the_selection_bias_moves_once_a_step_by_all_ranks_loads(corpus: Path, tmp_path: Path) -> None:
    """torchtitan 1324, 1506: accumulation, ranks that see other tokens and a resume change nothing about it."""
    steps = ("train.steps=8", "train.global_batch=12", "model.moe.num_experts=6", "train.compute_dtype=fp64")
    args = (*steps, "gate.balance=bias", "gate.bias_update_rate=0.01")
    spread = ("parallel.mode=fssdp-keep", "parallel.overlap_degree=2", "train.micro_batch=2")
    alone = run_forked(1, *options(corpus, tmp_path / "one", *args, "train.micro_batch=null"))
    assert alone.returncode == 0, alone.stderr
    assert run_forked(2, *options(corpus, tmp_path / "two", *args, *spread, "train.stop_after=5")).returncode == 0
    assert run_forked(3, "--resume", str(only_run(tmp_path / "two")), "train.stop_after=null").returncode == 0
    wanted, found = biases(tmp_path / "one"), biases(tmp_path / "two")
    assert len(wanted) == len(found) == 2
    for name, bias_E in wanted.items():
        moves_E = (bias_E / 0.01).round()
        assert torch.allclose(bias_E.double(), 0.01 * moves_E.double(), atol=1e-6), "moves are of one size"
        assert 0 < moves_E.abs().max() <= 8, "one move a step"
        assert torch.equal((found[name] / 0.01).round().to(moves_E), moves_E)


def test_a_rank_that_hangs_is_named_after_the_time_out(corpus: Path, tmp_path: Path) -> None:
    args = ("train.steps=100000", "parallel.mode=ep", "parallel.timeout_s=5", "model.num_layers=6")
    process = start(2, *options(corpus, tmp_path, *args))
    wait_for_step(process, tmp_path, 2)
    workers = subprocess.run(
        ["ps", "--ppid", str(process.pid), "-o", "pid="], capture_output=True, text=True, check=True
    ).stdout.split()
    os.kill(int(workers[1]), signal.SIGSTOP)
    overdue = threading.Timer(60, process.kill)
    overdue.start()
    output = ""
    assert process.stdout is not None
    for line in process.stdout:
        output += line
        if "another rank is late" in line:  # torchrun would wait 30 s for the one that cannot answer
            os.kill(int(workers[1]), signal.SIGKILL)
    overdue.cancel()
    assert process.wait() not in (0, None)
    # The signal strikes where it strikes: between the layers' exchanges the rank is missed by the step's own sums.
    in_a_layer = r"layer \d .*rank 1 did not (send its|take my)"
    between = r"rank 1 does not answer, in step \d+, \w+"
    assert re.search(rf"rank 0: error: another rank is late: .*({in_a_layer}|{between})", output), output


def test_pain_14_the_others_go_on_without_a_rank_that_was_killed(corpus: Path, tmp_path: Path) -> None:
    """Experts and their optimizer state are on one rank each; the last checkpoint has them all (vLLM 27774)."""
    steady = ("optim.schedule=constant", "optim.warmup_steps=0", "train.global_batch=12", "checkpoint.interval=2")
    args = (*steady, "model.moe.num_experts=6")
    sharded = ("parallel.mode=fssdp-rm", "parallel.timeout_s=20")
    process = start(3, *options(corpus, tmp_path / "three", *args, *sharded, "train.steps=100000"))
    folder = wait_for_step(process, tmp_path / "three", 5)
    workers = subprocess.run(
        ["ps", "--ppid", str(process.pid), "-o", "pid="], capture_output=True, text=True, check=True
    ).stdout.split()
    os.kill(int(workers[2]), signal.SIGKILL)
    output, _ = process.communicate(timeout=90)
    assert process.returncode not in (0, None), output
    saved = max(int(path.name.removeprefix("step_")) for path in (folder / "checkpoints").glob("step_??????"))
    until = f"train.stop_after={saved + 3}"
    resumed = run_forked(2, "--resume", str(folder), until)
    assert resumed.returncode == 0, resumed.stderr
    alone = run_forked(1, *options(corpus, tmp_path / "one", *args, until, "train.steps=100000"))
    assert alone.returncode == 0, alone.stderr
    assert losses(folder) == pytest.approx(losses(only_run(tmp_path / "one")), rel=1e-5)


def test_ranks_with_other_options_are_told_which(corpus: Path, tmp_path: Path) -> None:
    port = str(free_port())
    processes = []
    for rank, lr in ((0, "1e-3"), (1, "2e-3")):
        env = {
            **environment(),
            "RANK": str(rank),
            "WORLD_SIZE": "2",
            "LOCAL_RANK": str(rank),
            "LOCAL_WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        args = [sys.executable, "launch/train.py", *options(corpus, tmp_path, *STEPS, f"optim.lr={lr}")]
        processes.append(subprocess.Popen(args, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True))
    errors = [process.communicate(timeout=90)[1] for process in processes]
    assert [process.returncode for process in processes] == [2, 2]
    assert "optim.lr: 0.002 on rank 1, 0.001 on rank 0; all ranks need the same options" in errors[0]
    assert not (tmp_path / "runs").exists()
