"""What a person sees: a start banner, one line per log interval, a progress bar where there is a terminal; and log.txt.

Colours and the bar appear on a terminal only, and not with NO_COLOR or a dumb terminal; log.txt is always plain.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from launch.callbacks.base import Callback
from launch.records import EvalRecord, LogRecord, RunInfo, SampleRecord


class _Console(Console):
    """A console whose reader may leave (``| head``): what follows goes to log.txt only. rich itself would exit."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class ConsoleLog(Callback):
    """Prints to stdout (unless quiet) and appends the same as plain text to ``log_path``."""

    def __init__(self, log_path: Path, quiet: bool, stream: TextIO | None = None) -> None:
        self._console = _Console(file=stream or sys.stdout, quiet=quiet, highlight=False, soft_wrap=True)
        self._log_path = log_path
        self._log: TextIO | None = None
        self._bar: Progress | None = None
        self._steps = 0

    def on_start(self, info: RunInfo) -> None:
        self._steps = info.steps
        self._log = self._log_path.open("a", encoding="utf-8")
        table = Table(title=f"moeyard: {info.name}", show_header=False, title_justify="left", box=None, padding=(0, 1))
        table.add_column(style="bold")
        table.add_column(overflow="fold")
        for label, text in info.derived.items():
            table.add_row(label, text)
            self._write_log(f"{label}: {text}")
        self._console.print(table)
        if self._console.is_terminal and not self._console.is_dumb_terminal and not self._console.quiet:
            self._bar = Progress(
                TextColumn("step {task.completed}/{task.total}"),
                BarColumn(),
                TextColumn("{task.percentage:>3.0f}%"),
                TimeRemainingColumn(),
                console=self._console,
                transient=True,
            )
            self._bar.add_task("train", total=info.steps, completed=info.start_step)
            self._bar.start()

    def on_step(self, step: int) -> None:
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=step)

    def on_log(self, record: LogRecord) -> None:
        self._say(format_log(record, self._steps))

    def on_eval(self, record: EvalRecord) -> None:
        what = "final validation" if record.final else "validation"
        self._say(
            f"step {record.step}/{self._steps}  {what}: {record.bits_per_byte:.4f} bits per byte,"
            f" loss {record.loss:.4f} over {record.tokens:,} tokens ({record.elapsed_s:.1f} s){_surrogate(record)}",
            style="bold green",
        )

    def on_sample(self, record: SampleRecord) -> None:
        shown = (record.prompt + record.text).strip() or "(nothing but the end of the text)"
        self._say(f"step {record.step}/{self._steps}  sample:", style="bold")
        for line in shown.splitlines():
            self._say(f"  | {line}", style="cyan")

    def on_checkpoint(self, step: int, path: Path) -> None:
        self._say(f"step {step}/{self._steps}  checkpoint {path}", style="dim")

    def on_message(self, text: str) -> None:
        self._say(text, style="yellow")

    def on_end(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        if self._log is not None:
            self._log.close()
            self._log = None

    def _say(self, text: str, style: str = "") -> None:
        self._console.print(Text(text, style=style))
        self._write_log(text)

    def _write_log(self, text: str) -> None:
        if self._log is not None:
            self._log.write(text + "\n")
            self._log.flush()


def format_log(record: LogRecord, steps: int) -> str:
    """One log line; every number in it is one of the record's."""
    ranks = ""
    if record.engine is not None:
        ranks = f"  ranks {record.engine.imbalance_before:.2f}->{record.engine.imbalance_after:.2f}"
        if record.engine.hidden_share is not None:
            ranks += f"  hid {record.engine.hidden_share:.0%}"
    return (
        f"step {record.step}/{steps} {record.step / steps:4.0%}  loss {record.loss:.4f}  gnorm {record.grad_norm:.2f}"
        f"  lr {record.lr:.2e}  {record.tokens_per_s:,.0f} tok/s  imb {record.imbalance:.2f}"
        f"{ranks}  drop {record.dropped_fraction:.1%}  mem {record.memory_gib:.2f} GiB"
        f"  eta {format_duration(record.eta_s)}"
    )


def format_duration(seconds: float) -> str:
    """``75`` -> ``1m15s``; ``3700`` -> ``1h01m``."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def _surrogate(record: EvalRecord) -> str:
    """How the gate that generates text agrees with the trained one, where these are two."""
    if not record.surrogate:
        return ""
    found = record.surrogate
    return (
        f"; routed as in generation: {found['agreement']:.0%} of the pairs of the trained gate,"
        f" max_vio {found['max_vio']:.2f} for {found['batch_max_vio']:.2f}"
    )
