"""Training as a user runs it: torchrun and the program, real processes, real files.

Resume: training.md's pain 5 (resume at another world size) and DESIGN's promise of bit-equality at the same one.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from parallel.checkpoint import find_checkpoint, list_checkpoints, read_checkpoint
from tests.harness import free_port
from tests.training_program import ROOT, environment, losses, only_run, options, run, run_forked, start, wait_for_step

pytestmark = [pytest.mark.e2e, pytest.mark.slow]


@pytest.fixture(scope="module")
def uninterrupted(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve steps on two ranks, checkpoints at 4 and 8."""
    work = tmp_path_factory.mktemp("uninterrupted")
    result = run(2, *options(corpus, work, "train.steps=12"))
    assert result.returncode == 0, result.stdout + result.stderr
    return only_run(work)


def copied(source: Path, work: Path, step: int) -> Path:
    """A copy of the run as it was when ``step`` was its newest checkpoint."""
    target = work / "runs" / source.name
    shutil.copytree(source, target)
    for checkpoint in list_checkpoints(target / "checkpoints"):
        if int(checkpoint.name.removeprefix("step_")) > step:
            shutil.rmtree(checkpoint)
    (target / "checkpoints" / "latest").write_text(f"step_{step:06d}")
    return target


def test_run_directory_holds_what_the_design_says(uninterrupted: Path) -> None:
    for name in ("config.yaml", "command.txt", "env.json", "metrics.jsonl", "log.txt", "checkpoints/latest"):
        assert (uninterrupted / name).is_file(), name
    assert (uninterrupted / "model" / "config.json").is_file()
    assert (uninterrupted / "model" / "tokenizer.json").is_file()
    curve = losses(uninterrupted)
    assert sorted(curve) == list(range(1, 13))
    assert curve[12] < curve[1]


def test_resume_at_the_same_world_size_continues_bit_for_bit(uninterrupted: Path, tmp_path: Path) -> None:
    resumed = copied(uninterrupted, tmp_path, step=4)
    result = run_forked(2, "--resume", str(resumed))
    assert result.returncode == 0, result.stdout + result.stderr
    assert "resumed from" in result.stdout + result.stderr
    assert (
        "step 4: model, optimizer, schedule, gate state, data position, random state" in result.stdout + result.stderr
    )
    assert losses(resumed) == losses(uninterrupted)


def test_resume_two_then_one_then_four_ranks_stays_within_1e_6(uninterrupted: Path, tmp_path: Path) -> None:
    resumed = copied(uninterrupted, tmp_path, step=4)
    for ranks, steps in ((1, 8), (4, 12)):
        # The schedule must be that of twelve steps: stop early by hand, not by a shorter run.
        stop_at = ["checkpoint.interval=4"] if steps == 12 else ["train.stop_after=8"]
        result = run_forked(ranks, "--resume", str(resumed), *stop_at, "train.micro_batch=2")
        assert result.returncode == 0, result.stdout + result.stderr
        assert "random state starts anew" in result.stdout + result.stderr
    expected, actual = losses(uninterrupted), losses(resumed)
    assert sorted(actual) == sorted(expected)
    for step, loss in expected.items():
        assert actual[step] == pytest.approx(loss, rel=1e-6), step


def test_resume_auto_begins_a_run_and_then_continues_the_newest(corpus: Path, tmp_path: Path) -> None:
    args = options(corpus, tmp_path, "train.steps=4", "checkpoint.interval=2", "run.name=auto")
    begun = run_forked(1, "--resume", "auto", *args, "train.stop_after=2")
    assert begun.returncode == 0, begun.stdout + begun.stderr
    assert "no run named 'auto' under" in begun.stdout
    assert "beginning one" in begun.stdout
    continued = run_forked(1, "--resume", "auto", *args)
    assert continued.returncode == 0, continued.stdout + continued.stderr
    assert "resumed from" in continued.stdout
    assert sorted(losses(only_run(tmp_path))) == [1, 2, 3, 4]


def test_same_seed_same_curve_other_seed_other_curve(corpus: Path, uninterrupted: Path, tmp_path: Path) -> None:
    result = run(2, *options(corpus, tmp_path, "train.steps=12", "checkpoint.interval=0"))
    assert result.returncode == 0, result.stdout + result.stderr
    assert losses(only_run(tmp_path)) == losses(uninterrupted)
    other = run_forked(1, *options(corpus, tmp_path / "other", "train.steps=2", "run.seed=1"))
    assert other.returncode == 0, other.stdout + other.stderr
    assert losses(only_run(tmp_path / "other"))[1] != losses(uninterrupted)[1]


