"""Servers as users start them: a process for each, in any of the hosts, that is asked over HTTP and told by signals."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

ROOT = Path(__file__).resolve().parents[1]
API_KEY = "sk-good"
KEY = {"authorization": f"Bearer {API_KEY}"}
NEEDS_RAY = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs Ray: make test-ray")
ON_RAY = (NEEDS_RAY, pytest.mark.slow)
EMBEDDED, GANG, RAY_A, RAY_B = (
    pytest.param("embedded", id="embedded"),
    pytest.param("gang", id="gang"),
    pytest.param("A", id="ray-A", marks=ON_RAY),
    pytest.param("B", id="ray-B", marks=ON_RAY),
)
# Ray alone takes ten to thirty seconds to start on a small machine.
START_S = 180.0
PROGRAM = """
import json, sys
from functools import partial
from launch.serve_gang import load_gang_engine
from moe.errors import UserError
from serve.engine.settings import EngineSettings
from serve.hosts.embedded import serve_model
from serve.hosts.ray_local import serve_with_ray
from serve.http.settings import ServerSettings
host, path, engine, settings, rest = sys.argv[1], sys.argv[2], *map(json.loads, sys.argv[3:])
rest |= {"engine": EngineSettings(threads=1, **engine), "settings": ServerSettings(**settings)}
if host == "gang":
    rest["load"] = partial(load_gang_engine, world_size=2)
try:
    sys.exit(serve_with_ray(path, layout=host, **rest) if host in ("A", "B") else serve_model(path, **rest))
except UserError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(error.exit_code)
"""


@dataclass(frozen=True)
class HostOptions:
    """What a server is started with: fields of EngineSettings, of ServerSettings, and arguments of the host."""

    engine: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    host: Mapping[str, Any] = field(default_factory=dict)


class ServerProcess:
    """A process that serves, and all that it has printed.

    Args:
        host: "embedded"; "gang": with its experts on two processes; or the layout on Ray: "A" or "B".
        run: what it serves.
    """

    def __init__(self, host: str, run: Path, options: HostOptions | None = None) -> None:
        self.host, options = host, options or HostOptions()
        environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
        environment |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        values = [options.engine, options.settings, {"port": 0} | dict(options.host)]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, host, str(run), *map(json.dumps, map(dict, values))],
            stdout=pipe,
            stderr=pipe,
            text=True,
            env=environment,
        )
        self.out: list[str] = []
        self.err: list[str] = []
        self._readers = [
            threading.Thread(target=self._read, args=pair)
            for pair in ((self.process.stdout, self.out), (self.process.stderr, self.err))
        ]
        for reader in self._readers:
            reader.start()

    @staticmethod
    def _read(pipe: Any, lines: list[str]) -> None:
        for line in pipe:
            lines.append(line)

    # The process.

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    @property
    def url(self) -> str:
        """Where it answers; waits until it does."""
        self.until(lambda: any(line.startswith("  try ") for line in self.out), START_S)
        assert self.out[0].startswith("ready in ")
        return self.out[0].split()[-1]

    def until(self, condition: Callable[[], bool], timeout_s: float) -> None:
        """Waits for something while the process runs."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            running = self.alive and time.monotonic() < deadline
            assert running, (self.out, self.err)
            time.sleep(0.02)

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def wait(self) -> int:
        """Its exit code, when it has ended and all that it printed has been read."""
        code = self.process.wait(90)
        for reader in self._readers:
            reader.join(10)
        return code

    def end(self) -> None:
        """However it stands; an interrupted server on Ray takes its Ray down with it."""
        if self.alive:
            self.signal(signal.SIGINT)
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                self.process.kill()

    # HTTP.

    def client(self, **options: Any) -> openai.OpenAI:
        return openai.OpenAI(**self.client_options(**options))

    def client_options(self, **options: Any) -> dict[str, Any]:
        """Of any of OpenAI's clients, which then takes no for an answer."""
        return {"base_url": f"{self.url}/v1", "api_key": API_KEY, "max_retries": 0, "timeout": 60.0} | options

    def http(self, method: str, path: str, **options: Any) -> httpx.Response:
        return httpx.request(method, self.url + path, **{"headers": KEY, "timeout": 60.0} | options)

    def post_and_leave_open(self, path: str, body: Mapping[str, Any]) -> socket.socket:
        """A connection over which a request was sent; nobody reads the answer."""
        content = json.dumps(body).encode()
        host, port = self.url.removeprefix("http://").split(":")
        connection = socket.create_connection((host, int(port)))
        head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(content)}\r\n"
        head += f"content-type: application/json\r\nauthorization: {KEY['authorization']}\r\n\r\n"
        connection.sendall(head.encode() + content)
        return connection

    def metric(self, name: str, **labels: str) -> float:
        """A value in /metrics; 0 where there is none yet, as of a counter with labels that has not counted."""
        for line in self.http("GET", "/metrics").text.splitlines():
            found = re.fullmatch(rf"moeyard:{name}\{{(.*)\}} (\S+)", line)
            if found and all(f'{key}="{value}"' in found[1].split(",") for key, value in labels.items()):
                return float(found[2])
        return 0.0

    def until_metrics(self, timeout_s: float = 20.0, **expected: float) -> float:
        """Waits until these gauges and counters have these values; how long that took."""
        began = time.monotonic()
        while True:
            seen = {name: self.metric(name) for name in expected}
            if seen == expected:
                return time.monotonic() - began
            assert time.monotonic() - began < timeout_s, (seen, expected)
            time.sleep(0.01)

    def stream_during(self, then: Callable[[], None], **body: Any) -> list[str]:
        """The lines of a long stream, after whose first something happens."""
        body = {"prompt": "Gr", "ignore_eos": True, "stream": True, "temperature": 0} | body
        with httpx.stream("POST", f"{self.url}/v1/completions", json=body, headers=KEY, timeout=60) as answer:
            lines = answer.iter_lines()
            first = next(lines)
            then()
            return [first, *(line for line in lines if line)]


class HostKeeper:
    """A server for many tests, started when it is asked for, and again when a test has ended it."""

    def __init__(self, host: str, run: Path, options: HostOptions) -> None:
        self._start = lambda: ServerProcess(host, run, options)
        self._server: ServerProcess | None = None

    def running(self) -> ServerProcess:
        if self._server is None or not self._server.alive:
            self._server = self._start()
        return self._server

    def close(self) -> None:
        """Told to stop, it must do so and say that all is well."""
        if self._server is not None and self._server.alive:
            try:
                self._server.signal(signal.SIGTERM)
                assert self._server.wait() == 0, self._server.err
            finally:
                self._server.end()
