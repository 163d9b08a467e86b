"""One engine in a replica: tokens in batches, health, updates in place, and readers that die."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from serve.client import (
    ContextLengthError,
    EngineDeadError,
    EngineError,
    EngineHealth,
    EngineRequest,
    EngineStats,
    EngineUnavailableError,
    ModelInfo,
    PromptEcho,
    SamplingOptions,
    TokenChunk,
)
from serve.engine.admission import QueueLimits
from serve.hosts import ray_engine
from serve.hosts.ray_batches import BatchedStream, batches, joined
from serve.hosts.ray_engine import ADMITTED, REASON, EngineHost, ReplicaStartError
from serve.hosts.ray_options import RayOptions
from tests.ray_parts import INFO, REQUEST, chunk

pytestmark = pytest.mark.unit


# Batches.


class Script:
    """A token stream that plays chunks, pauses (seconds) and an error."""

    def __init__(self, *steps: TokenChunk | float | EngineError) -> None:
        self._steps, self.closed = list(steps), False

    def __aiter__(self) -> Script:
        return self

    async def __anext__(self) -> TokenChunk:
        while self._steps:
            step = self._steps.pop(0)
            if isinstance(step, TokenChunk):
                return step
            if isinstance(step, EngineError):
                raise step
            await asyncio.sleep(step)
        raise StopAsyncIteration

    async def aclose(self) -> None:
        self.closed = True


async def texts(stream: Script, every_s: float, tokens: int) -> list[str]:
    return ["".join(one.text for one in batch) async for batch in batches(stream, every_s, tokens)]


def test_the_first_token_travels_at_once_and_the_others_together() -> None:
    async def run() -> None:
        assert await texts(Script(chunk("a"), 0.01, *map(chunk, "bcdef")), 30, 100) == ["a", "bcdef"]
        assert await texts(Script(chunk("a"), 0.01, *map(chunk, "bcdef")), 30, 2) in (
            ["a", "bcdef"],
            ["a", "bc", "def"],
            ["a", "bc", "de", "f"],
        )
        began = time.monotonic()
        slow = Script(chunk("a"), 0.01, chunk("b"), 5.0, chunk("c"))
        parts = batches(slow, 0.03, 100)
        assert [(await anext(parts))[0].text, (await anext(parts))[0].text] == ["a", "b"]
        assert time.monotonic() - began < 1  # b did not wait for c
        await parts.aclose()
        assert await texts(Script(), 1, 1) == []

    asyncio.run(run())


def test_what_was_read_before_an_error_comes_before_it() -> None:
    async def run() -> None:
        parts = batches(Script(chunk("a"), 0.01, chunk("b"), EngineDeadError("gone")), 30, 100)
        assert [(await anext(parts))[0].text, (await anext(parts))[0].text] == ["a", "b"]
        with pytest.raises(EngineDeadError):
            await anext(parts)

    asyncio.run(run())


def test_a_stream_in_batches_is_a_stream() -> None:
    async def run() -> None:
        whole = Script(chunk("a"), 0.01, *map(chunk, "bcd"))
        found = [part.text async for part in BatchedStream(whole, 30, 100)]
        assert found == ["a", "bcd"]
        failing = BatchedStream(Script(chunk("a"), 0.01, chunk("b"), EngineDeadError("gone")), 30, 100)
        assert [(await anext(failing)).text, (await anext(failing)).text] == ["a", "b"]
        with pytest.raises(EngineDeadError):
            await anext(failing)
        left = Script(chunk("a"), 30.0, chunk("b"))
        stream = BatchedStream(left, 0.01, 100)
        assert (await anext(stream)).text == "a"
        await asyncio.wait_for(stream.aclose(), 5)  # a reader that leaves waits for nothing, and ends the request
        assert left.closed

    asyncio.run(run())


def test_joined_chunks_say_what_their_parts_said() -> None:
    echo = PromptEcho("p", (1,))
    parts = [
        chunk("a", 0, prompt=echo),
        chunk("x", 1),
        chunk("b", 0),
        chunk("c", 0, finish_reason="stop", stop_reason="!"),
    ]
    second, first = joined(parts)  # the latest is last: its usage is that of the whole request
    assert (first.text, first.token_ids, first.prompt) == ("abc", (97, 98, 99), echo)
    assert (first.finish_reason, first.stop_reason, first.usage) == ("stop", "!", parts[3].usage)
    assert second is parts[1]


# The engine in a replica.


@dataclass
class FakeEngine:
    """An engine client of scripted streams."""

    script: Script = field(default_factory=Script)
    health_now: EngineHealth = field(default_factory=lambda: EngineHealth("ready"))
    refuses: EngineError | None = None
    swaps: list[tuple[str, str]] = field(default_factory=list)
    limits: list[tuple[int, int, int]] = field(default_factory=list)
    aborted: list[str] = field(default_factory=list)

    async def start(self) -> None:
        if self.refuses is not None:
            raise self.refuses

    async def stop(self, *, drain_s: float = 0.0) -> None: ...

    async def models(self) -> tuple[ModelInfo, ...]:
        return (INFO,)

    async def generate(self, request: EngineRequest) -> Script:
        if self.refuses is not None:
            raise self.refuses
        return self.script

    async def abort(self, request_id: str) -> bool:
        self.aborted.append(request_id)
        return True

    async def swap_weights(self, model: str, path: str, *, running: str = "drain") -> str:
        if "bad" in path:
            raise EngineUnavailableError(f"{path} is bad")
        self.swaps.append((path, running))
        return "v2"

    async def limit(self, queue: QueueLimits, max_step_tokens: int) -> None:
        self.limits.append((queue.max_requests, queue.max_prompt_tokens, max_step_tokens))

    async def health(self) -> EngineHealth:
        return self.health_now

    async def stats(self, model: str | None = None) -> EngineStats:
        return EngineStats()


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> FakeEngine:
    fake = FakeEngine()
    monkeypatch.setattr(ray_engine, "load_replica_engine", lambda *_: fake)
    return fake


def host_of(**options: Any) -> EngineHost:
    return EngineHost("fox", Path("/m"), RayOptions(model="/m", **options), replica_id="r1")


def test_a_refusal_is_the_first_item_and_a_failure_the_last(engine: FakeEngine) -> None:
    async def run() -> None:
        host = host_of()
        await host.start()
        engine.script = Script(chunk("a"), EngineDeadError("gone"))
        items = [item async for item in host.generate(REQUEST)]
        assert items[0] == ADMITTED
        assert isinstance(items[-1], EngineDeadError)
        assert len(items) == 3
        engine.refuses = ContextLengthError(1, 2, 3)
        assert [item async for item in host.generate(REQUEST)] == [engine.refuses]
        assert (await host.report()).replica_id == "r1"

    asyncio.run(run())


def test_a_cancelled_reader_closes_the_stream(engine: FakeEngine) -> None:
    async def run() -> None:
        host = host_of()
        await host.start()
        engine.script = Script(chunk("a"), 60.0)
        items = host.generate(REQUEST)
        assert [await anext(items), len(await anext(items))] == [ADMITTED, 1]  # type: ignore[arg-type]
        waiting = asyncio.ensure_future(anext(items))
        await asyncio.sleep(0.01)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        assert engine.script.closed

    asyncio.run(run())


def test_requests_of_a_dead_reader_are_aborted(engine: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_engine, "CALLER_CHECK_S", 0.01)

    async def run() -> None:
        lives = {"one": True, "two": False}
        host = EngineHost("fox", Path("/m"), RayOptions(model="/m"), caller_lives=lives.__getitem__)
        await host.start()
        engine.script = Script(1.0)
        streams = [
            host.generate(EngineRequest(f"q-{caller}", "fox", ("a",), SamplingOptions()), caller) for caller in lives
        ]
        for stream in streams:
            assert await anext(stream) == ADMITTED
        await asyncio.sleep(0.1)
        assert set(engine.aborted) == {"q-two"}
        await host.stop()

    asyncio.run(run())


def test_weights_that_cannot_be_served_stop_a_start_but_no_running_replica(engine: FakeEngine) -> None:
    async def run() -> None:
        host = host_of()
        await host.start()
        with pytest.raises(ReplicaStartError, match=f"{REASON} /bad is bad"):
            await host.reconfigure({"weights": "/bad"})
        await host.reconfigure({"weights": "/bad"})
        await host.reconfigure({"wieghts": "/n"})
        assert engine.swaps == []
        await host.reconfigure({"weights": "/n", "running": "keep"})
        await host.reconfigure({"weights": "/n"})  # it has them
        await host.reconfigure({"weights": None})  # back to the first
        assert engine.swaps == [("/n", "keep"), ("/m", "drain")]

    asyncio.run(run())


def test_limits_change_in_place_and_go_back_to_the_arguments(
    engine: FakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    async def run() -> None:
        host = host_of(max_queue=4, max_queue_tokens=100, max_step_tokens=64)
        await host.start()
        await host.reconfigure({"weights": "/m", "max_queue": 4})  # as they are
        assert engine.limits == []
        await host.reconfigure({"max_queue": 0, "max_queue_tokens": 7})
        # What is not valid changes nothing at all, and weights that cannot be served keep no limit from changing.
        await host.reconfigure({"max_queue": 9, "max_step_tokens": 31, "weights": "/n"})
        await host.reconfigure({"max_queue": 9, "max_queu_tokens": 1, "weights": "/n"})
        assert engine.limits == [(0, 7, 64)]
        await host.reconfigure({"max_queue": 2, "weights": "/bad"})
        await host.reconfigure({})
        await host.reconfigure({"max_queue": 500})
        assert engine.limits == [(0, 7, 64), (2, 100, 64), (4, 100, 64), (500, 100, 64)]
        assert engine.swaps == []

    asyncio.run(run())
    errors = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert len(errors) == 3
    assert "user_config: max_step_tokens must be at least 32 (max_sequences: one token each), got 31" in errors[0]
    assert "user_config: unknown max_queu_tokens, known are weights, running, max_queue, " in errors[1]
    (warning,) = (record.getMessage() for record in caplog.records if record.levelname == "WARNING")
    assert warning.startswith("max_queue 500 is never reached: Ray sends 68 requests at a time")


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        ({"max_queue": -1}, "max_queue must be at least 0, got -1"),
        ({"max_queue_tokens": 0}, "max_queue_tokens must be at least 1, got 0"),
        ({"max_queue": "many"}, "max_queue: Input should be a valid integer, .*, got 'many'"),
        ({"running": "stop"}, "running: Input should be 'drain' or 'keep', got 'stop'"),
        ({"weights": 3, "x": 1}, "weights: Input should be a valid string, got 3; unknown x, known are .*"),
    ],
)
def test_a_user_config_that_is_not_valid_stops_a_start_in_one_line(
    engine: FakeEngine, config: dict[str, Any], problem: str
) -> None:
    async def run() -> None:
        host = host_of()
        await host.start()
        with pytest.raises(ReplicaStartError, match=f"^{REASON} user_config: {problem}$"):
            await host.reconfigure(config)
        assert engine.limits == []

    asyncio.run(run())


def test_health_is_the_heartbeat_until_the_engine_is_told_to_stop(engine: FakeEngine) -> None:
    async def run() -> None:
        host = host_of(heartbeat_limit_s=5)
        await host.start()
        await host.check_health()
        engine.health_now = EngineHealth("ready", heartbeat_age_s=6)
        with pytest.raises(RuntimeError, match="has not passed its loop for 6 s"):
            await host.check_health()
        engine.health_now = EngineHealth("stopped")
        with pytest.raises(RuntimeError, match="stopped"):
            await host.check_health()
        await host.control("stop", drain_s=0.0)
        await host.check_health()
        with pytest.raises(ValueError, match="not a method"):
            await host.control("start")

    asyncio.run(run())


def test_a_model_that_does_not_run_is_a_reason_in_one_line(engine: FakeEngine) -> None:
    engine.refuses = EngineDeadError("dead")
    engine.refuses.__cause__ = ValueError("NaN\nin block 0")
    with pytest.raises(ReplicaStartError, match=f"^{REASON} /m: loaded, but does not run: NaN in block 0$"):
        asyncio.run(host_of().start())
