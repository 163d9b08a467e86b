"""What the engine does besides generating: structure, vectors, tokens, other weights, records; through the protocol."""

from __future__ import annotations

import asyncio
import ctypes
import json
import re
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import torch

from moe import ModelConfig, MoEConfig, Transformer
from moe.checkpoint import save_model
from moe.generate import SamplingParams, generate
from moe.tokenizer import Tokenizer
from serve.client import (
    ContextLengthError,
    EmbeddingRequest,
    EngineDeadError,
    EngineRequest,
    InvalidRequestError,
    QueueFullError,
    RequestAbortedError,
    SamplingOptions,
    Structure,
    TokenChunk,
    UnknownModelError,
)
from serve.engine.admission import QueueLimits
from serve.engine.engine import AsyncEngine
from serve.engine.load import load_engine
from serve.engine.settings import EngineSettings

pytestmark = pytest.mark.unit

TOKENIZER = Tokenizer.bytes()
CONTEXT = 128


def made(seed: int, **changes: object) -> Transformer:
    moe = MoEConfig(num_experts=4, hidden_dim=16)
    shape: dict[str, object] = {
        "vocab_size": TOKENIZER.vocab_size,
        "dim": 16,
        "num_layers": 2,
        "num_heads": 2,
        "max_seq_len": CONTEXT,
        "moe": moe,
    }
    model = Transformer(ModelConfig(**(shape | changes)))  # type: ignore[arg-type]
    model.init_weights(seed)
    return model.eval()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("models")
    for name, seed in (("one", 0), ("two", 1)):
        save_model(folder / name, made(seed), TOKENIZER)
    save_model(folder / "wider", made(0, dim=32), TOKENIZER)
    save_model(folder / "other_tokens", made(0, vocab_size=300), Tokenizer.train_bpe(["aa bb aa bb"] * 9, 261))
    (folder / "broken").mkdir()
    (folder / "broken" / "config.json").write_text("{")
    return folder


def with_engine(models: Path, work: Callable[[AsyncEngine], Awaitable[None]], **settings: object) -> None:
    async def run() -> None:
        options = EngineSettings(**{"max_sequences": 4, "threads": 1, **settings})  # type: ignore[arg-type]
        engine = load_engine(models / "one", model_id="m", settings=options)
        await engine.start()
        try:
            await asyncio.wait_for(work(engine), 30)
        finally:
            await engine.stop()
        engine.core.check()
        assert engine.core.pool.num_used == 0

    asyncio.run(run())


def ask(prompt: str, name: str = "r", **options: object) -> EngineRequest:
    sampling = SamplingOptions(**{"temperature": 0.0, "max_tokens": 20, **options})  # type: ignore[arg-type]
    return EngineRequest(name, "m", (prompt,), sampling)


async def read(engine: AsyncEngine, request: EngineRequest) -> list[TokenChunk]:
    return [chunk async for chunk in await engine.generate(request)]


def text_of(chunks: list[TokenChunk], index: int = 0) -> str:
    return "".join(chunk.text for chunk in chunks if chunk.index == index)


SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["ann", "bob"]}, "ok": {"type": "boolean"}},
    "required": ["name", "ok"],
    "additionalProperties": False,
}


