"""Training when something goes wrong: what a user reads, and what is left.

Faults that no option can cause are made by a program that breaks one function and then runs the trainer as it is.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from parallel.checkpoint import find_checkpoint, read_checkpoint
from tests.harness import free_port
from tests.training_program import ROOT, SMALL, environment, only_run, options, run_forked, start, wait_for_step

pytestmark = [pytest.mark.e2e, pytest.mark.slow]


def test_a_rank_that_dies_ends_the_run_without_a_hang(corpus: Path, tmp_path: Path) -> None:
    process = start(2, *options(corpus, tmp_path, "train.steps=100000"))
    wait_for_step(process, tmp_path, 2)
    workers = subprocess.run(
        ["ps", "--ppid", str(process.pid), "-o", "pid="], capture_output=True, text=True, check=True
    ).stdout.split()
    assert len(workers) == 2
    os.kill(int(workers[1]), signal.SIGKILL)
    output, _ = process.communicate(timeout=90)
    assert process.returncode not in (0, None), output
    assert "Signal 9" in output or "SIGKILL" in output, output


def test_nan_stops_names_the_layer_and_keeps_the_last_good_checkpoint(corpus: Path, tmp_path: Path) -> None:
    args = options(corpus, tmp_path, "train.steps=40", "optim.lr=1e18", "optim.clip_norm=0", "checkpoint.interval=1")
    result = run_forked(1, *args)
    assert result.returncode == 1, result.stdout + result.stderr
    assert re.search(r"error: step \d+: loss", result.stderr), result.stderr
    assert re.search(r"blocks\.\d|embed|norm", result.stderr), result.stderr
    assert "Traceback" not in result.stderr
    read_checkpoint(find_checkpoint(only_run(tmp_path) / "checkpoints"))


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a tiny file system; run as root")
def test_a_full_disk_while_saving_is_reported_and_loses_nothing(corpus: Path, tmp_path: Path) -> None:
    disk = tmp_path / "runs"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], check=False)
    if mounted.returncode != 0:
        pytest.skip("this machine does not let root mount a tmpfs")
    try:
        # One checkpoint fits, two do not.
        result = run_forked(
            1, *options(corpus, tmp_path, "train.steps=12", "checkpoint.interval=4", "checkpoint.keep_last=1")
        )
        output = result.stdout + result.stderr
        assert "No space left on device" in output, output
        assert result.returncode == 1, output
        info = read_checkpoint(find_checkpoint(only_run(tmp_path) / "checkpoints"))
        assert info.step == 4
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def run_broken(tmp_path: Path, ranks: int, fault: str, *args: str) -> subprocess.CompletedProcess[str]:
    """Run the trainer after the Python statements ``fault``."""
    program = tmp_path / "broken.py"
    program.write_text(
        f"import os, sys\nsys.path.insert(0, {str(ROOT)!r})\n{fault}\n"
        "from launch.train import main\nsys.exit(main(sys.argv[1:]))\n"
    )
    several = ["-m", "torch.distributed.run", f"--nproc-per-node={ranks}", f"--master-port={free_port()}"]
    return subprocess.run(
        [sys.executable, *several, str(program), *args],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )


REFUSE_ON_RANK_1 = """
import launch.trainer
from gates import GateNumericsError
forward = launch.trainer.Trainer._forward
def refuse(self, ids_BS, step, row, **options):
    if self.topology.rank == 1 and step == 2:
        raise GateNumericsError("scores of 3 of 64 tokens are NaN or infinite")
    return forward(self, ids_BS, step, row, **options)
launch.trainer.Trainer._forward = refuse
"""
INFINITE_ON_RANK_0 = """
import launch.trainer
train_step = launch.trainer.Trainer._train_step
def spoil(self):
    if self.topology.rank == 0 and self.step == 2:
        self.model.norm.register_forward_hook(lambda module, inputs, output: output * float("inf"))
    return train_step(self)
