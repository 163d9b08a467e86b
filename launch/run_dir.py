"""The run directory: what a run is called, where its files are, and finding it again.

``runs/<name>-<yyyymmdd-hhmmss>/`` holds config.yaml, command.txt, env.json, metrics.jsonl, log.txt, heatmaps/,
tensorboard/, checkpoints/, tokenizer/, where asked for loads.trace and step_N.trace.json, and, at the end, model/.
"""

from __future__ import annotations

import difflib
import fcntl
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from launch.config import TrainConfig
from launch.config_file import dump_config
from moe.errors import UserError

METRICS_FILE = "metrics.jsonl"
LOAD_TRACE_FILE = "loads.trace"
CONFIG_FILE = "config.yaml"
MODEL_FOLDER = "model"
CHECKPOINT_FOLDER = "checkpoints"
LOCK_FILE = ".lock"
_STAMP = re.compile(r"-([0-9]{8}-[0-9]{6})(?:-([0-9]+))?$")


class RunDirError(UserError):
    """There is no such run, or it lacks what is asked for."""

    exit_code = 2


@dataclass(frozen=True)
class RunDir:
    """One run's folder."""

    path: Path

    @staticmethod
    def create(config: TrainConfig, command: Sequence[str]) -> RunDir:
        """Make a new folder; never one that exists.

        Args:
            command: the program's argv, kept in command.txt.

        Raises:
            RunDirError: the place cannot be written.
        """
        stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
        root = Path(config.run.root)
        for attempt in range(1, 100):
            path = root / (f"{config.run.name}-{stamp}" + (f"-{attempt}" if attempt > 1 else ""))
            try:
                path.mkdir(parents=True)
            except FileExistsError:
                continue
            except OSError as error:
                raise RunDirError(f"cannot create the run directory {path}: {error.strerror}; set run.root") from error
            break
        else:
            raise RunDirError(f"a hundred runs named {config.run.name} were started in one second under {root}")
        for folder in ("heatmaps", CHECKPOINT_FOLDER):
            (path / folder).mkdir()
        (path / CONFIG_FILE).write_text(dump_config(config), encoding="utf-8")
        (path / "command.txt").write_text(shlex.join(command) + "\n", encoding="utf-8")
        (path / "env.json").write_text(json.dumps(environment(), indent=1) + "\n", encoding="utf-8")
        (path / METRICS_FILE).touch()
        return RunDir(path)

    @staticmethod
    def open(path: Path) -> RunDir:
        """An existing run's folder. RunDirError when it is none."""
        if not (path / CONFIG_FILE).is_file():
            raise RunDirError(f"{path} is not a run directory: it has no {CONFIG_FILE}")
        return RunDir(path)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Within, no other process may train into this folder.

        Raises:
            RunDirError: another one does.
        """
        with (self.path / LOCK_FILE).open("a+", encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                file.seek(0)
                who = file.read().strip() or "another process"
                raise RunDirError(f"{self.path} is being trained by {who}; wait for its end, or stop it") from error
            except OSError:
                pass  # a file system without locks
            file.truncate(0)
            file.write(f"process {os.getpid()} on {platform.node()}\n")
            file.flush()
            yield

    def note_resume(self, config: TrainConfig, command: Sequence[str]) -> None:
        """Keep the config that the run goes on with, add the command to those before, and set aside the model that
        was exported: it is not that of the run's newest checkpoint any more.
        """
        if (self.path / MODEL_FOLDER).is_dir():
            aside = self.path / f"{MODEL_FOLDER}.superseded"
            shutil.rmtree(aside, ignore_errors=True)
            os.replace(self.path / MODEL_FOLDER, aside)
        partial = self.path / f"{CONFIG_FILE}.partial"
        partial.write_text(dump_config(config), encoding="utf-8")
        os.replace(partial, self.path / CONFIG_FILE)
        with (self.path / "command.txt").open("a", encoding="utf-8") as file:
            file.write(shlex.join(command) + "\n")

    def truncate_metrics(self, after_step: int) -> None:
        """Drop metrics rows that the resumed run writes again: of steps after ``after_step``, and final ones.

        A last row that a kill cut short is dropped too. The old file stays until the new one is complete.
        """
        metrics = self.path / METRICS_FILE
        kept = []
        for line in metrics.read_text(encoding="utf-8").splitlines() if metrics.is_file() else []:
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if row.get("step", 0) <= after_step and not row.get("final"):
                kept.append(line + "\n")
        partial = metrics.with_name(METRICS_FILE + ".partial")
        partial.write_text("".join(kept), encoding="utf-8")
        os.replace(partial, metrics)


def environment() -> dict[str, object]:
    """Versions and machine, for a run's env.json."""
    packages = {}
    for name in ("moeyard", "torch", "numpy", "pydantic", "safetensors", "tokenizers"):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = "not installed"
    return {
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "cpu_count": os.cpu_count(),
        "packages": packages,
        "git_commit": _git_commit(),
    }


def _git_commit() -> str | None:
    """Commit of the clone that this file is in, with "+changes" when it was edited; None outside a clone."""
    here = Path(__file__).resolve().parent
    try:
        commit = subprocess.run(
            ["git", "rev-parse", "--short=12", "HEAD"], cwd=here, capture_output=True, text=True, timeout=10, check=True
        )
        status = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no"],
            cwd=here,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return commit.stdout.strip() + ("+changes" if status.stdout.strip() else "")


def list_runs(root: str | Path, name: str | None = None) -> list[Path]:
    """Run directories under ``root``, oldest start first; only those called ``name`` if given."""
    found = [p.parent for p in Path(root).glob(f"*/{CONFIG_FILE}")]
    if name is not None:
        found = [p for p in found if p.name.startswith(f"{name}-") and _STAMP.fullmatch(p.name[len(name) :])]
    return sorted(found, key=_started)


def _started(run: Path) -> tuple[str, int, str]:
    """Sorts runs by the time in their names, which no later write changes; folders that were renamed come first."""
    stamp = _STAMP.search(run.name)
    return (stamp[1], int(stamp[2] or 1), run.name) if stamp else ("", 0, run.name)


def find_latest_run(root: str | Path, name: str | None = None) -> Path | None:
    """The newest run of that name that has a complete checkpoint; None when there is none."""
    for run in reversed(list_runs(root, name)):
        if any(p.name.removeprefix("step_").isdigit() for p in (run / CHECKPOINT_FOLDER).glob("step_*")):
            return run
    return None


def resolve_model_dir(path: str | Path) -> Path:
    """The exported model that ``path`` means: a model directory, or a run directory that has one.

    Raises:
        RunDirError: there is none; says how to make it or what is near.
    """
    folder = Path(path)
    if (folder / "config.json").is_file():
        return folder
    if (folder / MODEL_FOLDER / "config.json").is_file():
        return folder / MODEL_FOLDER
    if (folder / CONFIG_FILE).is_file():
        raise RunDirError(f"run {folder} has no exported model yet; make one with: moeyard export {folder}")
    if folder.is_dir():
        raise RunDirError(f"{folder} is neither a run directory (no {CONFIG_FILE}) nor a model (no config.json)")
    beside = [str(p) for p in folder.parent.iterdir() if p.is_dir()] if folder.parent.is_dir() else []
    near = difflib.get_close_matches(str(folder), beside, n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    raise RunDirError(f"there is no folder {folder}.{hint}")
