"""Mixed traffic with rude clients for a long time: nothing may leak, nothing may hang, memory stays flat.

    python benchmarks/serve/soak.py --minutes 30

Starts ``moeyard serve`` on a tiny random model and sends, from many connections at once: short and long completions,
streamed and whole, several samples, shared prefixes, embeddings, prompts beyond the context, malformed bodies, floods
beyond the queue, readers that stop reading, and clients that leave at any moment. Every few seconds it looks at
/health and /metrics. Afterwards it waits until nothing runs and checks:

- free + cached + used blocks equal the total, none of them used; no request runs or waits;
- every answer was a 200, 400, 404, 413, 415 or 429, and every stream ended with [DONE] or was left by its client;
- /health was 200 throughout and answered within a second;
- resident memory grew by less than a tenth after the first fifth of the time.

Exit code 0 when all of that holds.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import re
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent.parent)

from benchmarks.serve.models import make_model
from benchmarks.serve.rounds import write
from benchmarks.serve.served import Server, serving

EXPECTED = {200, 400, 404, 413, 415, 429}
CONTEXT = 2048
HEAD = "POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: {kind}\r\nconnection: close\r\ncontent-length: {size}\r\n\r\n"


def draw_request(rng: random.Random) -> tuple[str, str, bytes]:
    """(path, content type, body) of one request, most of them sensible."""
    kind = rng.choice(
        ["short"] * 5 + ["long", "shared", "samples", "chat", "embed", "too long", "broken", "form", "lost"]
    )
    stream = rng.random() < 0.6
    body: dict[str, object] = {"max_tokens": rng.randrange(1, 40), "stream": stream, "temperature": rng.choice([0, 1])}
    if kind == "embed":
        return "/v1/embeddings", "application/json", json.dumps({"input": ["a" * rng.randrange(1, 300)] * 3}).encode()
    if kind == "broken":
        return "/v1/completions", "application/json", rng.choice([b"{", b"[" * 5000, b'{"prompt": 3}', b"\xff\xfe{"])
    if kind == "form":
        return "/v1/completions", "text/plain", b"{}"
    if kind == "lost":
        return "/v1/nothing", "application/json", b"{}"
    if kind == "chat":
        body["messages"] = [{"role": "user", "content": "x" * rng.randrange(1, 200)}]
        return "/v1/chat/completions", "application/json", json.dumps(body).encode()
    length = {"long": rng.randrange(500, 1900), "too long": CONTEXT + 9, "shared": 600}.get(kind, rng.randrange(1, 80))
    if kind == "shared":
        body["prompt"] = [7] * 590 + [rng.randrange(10, 250) for _ in range(10)]
    else:
        body["prompt"] = [rng.randrange(10, 250) for _ in range(length)]
    if kind == "samples":
        body |= {"n": rng.randrange(2, 6), "logprobs": 2}
    if kind == "long":
        body["max_tokens"] = rng.randrange(1, 140)
    return "/v1/completions", "application/json", json.dumps(body).encode()


class Soak:
    """Traffic and what came of it."""

    def __init__(self, server: Server, seed: int) -> None:
        self.server, self.rng = server, random.Random(seed)
        self.statuses: Counter[int] = Counter()
        self.outcomes: Counter[str] = Counter()
        self.problems: list[str] = []
        self.memory_mib: list[float] = []
        self.end_s = 0.0

    async def client(self) -> None:
        """One request after another until the time is up."""
        while time.monotonic() < self.end_s:
            try:
                await asyncio.wait_for(self._request(), 120)
            except TimeoutError:
                self.problems.append("a request took longer than two minutes")
            except (OSError, asyncio.IncompleteReadError) as error:
                self.outcomes[f"connection: {type(error).__name__}"] += 1
            await asyncio.sleep(self.rng.choice([0, 0, 0, 0.01, 0.1]))

    async def _request(self) -> None:
        rng = self.rng
        path, kind, body = draw_request(rng)
        reader, writer = await asyncio.open_connection(self.server.host, self.server.port)
        try:
            writer.write(HEAD.format(path=path, kind=kind, size=len(body)).encode() + body)
            manner = rng.choices(["polite", "leaves at once", "leaves later", "stops reading"], [70, 10, 15, 5])[0]
            if manner == "leaves at once":
                self.outcomes[manner] += 1
                return
            line = await reader.readline()
            if not line:
                self.problems.append(f"{path}: no answer")
                return
            status = int(line.split()[1])
            self.statuses[status] += 1
            if status == 429 and rng.random() < 0.9:  # one in ten floods on
                await asyncio.sleep(0.3)
            if manner == "leaves later" and status == 200:
                await reader.read(rng.randrange(1, 2000))
                self.outcomes[manner] += 1
                return
            if manner == "stops reading":
                await asyncio.sleep(rng.random() * 2)
            answer = await reader.read()
            if b"text/event-stream" in answer and not answer.rstrip().endswith((b"data: [DONE]", b"0")):
                self.problems.append(f"{path}: a stream ended without [DONE]: {answer[-200:]!r}")
            self.outcomes["complete"] += 1
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    async def get(self, path: str) -> tuple[int, str]:
        """Status and body, over a connection of its own."""
        reader, writer = await asyncio.open_connection(self.server.host, self.server.port)
        writer.write(f"GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n".encode())
        answer = (await reader.read()).decode()
        writer.close()
        return int(answer.split()[1]), answer

    async def watch(self) -> None:
        """Health, books and memory while traffic runs."""
        while time.monotonic() < self.end_s:
            begin = time.monotonic()
            status, _ = await self.get("/health")
            if status != 200 or time.monotonic() - begin > 1:
                self.problems.append(f"/health: {status} after {time.monotonic() - begin:.2f} s")
            status_file = Path(f"/proc/{self.server.process.pid}/status").read_text(encoding="utf-8")
            self.memory_mib.append(int(re.search(r"VmRSS:\s+(\d+)", status_file)[1]) / 1024)  # type: ignore[index]
            await asyncio.sleep(2)

    async def gauge(self, text: str, name: str) -> float:
        """One number of /metrics."""
        found = re.search(rf"^moeyard:{name}(?:{{[^}}]*}})? (\S+)$", text, re.M)
        return float(found[1]) if found else float("nan")

    async def run(self, minutes: float, clients: int) -> None:
        self.end_s = time.monotonic() + minutes * 60
        await asyncio.gather(self.watch(), *(self.client() for _ in range(clients)))
        for _ in range(100):
            _, text = await self.get("/metrics")
            busy = [await self.gauge(text, name) for name in ("num_requests_running", "num_requests_waiting")]
            if busy == [0, 0]:
                break
            await asyncio.sleep(0.2)
        else:
            self.problems.append(f"requests are left: running and waiting {busy}")
        usage = await self.gauge(text, "kv_cache_usage_perc")
        if usage != 0:
            self.problems.append(f"blocks are still used: kv_cache_usage_perc {usage}")
        unexpected = set(self.statuses) - EXPECTED
        if unexpected:
            self.problems.append(f"statuses {sorted(unexpected)}")
        early = self.memory_mib[len(self.memory_mib) // 5]
        if self.memory_mib[-1] > 1.1 * early + 20:
            self.problems.append(f"memory grew from {early:.0f} to {self.memory_mib[-1]:.0f} MiB")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the result here as one JSON object")
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--clients", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        options = ("--threads", "1", "--max-sequences", "8", "--max-queue", "8", "--kv-cache-gib", "0.02")
        with serving(make_model(Path(folder), "tiny"), *options) as server:
            soak = Soak(server, args.seed)
            asyncio.run(soak.run(args.minutes, args.clients))
    print(f"{args.minutes:g} minutes, {args.clients} clients: statuses {dict(sorted(soak.statuses.items()))}")
    print(f"  {dict(soak.outcomes)}")
    print(
        f"  memory {soak.memory_mib[0]:.0f} MiB at first, {max(soak.memory_mib):.0f} at most,"
        f" {soak.memory_mib[-1]:.0f} at last"
    )
    for problem, count in Counter(soak.problems).most_common(20):
        print(f"  PROBLEM ({count} times): {problem}")
    write(
        args.json,
        {
            "statuses": dict(soak.statuses),
            "outcomes": dict(soak.outcomes),
            "memory_mib": soak.memory_mib,
            "problems": soak.problems,
        },
    )
    return 1 if soak.problems else 0


if __name__ == "__main__":
    sys.exit(main())
