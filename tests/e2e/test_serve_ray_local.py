"""``serve_with_ray`` as a user runs it: the same lines, signals and exit codes as without Ray."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from moe.checkpoint import save_model
from moe.config import ModelConfig, MoEConfig
from moe.tokenizer import Tokenizer
from moe.transformer import Transformer

pytest.importorskip("ray.serve", reason="needs Ray: make test-ray")

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import json, sys
from moe.errors import UserError
from serve.engine.settings import EngineSettings
from serve.hosts.ray_local import serve_with_ray
from serve.http.settings import ServerSettings
options = json.loads(sys.argv[2])
engine, settings = EngineSettings(threads=1), ServerSettings(drain_s=options.pop("drain_s", 30))
try:
    sys.exit(serve_with_ray(sys.argv[1], engine=engine, settings=settings, **options))
except UserError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(error.exit_code)
"""


def make_run(folder: Path, *, broken: bool = False) -> Path:
    """A run directory with an untrained model, which does not run when it is to be broken."""
    tokenizer = Tokenizer.bytes()
    moe = MoEConfig(num_experts=4, hidden_dim=32)
    model = Transformer(
        ModelConfig(vocab_size=tokenizer.vocab_size, dim=32, num_layers=2, num_heads=2, max_seq_len=1024, moe=moe)
    )
    model.init_weights(0)
    if broken:
        torch.nn.init.constant_(model.embed.weight, float("nan"))
    folder.mkdir()
    save_model(folder / "model", model.eval(), tokenizer)
    return folder


class Server:
    """A process that serves, and all that it has printed."""

    def __init__(self, run: Path, **options: Any) -> None:
        environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
        environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        pipe = subprocess.PIPE
        arguments = [str(run), json.dumps({"port": 0} | options)]
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, *arguments], stdout=pipe, stderr=pipe, text=True, env=environment
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

    def url(self) -> str:
        self.until(lambda: any("  try " in line for line in self.out), 180)
        assert self.out[0].startswith("ready in ")
        return self.out[0].split()[-1]

    def until(self, condition: Callable[[], bool], timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            running = self.process.poll() is None and time.monotonic() < deadline
            assert running, (self.out, self.err)
            time.sleep(0.05)

    def wait(self) -> int:
        code = self.process.wait(90)
        for reader in self._readers:
            reader.join(10)
        return code

    def end(self) -> None:
        """For a test that failed: an interrupted serve_with_ray takes its Ray down with it."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                self.process.kill()


def stream(url: str, then: Callable[[], None], **body: Any) -> list[str]:
    """The lines of a long stream during whose beginning something happens."""
    body = {"prompt": "Gr", "ignore_eos": True, "stream": True, "temperature": 0} | body
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as answer:
        lines = answer.iter_lines()
        first = next(lines)
        then()
        return [first, *(line for line in lines if line)]


def test_sigterm_lets_a_stream_finish_and_exits_with_0(tmp_path: Path) -> None:
    server = Server(make_run(tmp_path / "fox-1"), layout="A", drain_s=30)
    try:
        url = server.url()
        (line,) = (line for line in server.out if line.startswith("  ray      local, "))
        assert "layout A, replicas: 1" in line
        assert httpx.get(f"{url}/ready").status_code == 200
        lines = stream(url, lambda: server.process.send_signal(signal.SIGTERM), max_tokens=300)
        assert lines[-1] == "data: [DONE]"
        assert server.wait() == 0
        assert "waiting up to 30 s for 1 unfinished request(s); Ctrl-C again: end them now\n" in server.out
        assert server.out[-1] == "stopped\n"
        assert any("POST /v1/completions 200" in line for line in server.err)
        assert "Traceback" not in "".join(server.err)
    finally:
        server.end()


def test_ctrl_c_twice_ends_a_stream_with_an_error_event_and_exits_with_130(tmp_path: Path) -> None:
    server = Server(make_run(tmp_path / "fox-1"), layout="B", drain_s=60, access_log=False)

    def hurry() -> None:
        server.process.send_signal(signal.SIGINT)
        server.until(lambda: any("waiting up to 60 s" in line for line in server.out), 20)
        server.process.send_signal(signal.SIGINT)

    try:
        lines = stream(server.url(), hurry, max_tokens=1000, n=16)
        assert json.loads(lines[-1].removeprefix("data: "))["error"]["code"] == "aborted"
        assert server.wait() == 130
        assert server.out[-1] == "stopped\n"
    finally:
        server.end()


def test_a_model_that_does_not_run_is_one_line(tmp_path: Path) -> None:
    server = Server(make_run(tmp_path / "fox-1", broken=True))
    try:
        assert server.wait() == 1
        assert server.out == []
        (line,) = server.err
        assert line.startswith("error: ")
        assert "loaded, but does not run: block 0: gate" in line
    finally:
        server.end()


def test_sigterm_while_starting_ends_what_was_started(tmp_path: Path) -> None:
    server = Server(make_run(tmp_path / "fox-1"))
    try:
        began = time.monotonic()
        server.until(lambda: len(children(server.process.pid)) > 2 or time.monotonic() - began > 30, 40)
        started = children(server.process.pid)
        assert started
        server.process.send_signal(signal.SIGTERM)
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
