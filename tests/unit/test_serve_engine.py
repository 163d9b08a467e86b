"""The simple engine over a real, tiny model that knows one sentence by heart."""

from __future__ import annotations

import asyncio
import math
import pickle
import threading
from collections.abc import Awaitable, Callable

import pytest
import torch

from moe.generate import SamplingParams, generate
from moe.transformer import Transformer
from serve.client import (
    ContextLengthError,
    EngineClient,
    EngineDeadError,
    EngineRequest,
    EngineUnavailableError,
    InvalidRequestError,
    ModelInfo,
    QueueFullError,
    RequestAbortedError,
    SamplingOptions,
    TokenChunk,
    TokenStream,
    UnknownModelError,
)
from serve.engine.engine import AsyncEngine
from serve.engine.load import build_engine
from serve.engine.settings import EngineSettings
from tests.fox import SENTENCE, TOKENIZER, fox_model

pytestmark = pytest.mark.unit

CONTEXT = 128
GREEDY = SamplingOptions(temperature=0.0, max_tokens=12)


@pytest.fixture(scope="module")
def model() -> Transformer:
    return fox_model(CONTEXT)


def build(model: Transformer, settings: EngineSettings | None = None) -> AsyncEngine:
    info = ModelInfo("fox", 0, CONTEXT, TOKENIZER.vocab_size, num_experts=4, moe_layers=(0, 1))
    settings = settings or EngineSettings(max_sequences=4, threads=1)
    return build_engine(model, TOKENIZER, info, frozenset({TOKENIZER.eos_id}), settings)


def with_engine(
    model: Transformer, work: Callable[[AsyncEngine], Awaitable[None]], settings: EngineSettings | None = None
) -> None:
    """Runs ``work`` on a started engine, and checks afterwards that nothing is left in it."""

    async def run() -> None:
        engine = build(model, settings)
        assert isinstance(engine, EngineClient)
        await engine.start()
        await engine.start()  # does nothing
        try:
            await asyncio.wait_for(work(engine), 20)
        finally:
            await engine.stop()
        stats = await engine.stats()
        assert (stats.num_running, stats.num_waiting, stats.waiting_prompt_tokens) == (0, 0, 0)
        engine.core.check()
        assert stats.cache.used == 0
        assert stats.cache.free + stats.cache.cached == stats.cache.total

    before = threading.active_count()
    asyncio.run(run())
    assert threading.active_count() <= before


def request(prompt: str | tuple[int, ...] | list[str], name: str = "r", **options: object) -> EngineRequest:
    prompts = tuple(prompt) if isinstance(prompt, list) else (prompt,)
    echo = bool(options.pop("return_prompt", False))
    sampling = SamplingOptions(**{"temperature": 0.0, "max_tokens": 12, **options})  # type: ignore[arg-type]
    return EngineRequest(name, "fox", prompts, sampling, return_prompt=echo)


async def read(stream: TokenStream) -> list[TokenChunk]:
    return [chunk async for chunk in stream]


async def ask(engine: AsyncEngine, *args: object, **options: object) -> list[TokenChunk]:
    return await read(await engine.generate(request(*args, **options)))  # type: ignore[arg-type]


def text_of(chunks: list[TokenChunk], index: int = 0) -> str:
    return "".join(chunk.text for chunk in chunks if chunk.index == index)


def test_greedy_text_equals_moe_generate_token_for_token(model: Transformer) -> None:
    async def work(engine: AsyncEngine) -> None:
        chunks = await ask(engine, "Grü", max_tokens=40, logprobs=3)
        params = SamplingParams(max_tokens=40, temperature=0, top_logprobs=3)
        steps = list(generate(model, TOKENIZER.encode("Grü"), params))
        assert [token for chunk in chunks for token in chunk.token_ids] == [step.token for step in steps]
        assert text_of(chunks) == TOKENIZER.decode([step.token for step in steps])
        scores = [entry for chunk in chunks for entry in chunk.logprobs]
        assert [entry.chosen.logprob for entry in scores] == pytest.approx([step.logprob for step in steps], abs=1e-4)
        assert [[s.token_id for s in entry.top] for entry in scores] == [[t for t, _ in step.top] for step in steps]
        assert chunks[-1].finish_reason == "length"
        assert (chunks[-1].usage.prompt_tokens, chunks[-1].usage.completion_tokens) == (4, 40)
        assert chunks[-1].timings is not None

    with_engine(model, work)