def test_structured_output_is_what_was_asked_for_and_ends_by_itself(models: Path) -> None:
    pytest.importorskip("llguidance", reason="needs llguidance: pip install 'moeyard[serve]'")

    async def work(engine: AsyncEngine) -> None:
        for temperature in (0.0, 1.0):
            options = {"temperature": temperature, "max_tokens": 100, "seed": 3, "n": 3}
            schema = Structure("json_schema", json.dumps(SCHEMA))
            chunks = await read(engine, ask("Say", structure=schema, **options))
            for index in range(3):
                value = json.loads(text_of(chunks, index))
                assert value["name"] in ("ann", "bob")
                assert isinstance(value["ok"], bool)
            assert {chunk.finish_reason for chunk in chunks if chunk.finish_reason} == {"stop"}
            chunks = await read(engine, ask("Say", structure=Structure("regex", r"[0-9]{3}-[ab]{1,5}z"), **options))
            assert all(re.fullmatch(r"[0-9]{3}-[ab]{1,5}z", text_of(chunks, index)) for index in range(3))
            chunks = await read(engine, ask("Say", structure=Structure("choice", '["yes", "no"]'), **options))
            assert {text_of(chunks, index) for index in range(3)} <= {"yes", "no"}
        ignoring = ask("Say", structure=Structure("choice", '["yes"]'), ignore_eos=True, max_tokens=50)
        assert text_of(await read(engine, ignoring)) == "yes"

    with_engine(models, work)


@pytest.mark.parametrize(
    "structure",
    [
        Structure("json_schema", '{"type": "nonsense"}'),
        Structure("json_schema", "{"),
        Structure("regex", "("),
        Structure("choice", "3"),
        Structure("grammar", "nonsense"),
    ],
)
def test_a_structure_that_makes_no_sense_is_refused(models: Path, structure: Structure) -> None:
    pytest.importorskip("llguidance", reason="needs llguidance: pip install 'moeyard[serve]'")

    async def work(engine: AsyncEngine) -> None:
        with pytest.raises(InvalidRequestError, match=structure.kind) as caught:
            await engine.generate(ask("x", structure=structure))
        assert caught.value.param == "response_format"

    with_engine(models, work)


def test_embeddings_come_in_order_as_unit_vectors_and_have_the_same_limits(models: Path) -> None:
    async def work(engine: AsyncEngine) -> None:
        answer = await engine.embed(EmbeddingRequest("e1", "m", ("abc", "d", "abc")))
        assert answer.prompt_tokens == 7
        assert len(answer.vectors) == 3
        assert all(len(vector) == engine.info.embedding_dim for vector in answer.vectors)
        assert all(sum(x * x for x in vector) == pytest.approx(1.0, abs=1e-5) for vector in answer.vectors)
        assert answer.vectors[0] == pytest.approx(answer.vectors[2], abs=1e-5)
        assert answer.vectors[0] != pytest.approx(answer.vectors[1], abs=1e-2)
        with pytest.raises(UnknownModelError):
            await engine.embed(EmbeddingRequest("e2", "nobody", ("a",)))
        with pytest.raises(ContextLengthError):
            await engine.embed(EmbeddingRequest("e3", "m", ("a" * (CONTEXT + 1),)))
        whole = await engine.embed(EmbeddingRequest("e4", "m", ("a" * CONTEXT,)))
        assert whole.prompt_tokens == CONTEXT

    with_engine(models, work)


def test_tokens_and_text_there_and_back(models: Path) -> None:
    async def work(engine: AsyncEngine) -> None:
        ids = await engine.tokenize("m", "Grüße <|im_end|>")
        assert await engine.detokenize("m", ids) == "Grüße <|im_end|>"
        assert len(await engine.tokenize("m", "Grüße <|im_end|>", special=False)) > len(ids)
        with pytest.raises(InvalidRequestError, match="token id 9999 is not in the vocabulary"):
            await engine.detokenize("m", [5, 9999])
        with pytest.raises(UnknownModelError):
            await engine.tokenize("nobody", "x")
        with pytest.raises(UnknownModelError):
            await engine.detokenize("nobody", [1])

    with_engine(models, work)


