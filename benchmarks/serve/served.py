"""A server in a process of its own, as users run it, and a client that costs little: raw sockets, one stream each."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent


@dataclass
class Server:
    """A running ``moeyard serve``."""

    host: str
    port: int
    ready_s: float
    process: subprocess.Popen[str] = field(repr=False)

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"


@contextlib.contextmanager
def serving(model: Path, *options: str, timeout_s: float = 120.0) -> Iterator[Server]:
    """``moeyard serve MODEL options...`` on a free port; ``ready_s`` is the time from the start of its process."""
    command = [sys.executable, "-m", "launch.cli", "serve", str(model), "--port", "0", "--no-access-log", *options]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    begin = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=sys.stderr, text=True, env=environment, cwd=ROOT)
    assert process.stdout is not None
    try:
        line = ""
        for line in process.stdout:
            if line.startswith("ready in"):
                break
        else:
            raise RuntimeError(f"the server did not start: {line}")
        ready_s = time.perf_counter() - begin
        host, port = line.split()[-1].removeprefix("http://").rsplit(":", 1)
        yield Server(host, int(port), ready_s, process)
    finally:
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout_s)
        process.kill()
        process.stdout.close()


@dataclass
class Answer:
    """What one request got, by the client's clock.

    Attributes:
        status: HTTP status.
        first_s: from sending to the first event with text or a token; 0 if there was none.
        total_s: until the last byte.
        tokens: by the server's own count.
        cached: prompt tokens that it did not compute.
        error: words of an error, be it an answer or an event.
    """

    status: int = 0
    first_s: float = 0.0
    total_s: float = 0.0
    tokens: int = 0
    cached: int = 0
    error: str = ""


async def complete(server: Server, body: dict[str, Any], key: str | None = None) -> Answer:
    """One streamed completion over a connection of its own."""
    answer = Answer()
    begin = time.perf_counter()
    reader, writer = await asyncio.open_connection(server.host, server.port)
    try:
        data = json.dumps({"stream": True, "stream_options": {"include_usage": True}, **body}).encode()
        authorization = f"authorization: Bearer {key}\r\n" if key else ""
        head = (
            f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\nconnection: close\r\n"
            f"{authorization}content-length: {len(data)}\r\n\r\n"
        )
        writer.write(head.encode() + data)
        answer.status = int((await reader.readline()).split()[1])
        async for line in _lines(reader):
            if answer.status != 200 and line.startswith(b"{"):
                answer.error = json.loads(line)["error"]["message"]
            if not line.startswith(b"data: {"):
                continue
            if not answer.first_s and b'"choices":[{' in line:
                answer.first_s = time.perf_counter() - begin
            if b'"usage":{' in line or b'"error":{' in line:
                event = json.loads(line[6:])
                answer.error = (event.get("error") or {}).get("message", "")
                usage = event.get("usage") or {}
                answer.tokens = usage.get("completion_tokens", 0)
                answer.cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
    finally:
        answer.total_s = time.perf_counter() - begin
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
    return answer


async def _lines(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    while line := await reader.readline():
        yield line.strip()