def test_multibyte_characters_are_never_split_between_chunks(model: Transformer) -> None:
    async def work(engine: AsyncEngine) -> None:
        chunks = await ask(engine, "Gr", max_tokens=13, logprobs=0)
        assert [chunk.text for chunk in chunks] == ["ü", "ß", "e", ",", " ", "😀", " ", "f", ""]
        assert [len(chunk.token_ids) for chunk in chunks] == [2, 2, 1, 1, 1, 4, 1, 1, 0]
        smile = chunks[5].logprobs
        assert b"".join(entry.chosen.raw for entry in smile) == "😀".encode()
        assert [entry.text_offset for entry in smile] == [5, 5, 5, 5]

    with_engine(model, work)


@pytest.mark.parametrize(
    ("stop", "text", "reason"),
    [
        (("STOP",), "x! ", "STOP"),
        (("!", "x"), "", "x"),
        (("nowhere",), "x! STOP here", None),
        (("p", "re"), "x! STOP he", "re"),
    ],
)
def test_stop_strings_over_token_borders(
    model: Transformer, stop: tuple[str, ...], text: str, reason: str | None
) -> None:
    async def work(engine: AsyncEngine) -> None:
        chunks = await ask(engine, SENTENCE[:11], stop=stop, logprobs=0)
        assert text_of(chunks) == text
        assert chunks[-1].stop_reason == reason
        assert chunks[-1].finish_reason == ("length" if reason is None else "stop")
        assert "".join(e.chosen.text for chunk in chunks for e in chunk.logprobs) == text
        assert chunks[-1].usage.completion_tokens == len(text) + len(reason or "")

    with_engine(model, work)


def test_stop_tokens_end_without_showing_and_eos_can_be_ignored(model: Transformer) -> None:
    async def work(engine: AsyncEngine) -> None:
        bang = TOKENIZER.encode("!")[0]
        chunks = await ask(engine, SENTENCE[:10], "a", stop_token_ids=(bang,))
        assert (text_of(chunks), chunks[-1].finish_reason, chunks[-1].stop_reason) == ("ox", "stop", bang)
        assert chunks[-1].usage.completion_tokens == 3
        eos = ((TOKENIZER.eos_id, 100.0),)
        ended = await ask(engine, "Gr", "b", logit_bias=eos)
        assert (text_of(ended), ended[-1].finish_reason, ended[-1].stop_reason) == ("", "stop", None)
        ignored = await ask(engine, "Gr", "c", logit_bias=eos, ignore_eos=True)
        assert (ignored[-1].finish_reason, ignored[-1].usage.completion_tokens) == ("length", 12)
        assert text_of(ignored) == ""  # a special token has no text
        shown = await ask(engine, "Gr", "d", logit_bias=eos, ignore_eos=True, skip_special_tokens=False, max_tokens=2)
        assert text_of(shown) == "<|endoftext|>" * 2
        late = await ask(engine, "Gr", "e", logit_bias=eos, min_tokens=5)
        assert late[-1].usage.completion_tokens == 6

    with_engine(model, work)


def test_seed_gives_the_same_text_whatever_else_runs(model: Transformer) -> None:
    async def work(engine: AsyncEngine) -> None:
        hot = {"temperature": 3.0, "seed": 7, "n": 3}
        alone = await ask(engine, "Gr", "a", **hot)
        others = [asyncio.ensure_future(ask(engine, "fox", f"o{i}", temperature=3.0)) for i in range(2)]
        again = await ask(engine, "Gr", "b", **hot)
        await asyncio.gather(*others)
        texts = [[c.token_ids for c in alone if c.index == i] for i in range(3)]
        assert texts == [[c.token_ids for c in again if c.index == i] for i in range(3)]
        assert texts[0] != texts[1]
        # Sample i draws from seed + i.
        single = await ask(engine, "Gr", "c", temperature=3.0, seed=8)
        assert [chunk.token_ids for chunk in single] == texts[1]
        unseeded = [await ask(engine, "Gr", f"d{i}", temperature=3.0) for i in range(2)]
        assert [c.token_ids for c in unseeded[0]] != [c.token_ids for c in unseeded[1]]

    with_engine(model, work)


