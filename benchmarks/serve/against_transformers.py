"""Output tokens per second: this engine beside transformers' generate and its continuous batching, same checkpoint.

    python benchmarks/serve/against_transformers.py --json transformers.json

Both compute greedily in the checkpoint's bf16 with the same number of threads and the same random prompts of 64
tokens, 64 new tokens each, end-of-text ignored; all streams begin at once. Each side has a process of its own, because
OpenMP's teams of one process disturb each other. They take turns round by round; shown are medians with the extremes,
and the ratio round by round. Transformers' grouped_mm experts, its fastest on CPU here.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parent.parent.parent)

import torch

from benchmarks.serve.models import make_model
from benchmarks.serve.rounds import ratios, spread, take_turns, write
from serve.client import EngineRequest, SamplingOptions
from serve.engine.engine import AsyncEngine
from serve.engine.load import load_engine
from serve.engine.settings import EngineSettings
from serve.hosts.memory import use_huge_pages

PROMPT, NEW = 64, 64


def prompts(count: int) -> list[tuple[int, ...]]:
    rng = random.Random(count)
    return [tuple(rng.randrange(300, 30_000) for _ in range(PROMPT)) for _ in range(count)]


async def engine_rate(engine: AsyncEngine, count: int) -> float:
    """Tokens per second over ``count`` streams that begin together."""
    sampling = SamplingOptions(max_tokens=NEW, temperature=0.0, ignore_eos=True)

    async def read(number: int, ids: tuple[int, ...]) -> int:
        request = EngineRequest(f"{time.monotonic_ns()}-{number}", "m", (ids,), sampling)
        return sum([len(chunk.token_ids) async for chunk in await engine.generate(request)])

    await engine.reset_prefix_cache("m")  # every round computes its prompts
    begin = time.perf_counter()
    tokens = await asyncio.gather(*(read(number, ids) for number, ids in enumerate(prompts(count))))
    seconds = time.perf_counter() - begin
    assert sum(tokens) == count * NEW, tokens
    return count * NEW / seconds


def generate_rate(model: Any, count: int) -> float:
    """The same through one call of generate with a batch of ``count``."""
    ids = torch.tensor(prompts(count))
    begin = time.perf_counter()
    with torch.inference_mode():
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW,
            min_new_tokens=NEW,
            do_sample=False,
            pad_token_id=0,
        )
    seconds = time.perf_counter() - begin
    assert out.shape[1] == PROMPT + NEW
    return count * NEW / seconds


def continuous_rate(model: Any, count: int) -> float:
    """The same through transformers' continuous batching."""
    from transformers import GenerationConfig

    config = GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=-1, pad_token_id=0)
    begin = time.perf_counter()
    out = model.generate_batch(
        inputs=[list(ids) for ids in prompts(count)], generation_config=config, progress_bar=False
    )
    seconds = time.perf_counter() - begin
    tokens = sum(len(answer.generated_tokens) for answer in out.values())
    assert tokens == count * NEW, tokens
    return count * NEW / seconds


@contextmanager
def side(serve: Callable[[Connection, Path, int], None], path: Path, threads: int) -> Iterator[Callable[[int], float]]:
    """A process that measures when it is asked; calling it with a number of streams gives tokens per second."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    process = multiprocessing.get_context("spawn").Process(target=serve, args=(theirs, path, threads), daemon=True)
    process.start()
    theirs.close()

    def rate(count: int) -> float:
        ours.send(count)
        return float(ours.recv())

    try:
        yield rate
    finally:
        ours.close()
        process.join()


def counts(pipe: Connection) -> Iterator[int]:
    """What the parent asks for, until it hangs up."""
    while True:
        try:
            yield pipe.recv()
        except EOFError:
            return


def serve_moeyard(pipe: Connection, path: Path, threads: int) -> None:
    use_huge_pages()  # as `moeyard serve` does
    engine = load_engine(path, model_id="m", settings=EngineSettings(threads=threads))
    with asyncio.Runner() as runner:
        runner.run(engine.start())
        for count in counts(pipe):
            pipe.send(runner.run(engine_rate(engine, count)))
        runner.run(engine.stop())


def load_peer(path: Path, threads: int) -> Any:
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, experts_implementation="grouped_mm").eval()


def serve_generate(pipe: Connection, path: Path, threads: int) -> None:
    model = load_peer(path, threads)
    for count in counts(pipe):
        pipe.send(generate_rate(model, count))


def serve_continuous(pipe: Connection, path: Path, threads: int) -> None:
    model = load_peer(path, threads)
    for count in counts(pipe):
        pipe.send(continuous_rate(model, count))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the result here as one JSON object")
    parser.add_argument("--model", type=Path, help="exported model directory; a random one of 461M is made if left out")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 4, 8, 16])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--continuous", action="store_true", help="transformers' continuous batching, too")
    args = parser.parse_args()

    programs = {"moeyard": serve_moeyard, "generate": serve_generate}
    if args.continuous:
        programs["continuous"] = serve_continuous
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        path = args.model or make_model(Path(folder), "medium")
        rates = {name: stack.enter_context(side(serve, path, args.threads)) for name, serve in programs.items()}
        peers = [name for name in rates if name != "moeyard"]
        print(f"{'streams':>8}{'moeyard tok/s':>24}" + "".join(f"{peer:>24}{'times as fast':>20}" for peer in peers))
        rows = []
        for count in args.streams:
            turns = {name: partial(rate, count) for name, rate in rates.items()}
            for turn in turns.values():
                turn()  # once to warm up
            values = take_turns(turns, args.rounds)
            shown = [
                f"{spread(values[peer]):>24}{spread(ratios(values['moeyard'], values[peer]), 2):>20}" for peer in peers
            ]
            print(f"{count:>8}{spread(values['moeyard']):>24}" + "".join(shown), flush=True)
            rows.append({"streams": count, **values})
        write(args.json, {"threads": args.threads, "rows": rows})


if __name__ == "__main__":
    main()
