"""``serve_model`` in this process: what it does besides what every host does; a process that has other plans too."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from serve.engine.settings import EngineSettings
from serve.hosts.embedded import serve_model
from serve.hosts.sockets import ListenError, free_port, open_listener
from serve.http.settings import ServerSettings
from tests.fox import make_run

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "fox-1", context=512, steps=0)


def test_ctrl_c_past_the_deadline_ends_a_stream_and_gives_the_signals_back(run_dir: Path) -> None:
    port = free_port("127.0.0.1", near=20_000)
    url = f"http://127.0.0.1:{port}"
    before = signal.getsignal(signal.SIGINT)

    def visit() -> list[str]:
        for _ in range(500):
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"{url}/ready").status_code == 200:
                    break
            time.sleep(0.01)
        body = {"prompt": "Gr", "max_tokens": 150, "n": 100, "ignore_eos": True, "stream": True, "temperature": 0}
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=30) as answer:
            lines = answer.iter_lines()
            first = next(lines)
            os.kill(os.getpid(), signal.SIGINT)
            return [first, *(line for line in lines if line)]

    alarm = threading.Timer(30, os.kill, (os.getpid(), signal.SIGINT))  # should nothing else stop it
    alarm.start()
    try:
        with ThreadPoolExecutor(1) as pool:
            visitor = pool.submit(visit)
            settings = ServerSettings(drain_s=0.2)
            assert serve_model(run_dir, port=port, engine=EngineSettings(threads=1), settings=settings) == 130
            lines = visitor.result(10)
    finally:
        alarm.cancel()
    assert json.loads(lines[-1].removeprefix("data: "))["error"]["code"] == "aborted"
    assert signal.getsignal(signal.SIGINT) == before


def test_a_port_in_use_is_one_line_with_a_free_port_before_anything_is_loaded(run_dir: Path) -> None:
    with open_listener("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ListenError) as caught:
            serve_model(run_dir, port=port)
        message = str(caught.value)
        assert message.startswith(f"port {port} on 127.0.0.1 is already in use; port ")
        assert caught.value.exit_code == 1
        assert "\n" not in message
        suggested = int(message.split("--port ")[1])
        assert suggested != port
        with open_listener("127.0.0.1", suggested):
            assert free_port("127.0.0.1", near=suggested) != suggested


def test_addresses_that_cannot_be_listened_on_are_explained() -> None:
    with pytest.raises(ListenError, match=r"192\.0\.2\.1 is not an address of this machine"):
        open_listener("192.0.2.1", 0)
    with pytest.raises(ListenError, match="port must be between 0 and 65535, got 70000"):
        open_listener("127.0.0.1", 70_000)
