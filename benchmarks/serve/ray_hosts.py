"""Ray Serve's two layouts beside the server in one process: the time that 16 streams take. Needs Ray.

    python benchmarks/serve/ray_hosts.py --json ray.json

Three servers of the same model, one compute thread each: ``moeyard serve``, the same with ``--ray``, and with ``--ray
--layout B``. All streams begin together; the servers take turns, and idle ones do what they do when idle. Shown are
medians with the extremes of tokens per second and of the time in multiples of the first server's, round by round.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import tempfile
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent.parent)

from benchmarks.serve.models import make_model
from benchmarks.serve.rounds import ratios, spread, take_turns, write
from benchmarks.serve.served import Server, complete, serving

HOSTS = {"embedded": (), "A": ("--ray",), "B": ("--ray", "--layout", "B")}


async def seconds_of(server: Server, streams: int, new: int, rng: random.Random) -> tuple[float, float]:
    """(seconds for all streams, median seconds to the first token)."""
    body = {"max_tokens": new, "temperature": 0, "ignore_eos": True}
    begin = time.perf_counter()
    answers = await asyncio.gather(
        *(complete(server, {**body, "prompt": [rng.randrange(10, 250) for _ in range(16)]}) for _ in range(streams))
    )
    seconds = time.perf_counter() - begin
    assert all(answer.tokens == new for answer in answers), answers
    return seconds, sorted(answer.first_s for answer in answers)[streams // 2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the result here as one JSON object")
    parser.add_argument("--models", nargs="+", choices=("tiny", "medium"), default=["tiny", "medium"])
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    rng = random.Random(0)
    result: dict[str, object] = {"streams": args.streams}
    with tempfile.TemporaryDirectory() as folder:
        for name in args.models:
            model, new = make_model(Path(folder), name, words=True), {"tiny": 256, "medium": 64}[name]
            with ExitStack() as stack:
                servers = {
                    host: stack.enter_context(serving(model, "--threads", "1", *options))
                    for host, options in HOSTS.items()
                }
                for server in servers.values():  # once to warm up
                    asyncio.run(seconds_of(server, args.streams, new, rng))
                firsts: dict[str, list[float]] = {host: [] for host in HOSTS}

                def turn(server: Server, first_ms: list[float], new: int = new) -> float:
                    seconds, first_s = asyncio.run(seconds_of(server, args.streams, new, rng))
                    first_ms.append(first_s * 1e3)
                    return seconds

                turns = {host: partial(turn, servers[host], firsts[host]) for host in HOSTS}
                values = take_turns(turns, args.rounds)
            for host in HOSTS:
                rates = [args.streams * new / seconds for seconds in values[host]]
                times = ratios(values[host], values["embedded"])
                print(
                    f"{name}, {host}: {spread(rates)} tok/s, {spread(times, 2)} times the time,"
                    f" first token after {spread(firsts[host])} ms",
                    flush=True,
                )
            result[name] = {"seconds": values, "first_ms": firsts}
        write(args.json, result)


if __name__ == "__main__":
    main()
