"""launch/train.py as a user runs it: small options, real processes, and how to read what a run wrote."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from launch.train import main
from tests.harness import RANKS, free_port

ROOT = Path(__file__).resolve().parents[1]
SMALL = [
    "data.tokenizer.kind=bytes",
    "data.validation_fraction=0.2",
    "model.dim=32",
    "model.num_layers=2",
    "model.num_heads=2",
    "model.moe.num_experts=4",
    "model.moe.hidden_dim=32",
    "train.seq_len=32",
    "train.global_batch=8",
    "train.micro_batch=2",
    "optim.warmup_steps=2",
    "eval.interval=0",
    "eval.sample_interval=0",
    "eval.sample_tokens=4",
    "eval.final_sequences=8",
    "track.log_interval=1",
    "track.heatmap_interval=0",
    "track.tensorboard=false",
    "checkpoint.interval=4",
    "checkpoint.keep_last=9",
]


def options(corpus: Path, work: Path, *more: str) -> list[str]:
    data = [f"data.sources=[{{source: {corpus}}}]", f"data.cache={corpus / 'cache'}", f"run.root={work / 'runs'}"]
    return [*SMALL, *data, *more]


def command(ranks: int, *args: str) -> list[str]:
    if ranks == 1:
        return [sys.executable, "launch/train.py", *args]
    port = f"--master-port={free_port()}"
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        str(ranks),
        port,
        "launch/train.py",
        *args,
    ]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "NO_COLOR": "1"}


def run(ranks: int, *args: str, timeout: float = 180) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(ranks, *args), cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=timeout, check=False
    )


def run_forked(ranks: int, *args: str, timeout: float = 180) -> subprocess.CompletedProcess[str]:
    """As :func:`run`, but without a launcher, in processes that have imported torch already: many seconds less."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        outputs = [f"/proc/{os.getpid()}/fd/{stream.fileno()}" for stream in (out, err)]
        port = free_port()
        processes = [RANKS.Process(target=_train, args=(rank, ranks, port, args, outputs)) for rank in range(ranks)]
        for process in processes:
            process.start()
        deadline = time.monotonic() + timeout
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
        late = [process for process in processes if process.is_alive()]
        for process in late:
            process.kill()
        texts = []
        for stream in (out, err):
            stream.seek(0)
            texts.append(stream.read())
    assert not late, f"{len(late)} of {ranks} ranks did not end in {timeout} s:\n{texts[1]}"
    code = max(abs(process.exitcode or 0) for process in processes)
    return subprocess.CompletedProcess([str(ranks), *args], code, *texts)


def _train(rank: int, ranks: int, port: int, args: tuple[str, ...], outputs: list[str]) -> None:
    os.environ.update(environment())
    if ranks > 1:
        os.environ.update(
            RANK=str(rank),
            WORLD_SIZE=str(ranks),
            LOCAL_RANK=str(rank),
            LOCAL_WORLD_SIZE=str(ranks),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
        )
    os.chdir(ROOT)
    for number, path in enumerate(outputs, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), number)
    sys.argv = ["launch/train.py", *args]
    torch.set_num_threads(1)
    sys.exit(main())


def start(ranks: int, *args: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command(ranks, *args),
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def only_run(work: Path) -> Path:
    (found,) = (work / "runs").iterdir()
    return found


def losses(run_dir: Path) -> dict[int, float]:
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows if row["kind"] == "train"}


def wait_for_step(process: subprocess.Popen[str], work: Path, step: int, timeout: float = 90) -> Path:
    """Wait until the run has logged ``step``; returns its folder."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        metrics = list(work.glob("runs/*/metrics.jsonl"))
        if metrics and f'"step": {step},' in metrics[0].read_text():
            return metrics[0].parent
        if process.poll() is not None:
            raise AssertionError(f"ended with {process.returncode} before step {step}:\n{process.stdout.read()}")
        time.sleep(0.1)
    raise AssertionError(f"did not reach step {step} in {timeout} s")
