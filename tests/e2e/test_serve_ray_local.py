"""``serve_with_ray`` as a user runs it: what it does besides what every host does."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest

from tests.fox import make_run
from tests.serve_hosts import ServerProcess

pytest.importorskip("ray.serve", reason="needs Ray: make test-ray")

pytestmark = [pytest.mark.e2e, pytest.mark.slow]


def test_it_says_which_ray_and_how_many_replicas(tmp_path: Path) -> None:
    server = ServerProcess("A", make_run(tmp_path / "fox-1", context=256, steps=0))
    try:
        assert server.http("GET", "/ready").status_code == 200
        (line,) = (line for line in server.out if line.startswith("  ray      local, "))
        assert "layout A, replicas: 1" in line
    finally:
        server.end()


def test_sigterm_while_starting_ends_what_was_started(tmp_path: Path) -> None:
    server = ServerProcess("A", make_run(tmp_path / "fox-1", context=256, steps=0))
    try:
        began = time.monotonic()
        server.until(lambda: len(children(server.process.pid)) > 2 or time.monotonic() - began > 30, 40)
        started = children(server.process.pid)
        assert started
        server.signal(signal.SIGTERM)
        assert server.wait() == 128 + signal.SIGTERM
        assert "Traceback" not in "".join(server.err)
        deadline = time.monotonic() + 20
        while any(Path(f"/proc/{pid}/cmdline").exists() for pid in started):
            assert time.monotonic() < deadline
            time.sleep(0.1)
    finally:
        server.end()


def children(pid: int) -> list[int]:
    """Processes that this one has started; on Linux."""
    return [int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in _words(task / "children")]


def _words(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except OSError:
        return []