@pytest.mark.parametrize("running", ["drain", "keep"])
def test_pain_11_weights_are_swapped_under_load_without_a_stale_token(models: Path, running: str) -> None:
    prompt = "A prompt of more than one block, so that the cache holds something of it. "

    def reference(name: str, text: str, count: int) -> str:
        model = made({"one": 0, "two": 1}[name])
        steps = generate(model, TOKENIZER.encode(text), SamplingParams(max_tokens=count, temperature=0.0))
        return TOKENIZER.decode([step.token for step in steps])

    async def work(engine: AsyncEngine) -> None:
        old_version = engine.info.weights_version
        assert text_of(await read(engine, ask(prompt, "warm"))) == reference("one", prompt, 20)
        long = await engine.generate(ask(prompt, "long", max_tokens=48, ignore_eos=True))
        chunks = [await anext(long)]
        version = await engine.swap_weights("m", str(models / "two"), running=running)  # type: ignore[arg-type]
        assert version != old_version
        assert (await engine.models())[0].weights_version == version
        chunks += [chunk async for chunk in long]
        tokens = [token for chunk in chunks for token in chunk.token_ids]
        assert len(tokens) == 48
        after = await read(engine, ask(prompt, "after"))
        assert text_of(after) == reference("two", prompt, 20)
        if running == "drain":
            assert after[-1].usage.cached_tokens == 0
            expected = generate(made(0), TOKENIZER.encode(prompt), SamplingParams(max_tokens=48, temperature=0.0))
            assert tokens == [step.token for step in expected]
        back = await engine.swap_weights("m", str(models / "one"), running=running)  # type: ignore[arg-type]
        assert back == old_version
        assert text_of(await read(engine, ask(prompt, "again"))) == reference("one", prompt, 20)

    with_engine(models, work)


def test_weights_that_do_not_fit_are_refused_and_nothing_changes(models: Path) -> None:
    async def work(engine: AsyncEngine) -> None:
        before = text_of(await read(engine, ask("Hello")))
        for name, words in (
            ("wider", "differs from the served model in dim"),
            ("other_tokens", "its tokenizer is not that of the served model"),
            ("broken", "is damaged"),
            ("nowhere", "no such file"),
        ):
            with pytest.raises(InvalidRequestError, match=words) as caught:
                await engine.swap_weights("m", str(models / name))
            assert caught.value.param == "path"
        assert text_of(await read(engine, ask("Hello", "again"))) == before

    with_engine(models, work)


def test_expert_records_count_between_start_and_stop(models: Path) -> None:
    async def work(engine: AsyncEngine) -> None:
        assert (await engine.expert_record("m")).steps == 0
        await read(engine, ask("before", "r0"))
        await engine.record_experts("m", start=True)
        await read(engine, ask("abcd", "r1", max_tokens=6, ignore_eos=True))
        record = await engine.record_experts("m", start=False)
        await read(engine, ask("after", "r2"))
        assert await engine.expert_record("m") == record
        assert not record.recording
        assert record.tokens == 4 + 5  # the last token is never computed
        assert [sum(load) for load in record.load] == [9 * 2, 9 * 2]
        assert all(peak >= 1 for peak in record.peak_imbalance)
        total = (await engine.stats()).expert_load
        assert all(a > b for a, b in zip(map(sum, total), map(sum, record.load), strict=True))

    with_engine(models, work)


def test_the_prefix_cache_can_be_emptied_while_requests_run(models: Path) -> None:
    prompt = "The same beginning, long enough for several blocks of the cache: "

    async def work(engine: AsyncEngine) -> None:
        first = await read(engine, ask(prompt, "r1"))
        assert (await engine.stats()).cache.cached >= 4
        running = await engine.generate(ask(prompt, "r2", max_tokens=40, ignore_eos=True))
        await anext(running)
        assert await engine.reset_prefix_cache("m") >= 0
        assert len([chunk async for chunk in running])
        await engine.reset_prefix_cache("m")
        stats = await engine.stats()
        assert (stats.cache.cached, stats.cache.free) == (0, stats.cache.total)
        again = await read(engine, ask(prompt, "r3"))
        assert text_of(again) == text_of(first)
        assert again[-1].usage.cached_tokens == 0
        assert (await read(engine, ask(prompt, "r4")))[-1].usage.cached_tokens == 64

    with_engine(models, work)


