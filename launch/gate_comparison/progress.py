"""How far a comparison is: bars on a terminal, a line for each finished run elsewhere."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from rich import progress as bars
from rich.console import Console

from launch.gate_comparison.runs import PlannedRun


class Progress:
    """One bar over the steps of all runs, and one for each run that is being trained. Use as a context manager."""

    def __init__(self, runs: int, steps_per_run: int, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True, highlight=False)
        self._runs = runs
        self._steps = steps_per_run
        self._done = 0
        self._at: dict[str, int] = {}
        self._tasks: dict[str, bars.TaskID] = {}
        self._bars: bars.Progress | None = None
        if self._console.is_terminal:
            self._bars = bars.Progress(
                bars.TextColumn("{task.description}"),
                bars.BarColumn(),
                bars.TaskProgressColumn(),
                bars.TimeRemainingColumn(),
                console=self._console,
            )
            self._all = self._bars.add_task(self._label(), total=runs * steps_per_run)

    def __enter__(self) -> Progress:
        self._context().__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        self._context().__exit__(None, None, None)

    def already_done(self, run: PlannedRun) -> None:
        """The run was finished before this program began."""
        self._done += 1
        self.at(run, self._steps)

    def started(self, run: PlannedRun) -> None:
        if self._bars:
            self._tasks[run.name] = self._bars.add_task(f"  {run.name}", total=self._steps)

    def at(self, run: PlannedRun, step: int) -> None:
        self._at[run.name] = step
        if self._bars:
            self._bars.update(self._all, completed=sum(self._at.values()), description=self._label())
            if run.name in self._tasks:
                self._bars.update(self._tasks[run.name], completed=step)

    def ended(self, run: PlannedRun, seconds: float, failure: str) -> None:
        """A run has ended; ``failure`` is empty when it is finished."""
        self._done += 1
        self.at(run, self._steps)
        if self._bars and run.name in self._tasks:
            self._bars.remove_task(self._tasks.pop(run.name))
        how = f"failed: {failure}" if failure else f"trained in {seconds:.0f} s"
        self.line(f"{self._done}/{self._runs} {run.name} {how}")

    def line(self, text: str) -> None:
        self._console.print(text, markup=False, soft_wrap=True)

    def _label(self) -> str:
        return f"{self._done} of {self._runs} runs"

    def _context(self) -> AbstractContextManager[object]:
        return self._bars or nullcontext()
