"""Goodput under four times the load that the server can take, and how fast it turns the rest away.

    python benchmarks/serve/overload.py --json overload.json

Peak: tokens per second with as many closed-loop clients as the engine computes at once. Overload: requests arrive by
the clock (Poisson) at four times the rate that the peak served; refused ones are not retried. Goodput is what answered
requests got. The server runs with a short queue, so that those it takes do not wait for long.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import tempfile
import time
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent.parent)

from benchmarks.serve.models import make_model
from benchmarks.serve.rounds import spread, write
from benchmarks.serve.served import Answer, Server, complete, serving

SEQUENCES, QUEUE, NEW, PROMPT = 8, 8, 64, 32


def body(rng: random.Random) -> dict[str, object]:
    prompt = [rng.randrange(10, 250) for _ in range(PROMPT)]
    return {"prompt": prompt, "max_tokens": NEW, "temperature": 0, "ignore_eos": True}


async def peak(server: Server, seconds: float, rng: random.Random) -> float:
    """Tokens per second of SEQUENCES clients, each with its next request as soon as the last is answered."""
    tokens = 0
    end = time.perf_counter() + seconds

    async def client() -> None:
        nonlocal tokens
        while time.perf_counter() < end:
            answer = await complete(server, body(rng))
            tokens += answer.tokens if time.perf_counter() < end else 0

    begin = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(SEQUENCES)))
    return tokens / min(seconds, time.perf_counter() - begin)


async def overload(server: Server, rate: float, seconds: float, rng: random.Random) -> tuple[float, list[Answer]]:
    """(goodput, answers) of requests that arrive ``rate`` times a second."""
    tasks = []
    begin = time.perf_counter()
    due = begin
    while due < begin + seconds:
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        tasks.append(asyncio.ensure_future(complete(server, body(rng))))
        due += rng.expovariate(rate)
    answers = await asyncio.gather(*tasks)
    # From the first arrival to the last answer: what was begun in time counts, and so does its time.
    return sum(answer.tokens for answer in answers) / (time.perf_counter() - begin), list(answers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the result here as one JSON object")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=15.0, help="of each peak and each overload")
    parser.add_argument("--times", type=float, default=4.0, help="arrivals as a multiple of what the peak served")
    args = parser.parse_args()
    rng = random.Random(0)
    shares, rejects_ms, statuses = [], [], set()
    with tempfile.TemporaryDirectory() as folder:
        model = make_model(Path(folder), "tiny", words=True)
        options = ("--threads", "1", "--max-sequences", str(SEQUENCES), "--max-queue", str(QUEUE))
        with serving(model, *options) as server, asyncio.Runner() as runner:
            runner.run(peak(server, 2, rng))
            for _ in range(args.rounds):
                best = runner.run(peak(server, args.seconds, rng))
                rate = args.times * best / NEW
                goodput, answers = runner.run(overload(server, rate, args.seconds, rng))
                refused = [answer for answer in answers if answer.status == 429]
                statuses |= {answer.status for answer in answers}
                shares.append(goodput / best)
                slowest = sorted(1e3 * answer.total_s for answer in refused)
                rejects_ms.append(slowest)
                print(f"peak {best:,.0f} tokens/s; {rate:,.0f} requests/s: goodput {goodput:,.0f} tokens/s,", end=" ")
                print(f"{len(answers) - len(refused)} answered, {len(refused)} refused in", end=" ")
                print(
                    f"{slowest[len(slowest) // 2]:.1f} ms (99th percentile {slowest[int(0.99 * len(slowest))]:.1f},"
                    f" slowest {slowest[-1]:.1f})",
                    flush=True,
                )
    print(f"goodput over peak: {spread(shares, 3)}; statuses {sorted(statuses)}")
    everything = sorted(value for row in rejects_ms for value in row)
    write(
        args.json,
        {
            "share": shares,
            "reject_ms": {"median": everything[len(everything) // 2], "max": everything[-1]},
            "statuses": sorted(statuses),
        },
    )


if __name__ == "__main__":
    main()
