"""What the process of every host promises: what it prints, how it takes signals, and with which code it ends."""

from __future__ import annotations

import json
import shlex
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from tests.fox import make_run
from tests.serve_hosts import EMBEDDED, RAY_A, RAY_B, HostOptions, ServerProcess

pytestmark = pytest.mark.e2e

every_host = pytest.mark.parametrize("host", [EMBEDDED, RAY_A, RAY_B])


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "fox-1", context=1024, steps=0)


@contextmanager
def started(host: str, run: Path, drain_s: float = 60, access_log: bool = True) -> Iterator[ServerProcess]:
    server = ServerProcess(host, run, HostOptions(settings={"drain_s": drain_s}, host={"access_log": access_log}))
    try:
        yield server
    finally:
        server.end()


@every_host
def test_a_start_says_what_is_served_and_sigterm_lets_a_stream_finish(host: str, run_dir: Path) -> None:
    with started(host, run_dir) as server:
        url = server.url
        lines = [line for line in server.out if not line.startswith("  ray ")]
        assert len(server.out) - len(lines) == (host in ("A", "B"))
        assert "fox-1 (weights " in lines[1]
        assert "4 experts in each of 2 MoE layers" in lines[2]
        assert "  context  1,024 tokens\n" in lines
        assert "  gate     topk\n" in lines
        assert f"  page     {url}/\n" in lines
        words = shlex.split(lines[-1])
        assert words[:2] == ["try", "curl"]
        header, data = (words[words.index(flag) + 1] for flag in ("-H", "-d"))
        shown = httpx.post(words[2], content=data, headers=[tuple(header.split(": "))], timeout=30)
        assert shown.json()["object"] == "text_completion"

        assert server.stream_during(lambda: server.signal(signal.SIGTERM), max_tokens=300)[-1] == "data: [DONE]"
        assert server.wait() == 0
        assert "waiting up to 60 s for 1 unfinished request(s); Ctrl-C again: end them now\n" in server.out
        assert server.out[-1] == "stopped\n"
        assert any("POST /v1/completions 200" in line for line in server.err)  # the access log
        assert "Traceback" not in "".join(server.err)


@every_host
def test_ctrl_c_twice_ends_a_stream_with_an_error_event_and_exits_with_130(host: str, run_dir: Path) -> None:
    with started(host, run_dir, access_log=False) as server:

        def hurry() -> None:
            server.signal(signal.SIGINT)
            server.until(lambda: any("waiting up to 60 s" in line for line in server.out), 20)
            server.signal(signal.SIGINT)

        lines = server.stream_during(hurry, max_tokens=1000, n=100)
        assert json.loads(lines[-1].removeprefix("data: "))["error"]["code"] == "aborted"
        assert server.wait() == 130
        assert server.out[-1] == "stopped\n"
        assert "Traceback" not in "".join(server.err)


@every_host
def test_a_model_that_loads_but_does_not_run_is_one_line_in_the_end(host: str, tmp_path: Path) -> None:
    with started(host, make_run(tmp_path / "fox-1", context=1024, steps=0, broken=True)) as server:
        assert server.wait() == 1
        assert server.out == []
        # What went wrong inside may stand before it, in the log.
        (line,) = (line for line in server.err if line.startswith("error: "))
        assert line == server.err[-1]
        assert "but does not run: block 0: gate" in line