def test_several_prompts_and_samples_are_one_request_in_order(model: Transformer) -> None:
    async def work(engine: AsyncEngine) -> None:
        chunks = await ask(engine, ["Gr", "fo"], n=2, max_tokens=3)
        assert [text_of(chunks, i) for i in range(4)] == ["ü\ufffd", "ü\ufffd", "x! ", "x! "]
        assert sorted(c.index for c in chunks if c.finish_reason) == [0, 1, 2, 3]
        assert (chunks[-1].usage.prompt_tokens, chunks[-1].usage.completion_tokens) == (4, 12)

    with_engine(model, work)


def test_echo_and_prompt_logprobs_equal_a_plain_forward_pass(model: Transformer) -> None:
    async def work(engine: AsyncEngine) -> None:
        chunks = await ask(engine, "Grüß", return_prompt=True, prompt_logprobs=1, max_tokens=0)
        (chunk,) = chunks
        assert (chunk.finish_reason, chunk.text, chunk.usage.completion_tokens) == ("length", "", 0)
        assert chunk.prompt is not None
        assert chunk.prompt.text == "Grüß"
        ids = TOKENIZER.encode("Grüß")
        assert chunk.prompt.token_ids == tuple(ids)
        with torch.no_grad():
            logits_TV = model(torch.tensor([ids])).logits_BTV[0].double()
        entries = chunk.prompt.logprobs
        assert entries[0].chosen.logprob is None
        assert [entry.text_offset for entry in entries] == [0, 1, 2, 2, 3, 3]
        for position in range(1, len(ids)):
            row = logits_TV[position - 1].tolist()
            norm = math.log(sum(math.exp(value) for value in row))
            assert entries[position].chosen.logprob == pytest.approx(row[ids[position]] - norm, abs=1e-4)
            assert entries[position].top[0].token_id == row.index(max(row))
        decoded = await ask(engine, tuple(ids), "ids", return_prompt=True, max_tokens=1)
        assert decoded[0].prompt is not None
        assert decoded[0].prompt.text == "Grüß"
        assert decoded[0].prompt.logprobs == ()

    with_engine(model, work)


def test_an_empty_prompt_starts_a_document(model: Transformer) -> None:
    async def work(engine: AsyncEngine) -> None:
        chunks = await ask(engine, "", max_tokens=2)
        steps = generate(model, [TOKENIZER.eos_id], SamplingParams(max_tokens=2, temperature=0))
        assert [t for c in chunks for t in c.token_ids] == [step.token for step in steps]

    with_engine(model, work)


def test_expert_load_counts_every_computed_token_once_per_layer_and_choice(model: Transformer) -> None:
    async def work(engine: AsyncEngine) -> None:
        assert (await engine.stats()).expert_load == ((0,) * 4, (0,) * 4)  # warming up does not count
        await ask(engine, "Grüß", max_tokens=5)
        stats = await engine.stats()
        # Six prompt tokens and four of the five generated ones went through the model, each to two experts.
        assert [sum(load_E) for load_E in stats.expert_load] == [(6 + 4) * 2] * 2
        assert (stats.prompt_tokens, stats.generation_tokens, stats.finished) == (6, 5, {"length": 1})

    with_engine(model, work)


