"""One training run for each gate and seed: its config, its folder, and whether it is finished, begun or still to do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from launch.config import TrainConfig
from launch.config_file import config_from_values, dump_config, flatten
from launch.latest_run import read_rows
from launch.run_dir import CHECKPOINT_FOLDER, CONFIG_FILE, METRICS_FILE, MODEL_FOLDER, RunDir, list_runs
from moe.errors import ConfigError
from parallel.checkpoint import list_checkpoints

_TAIL_BYTES = 1 << 16


@dataclass(frozen=True)
class PlannedRun:
    """A gate under one seed. ``config`` is the whole config of its training."""

    label: str
    seed: int
    config: TrainConfig

    @property
    def name(self) -> str:
        return self.config.run.name

    def folder(self) -> Path | None:
        """Its run directory, None before it has begun."""
        runs = list_runs(self.config.run.root, self.name)
        return runs[-1] if runs else None

    def is_finished(self) -> bool:
        """Whether its last evaluation is written and its model exported."""
        folder = self.folder()
        if folder is None or not (folder / MODEL_FOLDER / "config.json").is_file():
            return False
        return any(row.get("kind") == "eval" and row.get("final") for row in read_rows(folder))

    def step(self) -> int:
        """Steps that its metrics tell of so far."""
        folder = self.folder()
        metrics = folder / METRICS_FILE if folder else None
        if metrics is None or not metrics.is_file():
            return 0
        with metrics.open("rb") as file:
            file.seek(max(0, metrics.stat().st_size - _TAIL_BYTES))
            lines = file.read().splitlines()
        for line in reversed(lines):
            try:
                row = json.loads(line)
            except ValueError:  # cut at either end
                continue
            if row.get("kind") == "train":
                return int(row["step"])
        return 0


def plan_runs(base: TrainConfig, gates: Mapping[str, Mapping[str, Any]], seeds: int, out: Path) -> list[PlannedRun]:
    """All runs, the first seed of every gate before the second of any.

    Runs of one seed see the same text in the same order, and the same initial weights outside of the gate.

    Args:
        base: the config without its gate; run.seed is the first of the seeds.
        out: folder that gets ``runs/``.

    Raises:
        ConfigError: with these options, the config cannot be trained.
    """
    if base.train.stop_after is not None:
        raise ConfigError(["train.stop_after: a comparison trains to the end; train.steps makes it shorter"])
    planned, problems = [], []
    for number in range(seeds):
        for label, options in gates.items():
            seed = base.run.seed + number
            values = base.model_dump(mode="json")
            values["gate"] = dict(options)
            values["run"] |= {"name": f"{label}-seed{seed}", "root": str(out / "runs"), "seed": seed}
            values["checkpoint"]["keep_last"] = 1
            try:
                config = config_from_values(values, [], origin=f"gate {label}", world_size=1)
            except ConfigError as error:
                problems += str(error).splitlines()
                continue
            planned.append(PlannedRun(label, seed, config))
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))
    return planned


def check_same_options(runs: Sequence[PlannedRun], out: Path) -> None:
    """Refuse to mix runs of other options with these.

    Raises:
        ConfigError: ``out`` holds a run of another config; says in what it differs.
    """
    problems = []
    for run in runs:
        folder = run.folder()
        if folder is None:
            continue
        before = flatten(yaml.safe_load((folder / CONFIG_FILE).read_text(encoding="utf-8")))
        now = flatten(yaml.safe_load(dump_config(run.config)))
        alike = {"run.root"}
        if run.config.model.vocab_size is None:  # training has filled in the tokenizer's
            alike.add("model.vocab_size")
        different = [
            f"{path} {before.get(path)!r} -> {now.get(path)!r}"
            for path in sorted(before.keys() | now.keys())
            if before.get(path) != now.get(path) and path not in alike
        ]
        if different:
            problems.append(f"{folder} was trained with other options: {', '.join(different[:4])}")
    if problems:
        more = [f"... and {len(problems) - 3} more"] if len(problems) > 3 else []
        hint = f"a comparison takes one config: give --out another folder than {out}, or remove it"
        raise ConfigError([*problems[:3], *more, hint])


def prepare_folder(run: PlannedRun) -> Path | None:
    """The run directory to resume; None when the run has to begin anew, and what it left before is removed.

    Raises:
        RunDirError: another process trains there.
    """
    folder = run.folder()
    if folder is None:
        return None
    with RunDir.open(folder).locked():
        if list_checkpoints(folder / CHECKPOINT_FOLDER):
            return folder
        shutil.rmtree(folder)  # stopped before its first checkpoint: there is nothing to go on from
    return None


def drop_checkpoints(run: PlannedRun) -> None:
    """A finished run keeps its metrics and its exported model; checkpoints of dozens of runs would fill the disk."""
    folder = run.folder()
    if folder is not None:
        shutil.rmtree(folder / CHECKPOINT_FOLDER, ignore_errors=True)


@contextmanager
def only_one(out: Path) -> Iterator[None]:
    """Within, no other comparison works in ``out``. RunDirError when one does."""
    out.mkdir(parents=True, exist_ok=True)
    with RunDir(out).locked():
        yield
