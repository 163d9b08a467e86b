"""A server whose experts are on two processes, when one dies or cannot be: told over HTTP, nothing left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fox import make_run
from tests.serve_hosts import ROOT, HostOptions, ServerProcess

pytestmark = pytest.mark.e2e

TELLS_S = 5.0


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "fox-1", context=1024, steps=0)


@pytest.fixture
def server(run_dir: Path) -> Iterator[ServerProcess]:
    server = ServerProcess("gang", run_dir, HostOptions(settings={"api_keys": ["sk-good"], "drain_s": 0.2}))
    yield server
    server.end()


def worker_of(server: ServerProcess) -> int:
    """The one process that holds experts for the server."""
    children = Path(f"/proc/{server.process.pid}/task").glob("*/children")
    pids = [int(pid) for file in children for pid in file.read_text().split()]
    (worker,) = [pid for pid in pids if b"launch.expert_worker" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    return worker


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the worker in /proc")
@pytest.mark.parametrize("busy", [True, False])
def test_a_worker_that_is_killed_is_told_by_health_and_by_every_request(server: ServerProcess, busy: bool) -> None:
    assert server.http("GET", "/health").status_code == 200
    worker = worker_of(server)
    if busy:
        lines = server.stream_during(lambda: os.kill(worker, signal.SIGKILL), max_tokens=1000, n=20)
        error = json.loads(lines[-1].removeprefix("data: "))["error"]
        assert (error["type"], error["code"]) == ("server_error", "engine_dead")
    else:
        os.kill(worker, signal.SIGKILL)
    began = time.monotonic()
    while (health := server.http("GET", "/health")).status_code == 200:
        assert time.monotonic() - began < TELLS_S, health.json()
        time.sleep(0.05)
    assert (health.status_code, health.json()["status"]) == (503, "dead")
    refused = server.http("POST", "/v1/completions", json={"prompt": "a"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "engine_dead")
    server.signal(signal.SIGTERM)
    server.wait()
    assert not Path(f"/proc/{worker}").exists()
    assert any("expert rank 1 was killed by SIGKILL" in line for line in server.err), server.err


def test_more_processes_than_experts_are_refused_in_one_line(run_dir: Path) -> None:
    command = [sys.executable, "-m", "launch.cli", "serve", str(run_dir), "--port", "0", "--expert-parallel", "5"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 2
    assert result.stderr == "error: expert_parallel: at most 4, the model's experts per layer; got 5\n"
