"""The client over replicas, with a fake in place of Ray: order, cancellation, death, time-outs, orders to all."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest

from serve.client import (
    ContextLengthError,
    EngineClient,
    EngineDeadError,
    EngineError,
    EngineHealth,
    EngineRequest,
    EngineStats,
    EngineUnavailableError,
    UnknownModelError,
)
from serve.hosts import ray_client
from serve.hosts.ray_client import Fleet, RayHandleClient, ReplicaClient, ReplicaLostError
from serve.hosts.ray_engine import ADMITTED
from serve.hosts.ray_merge import ReplicaReport
from tests.ray_parts import INFO, REQUEST, chunk

pytestmark = pytest.mark.unit


# The client over handles.


class FakeItems:
    """A remote generator that plays steps: items, seconds, errors."""

    def __init__(self, *steps: object, deaf: bool = False) -> None:
        self._steps, self._deaf, self.cancelled = list(steps), deaf, False

    def __aiter__(self) -> AsyncIterator[object]:
        return self

    async def __anext__(self) -> object:
        while True:
            if self.cancelled and not self._deaf:
                raise asyncio.CancelledError
            if not self._steps:
                raise StopAsyncIteration
            step = self._steps[0]
            if isinstance(step, float):
                await asyncio.sleep(min(step, 0.01))
                self._steps[0] = step - 0.01
                if step <= 0:
                    self._steps.pop(0)
                continue
            self._steps.pop(0)
            if isinstance(step, ReplicaLostError):
                raise step
            return step

    def cancel(self) -> None:
        self.cancelled = True


class FakeHandle:
    """Replicas that answer what they are told to."""

    def __init__(self, *streams: FakeItems) -> None:
        self._streams = list(streams)
        self.broadcasts: list[tuple[object, ...]] = []
        self.answers: list[object] = []
        self.found = [ReplicaReport("r1", 1, INFO, EngineStats(num_running=1), EngineHealth("ready"))]
        self.hangs = False

    def stream(self, request: EngineRequest) -> FakeItems:
        return self._streams.pop(0)

    async def call(self, method: str, *args: Any, timeout_s: float, **kwargs: Any) -> object:
        if method == "report":
            return self.found[0]
        return self.answers.pop(0)

    async def broadcast(self, method: str, *args: Any, timeout_s: float, **kwargs: Any) -> list[object]:
        self.broadcasts.append((method, *args))
        return self.answers

    async def reports(self, timeout_s: float) -> list[ReplicaReport]:
        if self.hangs:
            await asyncio.sleep(60)
        return self.found


def client_of(handle: FakeHandle, **options: Any) -> RayHandleClient:
    return RayHandleClient({"fox": Fleet("fox", handle, **({"admission_timeout_s": 5.0} | options))})


def test_the_clients_are_engine_clients() -> None:
    fleet = Fleet("fox", FakeHandle(), admission_timeout_s=1)
    assert isinstance(client_of(FakeHandle()), EngineClient)
    assert isinstance(ReplicaClient(client_of(FakeHandle()), fleet, batch_s=0.01, batch_tokens=4), EngineClient)


def test_chunks_arrive_in_order_and_errors_before_the_first_of_them() -> None:
    async def run() -> None:
        batch = [chunk("b"), chunk("c")]
        handle = FakeHandle(
            FakeItems(ADMITTED, [chunk("a")], batch),
            FakeItems(ContextLengthError(1, 2, 3)),
            FakeItems(ADMITTED, [chunk("a")], EngineDeadError("gone")),
        )
        client = client_of(handle)
        await client.start()
        with pytest.raises(UnknownModelError):
            await client.generate(EngineRequest("q", "wolf", ("a",)))
        assert [one.text async for one in await client.generate(REQUEST)] == ["a", "b", "c"]
        with pytest.raises(ContextLengthError):
            await client.generate(REQUEST)
        stream = await client.generate(REQUEST)
        await anext(stream)
        with pytest.raises(EngineDeadError):
            await anext(stream)
        await stream.aclose()

    asyncio.run(run())


def test_a_request_moves_on_when_its_replica_dies_before_it_has_answered() -> None:
    async def run() -> None:
        lost = ReplicaLostError("gone")
        handle = FakeHandle(FakeItems(lost), FakeItems(ADMITTED, [chunk("a")], lost), *[FakeItems(lost)] * 3)
        client = client_of(handle)
        stream = await client.generate(REQUEST)
        assert (await anext(stream)).text == "a"
        with pytest.raises(ReplicaLostError):  # now it has been read, and cannot begin again
            await anext(stream)
        handle._streams = [FakeItems(lost) for _ in range(ray_client.MAX_TRIES)]
        with pytest.raises(ReplicaLostError):
            await client.generate(REQUEST)
        assert handle._streams == []

    asyncio.run(run())


def test_no_free_engine_is_a_503_in_time() -> None:
    async def run() -> None:
        items = FakeItems(60.0)
        with pytest.raises(EngineUnavailableError, match=r"within 0\.05 s"):
            await client_of(FakeHandle(items), admission_timeout_s=0.05).generate(REQUEST)
        assert items.cancelled

    asyncio.run(run())


def test_a_cancelled_stream_is_confirmed_or_aborted_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_client, "CONFIRM_S", 0.05)

    async def run() -> None:
        handle = FakeHandle(FakeItems(ADMITTED, 60.0), FakeItems(ADMITTED, 60.0, deaf=True))
        client = client_of(handle)
        for _ in range(2):
            stream = await client.generate(REQUEST)
            await stream.aclose()
            await stream.aclose()
            await asyncio.sleep(0.15)
        assert handle.broadcasts == [("abort", "q1")]

    asyncio.run(run())


def test_questions_about_state_are_answered_while_a_replica_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_client, "REPORT_WAIT_S", 0.05)
    monkeypatch.setattr(ray_client, "REPORT_AGE_S", 0.01)

    async def run() -> None:
        handle = FakeHandle()
        client = client_of(handle)
        await client.start()
        handle.hangs = True
        await asyncio.sleep(0.05)
        began = time.monotonic()
        assert (await client.models()) == (INFO,)
        assert time.monotonic() - began < 0.03
        assert (await client.stats()).num_running == 1
        assert (await client.health()).heartbeat_age_s > 0.05
        assert time.monotonic() - began < 1

    asyncio.run(run())


def test_no_replica_is_not_ready_unless_the_model_may_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_client, "REPORT_AGE_S", 0.0)

    async def run() -> None:
        for rests, status in ((False, "starting"), (True, "ready")):
            handle = FakeHandle()
            client = client_of(handle, rests=rests)
            await client.start()
            handle.found = []
            assert (await client.health()).status == status
            assert (await client.stats()).num_running == 0

    asyncio.run(run())


def test_orders_reach_all_replicas_and_their_answers_are_one() -> None:
    async def run() -> None:
        handle = FakeHandle()
        client = client_of(handle)
        handle.answers = [3, 4]
        assert await client.reset_prefix_cache("fox") == 7
        handle.answers = ["v2", "v2"]
        assert await client.swap_weights("fox", "/n") == "v2"
        handle.answers = ["v2", "v3"]
        with pytest.raises(EngineError, match="different weights"):
            await client.swap_weights("fox", "/n")
        handle.answers = [False, True]
        assert await client.abort("q1")
        handle.answers = []
        assert not await client.abort("q1")
        with pytest.raises(EngineUnavailableError):
            await client.swap_weights("fox", "/n")
        await client.stop()
        with pytest.raises(EngineUnavailableError):
            await client.generate(REQUEST)

    asyncio.run(run())
