"""Trains planned runs, several processes side by side, each with ``launch/train.py`` as a user would.

An interrupt lets every process save and stop; whatever is not finished goes on where it was at the next call.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import torch

from launch.config_file import dump_config
from launch.gate_comparison.progress import Progress
from launch.gate_comparison.runs import PlannedRun, drop_checkpoints, prepare_folder
from launch.local_ranks import SAVE_S, TRAIN_PROGRAM

POLL_S = 0.5


@dataclass
class _Job:
    run: PlannedRun
    slot: int
    process: subprocess.Popen[bytes]
    log: TextIO
    began: float


def default_jobs() -> int:
    """Processes side by side: one a GPU, else one a core."""
    return max(1, torch.cuda.device_count() or len(os.sched_getaffinity(0)))


def train_all(runs: Sequence[PlannedRun], out: Path, jobs: int, progress: Progress) -> dict[str, str]:
    """Train what is not finished; returns why by the name of each run that failed. The others are finished then.

    Args:
        out: gets ``configs/`` and ``logs/``.
        jobs: processes side by side; each gets its share of the cores.

    Raises:
        KeyboardInterrupt: interrupted; every process has saved and ended.
        RunDirError: somebody else trains one of the runs.
    """
    for folder in ("configs", "logs"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    waiting = [run for run in runs if not run.is_finished()]
    for run in runs:
        if run not in waiting:
            drop_checkpoints(run)
            progress.already_done(run)
    failures: dict[str, str] = {}
    running: list[_Job] = []
    free = list(range(jobs))
    with _interruptible():
        try:
            while waiting or running:
                while waiting and free:
                    running.append(_start(waiting.pop(0), free.pop(0), out, jobs))
                    progress.started(running[-1].run)
                time.sleep(POLL_S)
                for job in [job for job in running if job.process.poll() is not None]:
                    running.remove(job)
                    free.append(job.slot)
                    job.log.close()
                    failure = _outcome(job, out)
                    if failure:
                        failures[job.run.name] = failure
                    else:
                        drop_checkpoints(job.run)
                    progress.ended(job.run, time.monotonic() - job.began, failure)
                for job in running:
                    progress.at(job.run, job.run.step())
        finally:
            _stop(running, progress)
    return failures


def _start(run: PlannedRun, slot: int, out: Path, jobs: int) -> _Job:
    folder = prepare_folder(run)
    command = [sys.executable, str(TRAIN_PROGRAM), "--quiet"]
    if folder is None:
        config = out / "configs" / f"{run.name}.yaml"
        config.write_text(dump_config(run.config), encoding="utf-8")
        command += ["--config", str(config)]
    else:
        command += ["--resume", str(folder)]
    log = (out / "logs" / f"{run.name}.txt").open("w", encoding="utf-8")
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        env=_environment(slot, jobs),
        start_new_session=True,  # Ctrl-C reaches this process alone, which passes it on once
    )
    return _Job(run, slot, process, log, time.monotonic())


def _environment(slot: int, jobs: int) -> Mapping[str, str]:
    """One process without ranks, its share of the cores, a GPU of its own where there are some."""
    threads = str(max(1, len(os.sched_getaffinity(0)) // jobs))
    foreign = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
    kept = {name: value for name, value in os.environ.items() if name not in foreign}
    gpus = torch.cuda.device_count()
    if gpus:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(gpus)))).split(",")
        kept["CUDA_VISIBLE_DEVICES"] = visible[slot % gpus]
    return {"OMP_NUM_THREADS": threads, **kept}


def _outcome(job: _Job, out: Path) -> str:
    """Empty when the run is finished, else why it is not."""
    code = job.process.returncode
    if code == 0 and job.run.is_finished():
        return ""
    log = out / "logs" / f"{job.run.name}.txt"
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    said = next((line for line in lines if line.startswith("error: ")), lines[-1] if lines else "no output")
    how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    return f"{how}: {said.removeprefix('error: ')[:300]} ({log})"


def _stop(running: Sequence[_Job], progress: Progress) -> None:
    """Let those that still run save and end; a second interrupt ends them at once."""
    if not running:
        return
    progress.line(f"stopping: {len(running)} process(es) save first (once more to stop at once)")
    for job in running:
        with suppress(ProcessLookupError):
            job.process.send_signal(signal.SIGINT)
    deadline = time.monotonic() + SAVE_S
    try:
        for job in running:
            job.process.wait(max(1.0, deadline - time.monotonic()))
    except (KeyboardInterrupt, subprocess.TimeoutExpired):
        for job in running:
            job.process.kill()
            job.process.wait()
    for job in running:
        job.log.close()


@contextmanager
def _interruptible() -> Iterator[None]:
    """SIGTERM and a closed terminal raise KeyboardInterrupt within, as Ctrl-C does."""
    numbers = (signal.SIGTERM, signal.SIGHUP)
    former = [signal.signal(number, signal.default_int_handler) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, former, strict=True):
            signal.signal(number, handler)
