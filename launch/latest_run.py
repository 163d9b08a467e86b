"""The newest run of a name, in a few lines: result, sample, where its files are, what to do next."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from launch.run_dir import CHECKPOINT_FOLDER, METRICS_FILE, MODEL_FOLDER, RunDirError, list_runs
from parallel.checkpoint import list_checkpoints


def describe_latest(root: Path, name: str, begin: str) -> Iterator[str]:
    """Lines about the newest run called ``name`` under ``root``.

    Args:
        begin: the command that makes such a run.

    Raises:
        RunDirError: there is none.
    """
    runs = list_runs(root, name)
    if not runs:
        raise RunDirError(f"there is no run named {name!r} under {root}; make one with: {begin}")
    run = runs[-1]
    rows = read_rows(run)
    sample = _last(rows, "sample")
    if sample is not None:
        yield "sample:"
        for line in (str(sample["prompt"]) + str(sample["text"])).strip().splitlines():
            yield f"  | {line}"
    evaluation, training = _last(rows, "eval"), _last(rows, "train")
    if training is not None:
        took = f"{training['elapsed_s'] / 60:.1f} min, {training['tokens_seen']:,} tokens"
        yield f"trained        {training['step']:,} steps, {took}, imbalance {training['imbalance']:.2f}"
    if evaluation is not None:
        yield f"bits per byte  {evaluation['bits_per_byte']:.4f} on held-out text, at step {evaluation['step']:,}"
    if training is None:
        yield "trained        nothing was logged yet"
    yield f"run directory  {run}"
    pictures = sorted((run / "heatmaps").glob("*.png"))
    if pictures:
        yield f"expert loads   {pictures[-1]}  ({len(pictures)} picture(s))"
    quoted = shlex.quote(str(run))
    if rows:
        yield f"report         moeyard report {quoted}"
    if (run / MODEL_FOLDER).is_dir():
        yield f"talk           moeyard generate {quoted} 'ROMEO:'"
        yield f"serve          moeyard serve {quoted}"
    elif list_checkpoints(run / CHECKPOINT_FOLDER):
        yield f"go on          moeyard train --resume {quoted}"
    else:
        yield "go on          it has no checkpoint to go on from; start again"


def read_rows(run: Path) -> list[dict[str, Any]]:
    """Rows of a run's metrics file, none without the file; a row that a kill cut short is left out."""
    metrics, rows = run / METRICS_FILE, []
    for line in metrics.read_text(encoding="utf-8", errors="replace").splitlines() if metrics.is_file() else ():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def _last(rows: list[dict[str, Any]], kind: str) -> dict[str, Any] | None:
    return next((row for row in reversed(rows) if row.get("kind") == kind), None)