def test_orders_to_a_stopping_or_dead_engine_come_back(models: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def run() -> None:
        engine = load_engine(models / "one", model_id="m", settings=EngineSettings(max_sequences=4, threads=1))
        await engine.start()
        running = await engine.generate(ask("x", "r1", max_tokens=None, ignore_eos=True, n=4))
        await anext(running)
        swap = asyncio.ensure_future(engine.swap_weights("m", str(models / "two")))
        await asyncio.sleep(0.05)
        thread = engine._thread
        assert thread is not None
        # What a fatal signal or an interpreter's shutdown does to a thread: an exception out of nowhere.
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident or 0), ctypes.py_object(SystemExit))
        with pytest.raises(EngineDeadError):
            async for _ in running:
                pass
        with pytest.raises((EngineDeadError, RequestAbortedError)):
            await asyncio.wait_for(swap, 5)
        assert (await engine.health()).status == "dead"
        with pytest.raises(EngineDeadError):
            await engine.reset_prefix_cache("m")
        await asyncio.wait_for(engine.stop(), 5)

    asyncio.run(run())
    assert "the engine died" in caplog.text


def test_gauges_of_memory_and_reading(models: Path) -> None:
    async def work(engine: AsyncEngine) -> None:
        request = ask("abc", max_tokens=30, ignore_eos=True)
        stream = await engine.generate(request)
        await anext(stream)
        stats = await engine.stats()
        assert stats.cache.used >= 1
        assert stats.cache.free + stats.cache.cached + stats.cache.used == stats.cache.total
        async for _ in stream:
            pass
        stats = await engine.stats()
        assert (stats.prompt_tokens, stats.generation_tokens) == (3, 30)
        assert (stats.steps, stats.step_tokens) == (30, 32)
        assert stats.cache.queries == 3
        model = engine.core.runner.model
        in_all = sum(p.numel() * 4 for p in model.parameters())
        experts = sum(p.numel() * 4 for _, layer in model.moe_layers() for p in layer.experts.parameters())
        # A pass of one token reads two of four experts, a pass of three at least as many and at most all.
        per_token = in_all - experts // 2
        kv = 2 * 2 * 16 * 4
        least = 30 * per_token + sum(range(3, 33)) * kv
        assert least <= stats.read_bytes <= least + experts // 2
        assert stats.read_gb_per_s > 0

    with_engine(models, work)


def test_limits_change_while_requests_run_and_wait(models: Path) -> None:
    async def work(engine: AsyncEngine) -> None:
        async def full(tokens: int) -> str | None:
            try:
                stream = await engine.generate(ask("x" * tokens, f"probe {tokens}", max_tokens=1))
            except QueueFullError as error:
                return error.reason
            await stream.aclose()
            return None

        streams = [await engine.generate(ask("x", f"r{i}", max_tokens=100, n=50, ignore_eos=True)) for i in range(2)]
        await anext(streams[0])
        assert await full(1) == "requests"
        await engine.limit(QueueLimits(2, 10), 64)
        assert (await full(10), await full(9)) == ("prompt_tokens", None)
        # Less than what waits already: nobody is sent away.
        await engine.limit(QueueLimits(0, 10), 64)
        assert await full(1) == "requests"
        assert (await anext(streams[0])).token_ids
        for stream in streams:
            await stream.aclose()
        while (await engine.stats()).num_running + (await engine.stats()).num_waiting:
            await asyncio.sleep(0.002)

        async def passes(name: str) -> int:
            before = (await engine.stats()).steps
            await read(engine, ask(f"{name}{'z' * 63}", name, max_tokens=1))
            return (await engine.stats()).steps - before

        assert await passes("a") == 1
        await engine.limit(QueueLimits(), 16)
        assert await passes("b") == 4
        with pytest.raises(ValueError, match="max_step_tokens 0 must be at least max_sequences 1"):
            await engine.limit(QueueLimits(), 0)
        assert await passes("c") == 4

    with_engine(models, work, max_sequences=1, max_queue=1, max_step_tokens=64)