def test_requests_that_can_never_be_served_are_refused_at_once(model: Transformer) -> None:
    async def work(engine: AsyncEngine) -> None:
        cases: list[tuple[EngineRequest, type[Exception], str]] = [
            (EngineRequest("r", "cat", ("x",)), UnknownModelError, "`cat` does not exist"),
            (request("x" * 128, max_tokens=1), ContextLengthError, "requested 129 tokens .128 in the prompt"),
            (request("x" * 129), ContextLengthError, "your prompt has 129 tokens"),
            (request("x" * 128, max_tokens=None), ContextLengthError, "leaves no room"),
            (request((5, 259)), InvalidRequestError, "token id 259 is not in the vocabulary of 259"),
            (request("x", logit_bias=((259, 1.0),)), InvalidRequestError, "token id 259"),
            (request("x", min_tokens=13), InvalidRequestError, "min_tokens 13 is more than max_tokens 12"),
            (request(["x"] * 9, n=128), InvalidRequestError, "at most 1024"),
        ]
        for bad, error, words in cases:
            with pytest.raises(error, match=words):
                await engine.generate(bad)
        full = await ask(engine, "x" * 100, max_tokens=None, ignore_eos=True)
        assert full[-1].usage.completion_tokens == CONTEXT - 100

    with_engine(model, work)


async def pile_up(engine: AsyncEngine, count: int) -> list[TokenStream]:
    """Long requests: the first runs, the others wait."""
    streams = []
    for number in range(count):
        streams.append(await engine.generate(request("Gr", f"long{number}", max_tokens=None, n=50, ignore_eos=True)))
        while not (await engine.stats()).num_running:
            await asyncio.sleep(0.002)
    return streams


def test_pain_5_a_full_queue_refuses_at_once_and_recovers(model: Transformer) -> None:
    async def work(engine: AsyncEngine) -> None:
        streams = await pile_up(engine, 3)
        with pytest.raises(QueueFullError) as caught:
            await engine.generate(request("x", "one too many"))
        assert caught.value.reason == "requests"
        assert 0 < caught.value.retry_after_s <= 60
        assert (await engine.stats()).rejected == {"requests": 1}
        for stream in streams:
            await stream.aclose()
        while (await engine.stats()).num_running:
            await asyncio.sleep(0.002)
        assert text_of(await ask(engine, "fo", "after", max_tokens=2)) == "x!"

    with_engine(model, work, EngineSettings(max_sequences=1, max_queue=2, threads=1))


def test_pain_7_abort_works_for_waiting_and_running_and_only_for_its_own_request(model: Transformer) -> None:
    async def work(engine: AsyncEngine) -> None:
        running, waiting, bystander = await pile_up(engine, 3)
        first = await anext(running)
        assert first.token_ids
        assert await engine.abort("long1") is True
        with pytest.raises(RequestAbortedError):
            await read(waiting)
        assert await engine.abort("long1") is False
        assert await engine.abort("unknown") is False
        assert (await engine.stats()).num_running == 1  # pain 8: nobody else was cancelled
        assert await engine.abort("long0") is True
        with pytest.raises(RequestAbortedError):
            await read(running)
        assert (await anext(bystander)).token_ids
        await bystander.aclose()
        await bystander.aclose()
        while (await engine.stats()).num_running:
            await asyncio.sleep(0.002)
        assert (await engine.stats()).finished["abort"] == 3

    with_engine(model, work)


def test_a_reader_whose_loop_is_gone_does_not_keep_the_engine_busy(model: Transformer) -> None:
    engine = build(model)

    async def begin() -> None:
        await engine.start()
        stream = await engine.generate(request("Gr", max_tokens=None, n=200, ignore_eos=True))
        await anext(stream)

    async def look() -> None:
        for _ in range(500):
            if not (await engine.stats()).num_running:
                break
            await asyncio.sleep(0.01)
        assert (await engine.stats()).num_running == 0
        assert text_of(await ask(engine, "fo", "after", max_tokens=2)) == "x!"
        await engine.stop()

    asyncio.run(begin())
    asyncio.run(look())


def test_pain_6_a_dead_engine_says_so_and_fails_everybody_without_a_hang(
    model: Transformer, caplog: pytest.LogCaptureFixture
) -> None:
    async def run() -> None:
        engine = build(model)
        await engine.start()
        streams = await pile_up(engine, 3)

        def explode(*_: object) -> None:
            raise OSError("disk at /secret/place")

        handle = model.blocks[1].register_forward_pre_hook(explode)
        try:
            for stream in streams:
                with pytest.raises(EngineDeadError, match=r"failed \(OSError\)"):
                    await asyncio.wait_for(read(stream), 5)
        finally:
            handle.remove()
        health = await engine.health()
        assert health.status == "dead"
        assert "OSError" in health.detail
        assert "secret" not in health.detail
        with pytest.raises(EngineDeadError):
            await engine.generate(request("x"))
        stats = await engine.stats()
        assert (stats.num_running, stats.num_waiting, stats.finished["error"]) == (0, 0, 3)
        await asyncio.wait_for(engine.stop(drain_s=30), 5)
        assert (await engine.health()).status == "dead"

    asyncio.run(run())
    assert "disk at /secret/place" in caplog.text  # the log has it, clients do not