def test_two_nodes_on_loopback_give_the_curve_of_one_node(corpus: Path, uninterrupted: Path, tmp_path: Path) -> None:
    rendezvous = [f"--master-port={free_port()}", "--master-addr=127.0.0.1", "--nnodes=2", "--nproc-per-node=1"]
    args = options(corpus, tmp_path, "train.steps=12", "train.stop_after=3", "checkpoint.interval=0")
    nodes = [
        subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", *rendezvous, f"--node-rank={n}", "launch/train.py", *args],
            cwd=ROOT,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for n in range(2)
    ]
    outputs = [node.communicate(timeout=120)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], "\n".join(outputs)
    assert "torchrun --nnodes 2 --nproc-per-node 1 launch/train.py --resume" in outputs[0]
    assert losses(only_run(tmp_path)) == {step: losses(uninterrupted)[step] for step in (1, 2, 3)}


def test_one_interrupt_saves_and_prints_the_resume_command(corpus: Path, tmp_path: Path) -> None:
    process = start(1, *options(corpus, tmp_path, "train.steps=100000"))
    run_dir = wait_for_step(process, tmp_path, 3)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    saved = read_checkpoint(find_checkpoint(run_dir / "checkpoints")).step
    assert saved == max(losses(run_dir)), output
    command_line = re.search(r"resume with: (.*)", output)
    assert command_line, output
    assert command_line.group(1).strip() == f"python launch/train.py --resume {run_dir}"
    result = run_forked(1, "--resume", str(run_dir), f"train.steps={saved + 2}")
    assert result.returncode == 0, result.stdout + result.stderr
    assert sorted(losses(run_dir)) == list(range(1, saved + 3))


def test_interrupting_torchrun_saves_on_all_ranks(corpus: Path, tmp_path: Path) -> None:
    process = start(2, *options(corpus, tmp_path, "train.steps=100000"))
    run_dir = wait_for_step(process, tmp_path, 3)
    os.killpg(process.pid, signal.SIGINT)  # what a terminal does
    output, _ = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "resume with: torchrun --nproc-per-node 2 launch/train.py --resume" in output
    assert read_checkpoint(find_checkpoint(run_dir / "checkpoints")).step == max(losses(run_dir))


def test_a_kill_at_any_moment_leaves_a_usable_checkpoint(corpus: Path, tmp_path: Path) -> None:
    """Checkpoints every step, SIGKILL at growing delays: what ``latest`` names always reads back and resumes."""
    args = options(corpus, tmp_path, "train.steps=100000", "checkpoint.interval=1", "checkpoint.keep_last=2")
    run_dir: Path | None = None
    for delay_s in (0.0, 0.013, 0.05, 0.11):
        process = start(1, *(args if run_dir is None else ["--resume", str(run_dir)]))
        seen = max(losses(run_dir)) if run_dir else 0
        run_dir = wait_for_step(process, tmp_path, seen + 3)
        time.sleep(delay_s)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate(timeout=30)
        info = read_checkpoint(find_checkpoint(run_dir / "checkpoints"))
        assert info.step > 0


def test_all_option_errors_at_once_with_nearest_names(corpus: Path, tmp_path: Path) -> None:
    result = run(1, *options(corpus, tmp_path, "optim.lrr=1", "train.steps=many", "gate.kk=3"))
    assert result.returncode == 2
    for text in ("optim.lrr", "Did you mean", "train.steps", "gate.kk"):
        assert text in result.stderr, result.stderr
    assert "Traceback" not in result.stderr


def test_resume_of_another_structure_names_the_differing_path(uninterrupted: Path, tmp_path: Path) -> None:
    resumed = copied(uninterrupted, tmp_path, step=4)
    result = run_forked(1, "--resume", str(resumed), "model.moe.num_experts=8")
    assert result.returncode == 2, result.stdout + result.stderr
    assert "model.moe.num_experts" in result.stderr


def test_dry_run_prints_numbers_and_writes_nothing(corpus: Path, tmp_path: Path) -> None:
    result = run(1, "--dry-run", *options(corpus, tmp_path, "model.vocab_size=300"))
    assert result.returncode == 0, result.stderr
    for text in ("parameters", "FLOPs", "memory"):
        assert text.lower() in result.stdout.lower(), result.stdout
    assert not (tmp_path / "runs").exists()
