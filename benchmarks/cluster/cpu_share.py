"""CPU quotas for ranks, by control groups of version 1 or 2."""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from pathlib import Path

PERIOD_US = 20_000
"""Short, so that a rank that has used up its share waits for milliseconds, not for a tenth of a second."""


def controller() -> tuple[Path, int] | None:
    """(folder in which groups can be made, version), or None where CPU quotas cannot be set."""
    one = Path("/sys/fs/cgroup/cpu")
    if (one / "cpu.cfs_quota_us").exists() or (one / "tasks").exists():
        return one, 1
    two = Path("/sys/fs/cgroup")
    controllers = two / "cgroup.controllers"
    if controllers.exists() and "cpu" in controllers.read_text().split():
        return two, 2
    return None


class CpuShares:
    """One control group for each rank of a cluster."""

    def __init__(self, launcher: int, ranks: int, cpu: float) -> None:
        found = controller()
        if found is None:
            raise RuntimeError("no control group for CPU quotas is mounted here")
        root, self._version = found
        self._base = root / f"moeyard-{launcher}"
        self._groups = [self._base / f"rank{rank}" for rank in range(ranks)]
        self._cpu = cpu

    def build(self) -> None:
        """Make the groups and set their quotas."""
        self._base.mkdir()
        if self._version == 2:
            (self._base.parent / "cgroup.subtree_control").write_text("+cpu")
            (self._base / "cgroup.subtree_control").write_text("+cpu")
        quota_us = max(1000, round(self._cpu * PERIOD_US))
        for group in self._groups:
            group.mkdir()
            if self._version == 2:
                (group / "cpu.max").write_text(f"{quota_us} {PERIOD_US}")
            else:
                (group / "cpu.cfs_period_us").write_text(str(PERIOD_US))
                (group / "cpu.cfs_quota_us").write_text(str(quota_us))

    def procs(self, rank: int) -> Path:
        """The file that a process writes its number to in order to join the rank's group."""
        return self._groups[rank] / "cgroup.procs"

    def remove(self) -> None:
        """End what is still in the groups and delete them."""
        for group in [*self._groups, self._base]:
            remove_group(group)


def remove_group(group: Path) -> None:
    """End every process in ``group`` and delete it."""
    deadline = time.monotonic() + 5
    while group.exists() and time.monotonic() < deadline:
        for pid in (group / "cgroup.procs").read_text().split():
            with suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        try:
            group.rmdir()
        except OSError:  # the kernel needs a moment to let go of what has ended
            time.sleep(0.05)


def remove_leftovers(launcher: int) -> None:
    """Delete the groups of a launcher that was killed, and end what it left running."""
    found = controller()
    if found is None:
        return
    base = found[0] / f"moeyard-{launcher}"
    for group in [*base.glob("rank*"), base]:
        if group.exists():
            remove_group(group)