launch.trainer.Trainer._train_step = spoil
"""


@pytest.mark.parametrize(
    ("fault", "more", "named"),
    [
        (REFUSE_ON_RANK_1, [], "scores of 3 of 64 tokens"),
        (INFINITE_ON_RANK_0, ["gate.balance_scope=global"], "norm (RMSNorm) is the first"),
    ],
    ids=["gate-refuses", "global-balance"],
)
def test_nan_on_one_rank_after_the_first_step_stops_all_with_its_name(
    fault: str, more: list[str], named: str, corpus: Path, tmp_path: Path
) -> None:
    """Ranks must meet in the same collectives although one of them has no loss, or looks for the culprit alone."""
    args = options(corpus, tmp_path, "train.steps=9", "parallel.timeout_s=30", *more)
    result = run_broken(tmp_path, 2, fault, *args)
    output = result.stdout + result.stderr
    assert result.returncode != 0, output
    assert "error: step 3: loss" in output, output
    assert named in output, output
    assert "EnforceNotMet" not in output
    assert "Timed out" not in output


def test_scores_that_are_not_finite_in_evaluation_name_the_step(corpus: Path, tmp_path: Path) -> None:
    spoiled = ["optim.lr=1e18", "optim.clip_norm=0", "optim.warmup_steps=0", "eval.interval=1"]
    result = run_forked(1, *options(corpus, tmp_path, "train.steps=5", *spoiled))
    assert result.returncode == 1, result.stdout + result.stderr
    assert re.search(r"error: (evaluation after )?step 1", result.stderr), result.stderr
    assert "Traceback" not in result.stderr


def test_a_prompt_longer_than_the_context_is_cut_and_the_run_ends_well(corpus: Path, tmp_path: Path) -> None:
    args = options(corpus, tmp_path, "train.steps=2", "model.max_seq_len=32", f"eval.sample_prompt={'word ' * 30}")
    result = run_forked(1, *args)
    assert result.returncode == 0, result.stdout + result.stderr
    assert (only_run(tmp_path) / "model" / "config.json").is_file()


def test_resume_with_other_ranks_and_micro_batch_says_what_changed(corpus: Path, tmp_path: Path) -> None:
    args = options(corpus, tmp_path, "train.steps=4", "train.micro_batch=8", "train.stop_after=2")
    # Options may stand on either side of overrides.
    begun = run_forked(1, args[0], "--quiet", *args[1:])
    assert begun.returncode == 0, begun.stdout + begun.stderr
    run_dir = only_run(tmp_path)
    changes = ["train.micro_batch=2", "train.stop_after=null", "optim.weight_decay=0.05"]
    resumed = run_forked(2, "--resume", str(run_dir), *changes)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert "changed since the checkpoint: train.micro_batch: 8 -> 2" in resumed.stdout
    assert "changed since the checkpoint: optim.weight_decay: 0.1 -> 0.05" in resumed.stdout
    assert "weight_decay: 0.05" in (run_dir / "config.yaml").read_text()
    commands = (run_dir / "command.txt").read_text().splitlines()
    assert len(commands) == 2
    assert commands[1].endswith(" ".join(changes))
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["kind"] == "eval" and row["final"]] == [4]


def test_a_damaged_checkpoint_is_found_out_before_anything_in_the_run_changes(corpus: Path, tmp_path: Path) -> None:
    begun = run_forked(1, *options(corpus, tmp_path, "train.steps=8"))
    assert begun.returncode == 0, begun.stdout + begun.stderr
    run_dir = only_run(tmp_path)
    damaged = run_dir / "checkpoints" / "step_000004"
    metadata = damaged / ".metadata"
    metadata.write_bytes(b"\x00" * metadata.stat().st_size)
    metrics = (run_dir / "metrics.jsonl").read_bytes()
    resumed = run_forked(1, "--resume", str(damaged))
    assert resumed.returncode == 1, resumed.stdout + resumed.stderr
    assert f"a good one is {run_dir / 'checkpoints' / 'step_000008'}" in resumed.stderr, resumed.stderr
    assert "Traceback" not in resumed.stderr
    assert (run_dir / "metrics.jsonl").read_bytes() == metrics
    assert read_checkpoint(find_checkpoint(run_dir / "checkpoints")).step == 8
    outside = tmp_path / "elsewhere" / "checkpoints"
    outside.parent.mkdir()
    (run_dir / "checkpoints").rename(outside)
    stray = run_forked(1, "--resume", str(outside))
    outside.rename(run_dir / "checkpoints")
    assert stray.returncode == 2, stray.stdout + stray.stderr
    assert f"{tmp_path / 'elsewhere'} is not a run directory: it has no config.yaml" in stray.stderr
    too_short = run_forked(1, "--resume", str(run_dir), "train.steps=6")
    assert too_short.returncode == 2, too_short.stdout + too_short.stderr
    assert "train.steps: 6 steps are over already" in too_short.stderr


def test_a_reader_that_leaves_does_not_end_the_training(corpus: Path, tmp_path: Path) -> None:
    line = shlex.join([sys.executable, "launch/train.py", *options(corpus, tmp_path, "train.steps=6")])
    result = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {line} | head -n 2"],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert len(result.stdout.splitlines()) == 2
    assert "Traceback" not in result.stderr
    assert "final validation" in (only_run(tmp_path) / "log.txt").read_text()
    assert (only_run(tmp_path) / "model" / "config.json").is_file()


def test_a_meeting_point_that_is_taken_is_named(corpus: Path, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        own = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        result = subprocess.run(
            [sys.executable, "launch/train.py", *options(corpus, tmp_path, "train.steps=2")],
            cwd=ROOT,
            env=environment() | own | where,
            capture_output=True,
            text=True,
            timeout=120,
        )
    assert result.returncode == 1, result.stdout + result.stderr
    assert f"127.0.0.1:{port} is in use" in result.stderr, result.stderr
    assert "Traceback" not in result.stderr


def test_nodes_without_a_shared_file_system_are_told_so(corpus: Path, tmp_path: Path) -> None:
    rendezvous = [f"--master-port={free_port()}", "--master-addr=127.0.0.1", "--nnodes=2", "--nproc-per-node=1"]
    data = [f"data.sources=[{{source: {corpus}}}]", f"data.cache={corpus / 'cache'}", "run.root=runs", "train.steps=2"]
    fault = "import launch.assemble; launch.assemble.SHARED_FILES_S = 1.0"
    program = tmp_path / "node.py"
    program.write_text(
        f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{fault}\n"
        "from launch.train import main\nsys.exit(main(sys.argv[1:]))\n"
    )
    nodes = []
    for number in range(2):
        (tmp_path / f"node{number}").mkdir()
        agent = [sys.executable, "-m", "torch.distributed.run", *rendezvous, f"--node-rank={number}"]
        nodes.append(
            subprocess.Popen(
                [*agent, str(program), *SMALL, *data],
                cwd=tmp_path / f"node{number}",
                env=environment(),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    outputs = [node.communicate(timeout=120)[0] for node in nodes]
    assert 0 not in [node.returncode for node in nodes], "\n".join(outputs)
    assert "rank 1 does not see the run directory" in outputs[0], outputs[0]
    assert "shared file system" in outputs[0]
