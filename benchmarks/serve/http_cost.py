"""What the server costs on top of its engine: time per streamed token, time to first token, start, prefix cache.

    python benchmarks/serve/http_cost.py --json http.json

The engine alone runs in this process through its Python interface; the server is ``moeyard serve`` in a process of its
own, asked over loopback. Both have one compute thread and the same model, and take turns. A served token's cost is
seconds per token through the server minus seconds per token of the engine, at one stream and in all at sixteen.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent.parent)

from benchmarks.serve.models import make_model
from benchmarks.serve.rounds import ratios, spread, take_turns, write
from benchmarks.serve.served import Server, complete, serving
from serve.client import EngineRequest, SamplingOptions
from serve.engine.engine import AsyncEngine
from serve.engine.load import load_engine
from serve.engine.settings import EngineSettings

NEW = 256


def random_prompt(rng: random.Random, length: int) -> list[int]:
    return [rng.randrange(10, 250) for _ in range(length)]


async def engine_seconds(engine: AsyncEngine, streams: int, rng: random.Random) -> tuple[float, float]:
    """(seconds per token over all streams, seconds to the first token) of the engine alone."""
    sampling = SamplingOptions(max_tokens=NEW, temperature=0.0, ignore_eos=True)
    firsts = []

    async def read(number: int) -> None:
        begin = time.perf_counter()
        ids = tuple(random_prompt(rng, 16))
        request = EngineRequest(f"{time.monotonic_ns()}-{number}", "m", (ids,), sampling)
        first = 0.0
        async for _ in await engine.generate(request):
            first = first or time.perf_counter() - begin
        firsts.append(first)

    begin = time.perf_counter()
    await asyncio.gather(*map(read, range(streams)))
    return (time.perf_counter() - begin) / (streams * NEW), statistics.median(firsts)


async def server_seconds(server: Server, streams: int, rng: random.Random) -> tuple[float, float]:
    """The same through HTTP."""
    body = {"max_tokens": NEW, "temperature": 0, "ignore_eos": True}
    begin = time.perf_counter()
    answers = await asyncio.gather(
        *(complete(server, {**body, "prompt": random_prompt(rng, 16)}) for _ in range(streams))
    )
    seconds = time.perf_counter() - begin
    assert all(answer.tokens == NEW for answer in answers), answers
    return seconds / (streams * NEW), statistics.median(answer.first_s for answer in answers)


async def prefix_seconds(server: Server, rng: random.Random) -> tuple[float, float]:
    """Time to first token of two requests that share 1,000 prompt tokens: (first, second)."""
    shared = random_prompt(rng, 1000)
    times = []
    for number in range(2):
        body = {"prompt": [*shared, *random_prompt(rng, 8)], "max_tokens": 1, "temperature": 0}
        answer = await complete(server, body)
        times.append(answer.first_s)
        assert (answer.cached > 900) == bool(number), answer
    return times[0], times[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the result here as one JSON object")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    rng = random.Random(0)
    result: dict[str, object] = {}
    with tempfile.TemporaryDirectory() as folder:
        tiny = make_model(Path(folder), "tiny", words=True)
        starts = []
        for _ in range(3):
            with serving(tiny, "--threads", "1") as server:
                starts.append(server.ready_s)
        print(f"ready after start, tiny model: {spread(starts, 2)} s")
        engine = load_engine(tiny, model_id="m", settings=EngineSettings(threads=1))
        with serving(tiny, "--threads", "1") as server, asyncio.Runner() as runner:
            runner.run(engine.start())
            for streams in (1, 16):
                firsts: dict[str, list[float]] = {"engine": [], "server": []}

                def side(name: str, streams: int = streams, firsts: dict[str, list[float]] = firsts) -> float:
                    call = (
                        engine_seconds(engine, streams, rng)
                        if name == "engine"
                        else server_seconds(server, streams, rng)
                    )
                    per_token, first = runner.run(call)
                    firsts[name].append(first)
                    return per_token * 1e6

                values = take_turns({name: (lambda name=name: side(name)) for name in firsts}, args.rounds)
                cost = [b - a for a, b in zip(values["engine"], values["server"], strict=True)]
                wait = [(b - a) * 1e3 for a, b in zip(firsts["engine"], firsts["server"], strict=True)]
                print(
                    f"{streams:>2} streams: engine {spread(values['engine'])} us per token, server"
                    f" {spread(values['server'])}; the server costs {spread(cost)} us per token and {spread(wait)} ms"
                    " to the first one",
                    flush=True,
                )
                result[f"streams_{streams}"] = {"us_per_token": values, "cost_us": cost, "first_ms": wait}
            runner.run(engine.stop())
            pairs = [runner.run(prefix_seconds(server, rng)) for _ in range(args.rounds)]
        shorter = ratios([a for a, _ in pairs], [b for _, b in pairs])
        print(
            f"tiny, 1,000 shared prompt tokens: first token after {spread([a * 1e3 for a, _ in pairs])} ms, then"
            f" {spread([b * 1e3 for _, b in pairs])} ms: {spread(shorter)} times shorter",
            flush=True,
        )
        medium = make_model(Path(folder), "medium", words=True)
        with serving(medium, "--threads", "1") as server, asyncio.Runner() as runner:
            pairs = [runner.run(prefix_seconds(server, rng)) for _ in range(min(3, args.rounds))]
        shorter_medium = ratios([a for a, _ in pairs], [b for _, b in pairs])
        print(f"461M, the same: {spread(shorter_medium)} times shorter", flush=True)
        write(args.json, {"ready_s": starts, "prefix_ratio": shorter, "prefix_ratio_medium": shorter_medium, **result})


if __name__ == "__main__":
    main()