def test_an_engine_that_cannot_warm_up_fails_its_start(model: Transformer) -> None:
    async def run() -> None:
        def explode(*_: object) -> None:
            raise MemoryError

        handle = model.blocks[0].register_forward_pre_hook(explode)
        try:
            with pytest.raises(EngineDeadError, match="MemoryError"):
                await asyncio.wait_for(build(model).start(), 5)
        finally:
            handle.remove()

    asyncio.run(run())


def test_the_heartbeat_is_young_when_idle_and_when_busy_and_grows_when_wedged(model: Transformer) -> None:
    async def work(engine: AsyncEngine) -> None:
        async def youngest() -> float:
            """The smallest age seen after a pause that is longer than it should ever be."""
            await asyncio.sleep(0.6)
            ages = []
            for _ in range(20):
                ages.append((await engine.health()).heartbeat_age_s)
                await asyncio.sleep(0.02)
            return min(ages)

        assert (await engine.health()).status == "ready"
        assert await youngest() < 0.5
        (stream,) = await pile_up(engine, 1)
        assert await youngest() < 0.5
        gate, held = threading.Event(), threading.Event()

        def hang(*_: object) -> None:
            held.set()
            gate.wait(10)

        handle = model.blocks[0].register_forward_pre_hook(hang)
        try:
            await asyncio.to_thread(held.wait, 5)
            await asyncio.sleep(0.5)
            assert (await engine.health()).heartbeat_age_s > 0.4
        finally:
            handle.remove()
            gate.set()
        await stream.aclose()

    with_engine(model, work)


def test_stop_lets_running_requests_finish_within_the_deadline_and_takes_no_more(model: Transformer) -> None:
    async def run() -> None:
        engine = build(model)
        with pytest.raises(EngineUnavailableError, match="starting"):
            await engine.generate(request("x"))
        await engine.start()
        streams = [await engine.generate(request("fo", f"r{i}", max_tokens=60)) for i in range(3)]
        stopping = asyncio.ensure_future(engine.stop(drain_s=10))
        await asyncio.sleep(0)
        assert (await engine.health()).status == "draining"
        with pytest.raises(EngineUnavailableError, match="draining"):
            await engine.generate(request("x"))
        for stream in streams:
            assert (await read(stream))[-1].finish_reason == "length"
        await asyncio.wait_for(stopping, 5)
        assert (await engine.health()).status == "stopped"

    asyncio.run(run())


def test_stop_ends_what_is_left_after_the_deadline_with_an_error(model: Transformer) -> None:
    async def run() -> None:
        engine = build(model)
        await engine.start()
        streams = await pile_up(engine, 2)
        await asyncio.wait_for(engine.stop(drain_s=0.05), 5)
        for stream in streams:
            with pytest.raises(RequestAbortedError, match="server stopped"):
                await read(stream)
        stats = await engine.stats()
        assert (stats.num_running, stats.num_waiting) == (0, 0)

    asyncio.run(run())


@pytest.mark.parametrize(
    "error",
    [
        UnknownModelError("m"),
        InvalidRequestError("bad", "n"),
        ContextLengthError(10, 8, 4),
        QueueFullError("prompt_tokens", 5, 1.5),
        EngineDeadError("dead"),
    ],
)
def test_errors_and_values_cross_process_borders(error: Exception) -> None:
    """A later engine lives in another process; pickling must keep type, text and fields."""
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), str(copy), vars(copy)) == (type(error), str(error), vars(error))
    assert pickle.loads(pickle.dumps(request("x", n=2))) == request("x", n=2)
