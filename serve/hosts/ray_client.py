"""Engines in other processes behind the same :class:`serve.client.EngineClient`. Knows of Ray only what it needs.

Every question about state is answered from reports that are refreshed on demand, with a bound on the wait, so that a
hung or dying replica delays nobody. Requests are not retried once a token may have been read; before that they are.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, Protocol, TypeVar, cast

from serve.client import (
    EmbeddingRequest,
    Embeddings,
    EngineClient,
    EngineError,
    EngineHealth,
    EngineRequest,
    EngineStats,
    EngineUnavailableError,
    ExpertRecord,
    InvalidRequestError,
    ModelInfo,
    TokenChunk,
    TokenStream,
    UnknownModelError,
)
from serve.hosts.ray_batches import BatchedStream
from serve.hosts.ray_engine import ADMITTED
from serve.hosts.ray_merge import ReplicaReport, best_health, merge_records, merge_stats, worst_health

LOG = logging.getLogger("moeyard.serve.ray")
T = TypeVar("T")
# A report younger than this is as good as a new one; a replica that does not answer is waited for no longer than that.
REPORT_AGE_S, REPORT_WAIT_S = 0.25, 1.0
# Orders to all replicas: a swap loads a model and may wait for running requests.
CONTROL_WAIT_S, SWAP_WAIT_S = 10.0, 600.0
# A replica that has not confirmed the end of a cancelled stream by then is told again, another way.
CONFIRM_S = 1.0
# Replicas that may die under a request before it is given up.
MAX_TRIES = 3


class ReplicaLostError(EngineUnavailableError):
    """The replica died while it worked on the request."""


class RemoteItems(Protocol):
    """Items of a generator in another process. Iteration raises only EngineErrors and cancellation."""

    def __aiter__(self) -> AsyncIterator[object]: ...

    async def __anext__(self) -> object: ...

    def cancel(self) -> None: ...


class EngineHandle(Protocol):
    """The replicas of one model's engine deployment. All methods raise only EngineErrors, and TimeoutError."""

    def stream(self, request: EngineRequest) -> RemoteItems:
        """:meth:`serve.hosts.ray_engine.EngineHost.generate` on a replica that Ray chooses."""
        ...

    async def call(self, method: str, *args: Any, timeout_s: float, **kwargs: Any) -> object:
        """A control method on one replica; waits until there is one."""
        ...

    async def broadcast(self, method: str, *args: Any, timeout_s: float, **kwargs: Any) -> list[object]:
        """The same on every running replica; none is started for it. Those that do not answer are left out."""
        ...

    async def reports(self, timeout_s: float) -> list[ReplicaReport]:
        """One from every running replica that answers."""
        ...


class RemoteTokenStream:
    """A :class:`serve.client.TokenStream` over lists of chunks from another process."""

    def __init__(self, fleet: Fleet, request_id: str, items: RemoteItems) -> None:
        self._fleet, self._request_id, self._items = fleet, request_id, items
        self._chunks: deque[TokenChunk] = deque()
        self._over = False

    def __aiter__(self) -> RemoteTokenStream:
        return self

    async def __anext__(self) -> TokenChunk:
        while not self._chunks:
            if self._over:
                raise StopAsyncIteration
            try:
                item = await anext(self._items)
            except (StopAsyncIteration, EngineError):
                self._over = True
                raise
            if isinstance(item, EngineError):
                self._over = True
                raise item
            self._chunks.extend(cast("list[TokenChunk]", item))
        return self._chunks.popleft()

    async def aclose(self) -> None:
        if not self._over:
            self._over = True
            self._chunks.clear()
            self._fleet.cancel(self._request_id, self._items)


class Fleet:
    """The engine replicas of one model.

    Args:
        rests: the deployment may scale to zero, so nobody may ask it anything while it has nothing to do.
    """

    def __init__(self, model_id: str, handle: EngineHandle, *, admission_timeout_s: float, rests: bool = False) -> None:
        self.model_id, self.handle = model_id, handle
        self._admission_timeout_s, self._rests = admission_timeout_s, rests
        self.info: ModelInfo | None = None
        self._reports: tuple[ReplicaReport, ...] = ()
        self._reported_s = self._used_s = time.monotonic()
        self._refreshing: asyncio.Task[None] | None = None
        self._confirming: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Wait until one replica has said which model it holds."""
        report = cast(ReplicaReport, await self.handle.call("report", timeout_s=float("inf")))
        self._take([report])

    async def generate(self, request: EngineRequest) -> TokenStream:
        """See :meth:`serve.client.EngineClient.generate`."""
        self._used_s = time.monotonic()
        for attempt in range(MAX_TRIES):
            items = self.handle.stream(request)
            try:
                async with asyncio.timeout(self._admission_timeout_s):
                    first = await anext(items, None)
            except TimeoutError:
                self.cancel(request.request_id, items)
                wait = f"{self._admission_timeout_s:g} s"
                raise EngineUnavailableError(f"No engine has become free within {wait}. Please retry later.") from None
            except asyncio.CancelledError:
                self.cancel(request.request_id, items)
                raise
            except ReplicaLostError:
                if attempt + 1 == MAX_TRIES:
                    raise
                # Nothing of the answer has been read, so another replica can give it.
                LOG.warning("request %s is sent to another replica: the first one died", request.request_id)
                continue
            if isinstance(first, EngineError):
                raise first
            if first != ADMITTED:
                raise EngineUnavailableError("The engine's answer ended before it began.")
            return RemoteTokenStream(self, request.request_id, items)
        raise AssertionError("unreachable")

    def cancel(self, request_id: str, items: RemoteItems) -> None:
        """End a stream and make sure, in the background, that its replica knows."""
        items.cancel()
        task = asyncio.ensure_future(self._confirm(request_id, items))
        self._confirming.add(task)
        task.add_done_callback(self._confirming.discard)

    async def _confirm(self, request_id: str, items: RemoteItems) -> None:
        try:
            async with asyncio.timeout(CONFIRM_S):
                async for _ in items:
                    pass
            return
        except (EngineError, asyncio.CancelledError):
            return  # a cancelled stream ends with either
        except TimeoutError:
            LOG.warning("request %s: its replica has not confirmed the cancellation", request_id)
        with contextlib.suppress(EngineError, TimeoutError):
            await self.handle.broadcast("abort", request_id, timeout_s=CONTROL_WAIT_S)

    async def call(self, method: str, *args: Any, **kwargs: Any) -> object:
        """A control method on one replica."""
        self._used_s = time.monotonic()
        try:
            result = await self.handle.call(method, *args, timeout_s=self._admission_timeout_s, **kwargs)
        except TimeoutError:
            raise EngineUnavailableError("The engine has not answered in time. Please retry later.") from None
        if isinstance(result, EngineError):
            raise result
        return result

    async def on_all(self, method: str, *args: Any, wait_s: float = CONTROL_WAIT_S, **kwargs: Any) -> list[object]:
        """A control method on all replicas; the first EngineError of any is raised, when all are done."""
        try:
            results = await self.handle.broadcast(method, *args, timeout_s=wait_s, **kwargs)
        except TimeoutError:
            raise EngineUnavailableError(f"The engines have not answered within {wait_s:g} s.") from None
        for result in results:
            if isinstance(result, EngineError):
                raise result
        return results

    # Reports.

    async def refresh(self, *, wait: bool) -> None:
        """See to it that reports are young; waits for them at most REPORT_WAIT_S, and not at all if told so."""
        now = time.monotonic()
        if now - self._reported_s < REPORT_AGE_S or (self._rests and now - self._used_s > 15):
            return
        if self._refreshing is None or self._refreshing.done():
            self._refreshing = asyncio.ensure_future(self._refresh())
        if wait:
            await asyncio.wait([self._refreshing], timeout=REPORT_WAIT_S)

    async def _refresh(self) -> None:
        with contextlib.suppress(EngineError, TimeoutError):
            self._take(await self.handle.reports(REPORT_WAIT_S))

    def _take(self, reports: Sequence[ReplicaReport]) -> None:
        self._reports = tuple(reports)
        self._reported_s = time.monotonic()
        if reports:
            self.info = reports[0].model

    def model(self) -> ModelInfo:
        return self.info or ModelInfo(self.model_id, 0, 0, 0)

    def stats(self) -> EngineStats:
        """Of the replicas that run. Counters fall when one ends, which Prometheus takes for a restart.

        To remember those that have ended would not do: every HTTP replica would remember others.
        """
        return merge_stats([report.stats for report in self._reports])

    def health(self) -> EngineHealth:
        if not self._reports:
            if self._rests:
                return EngineHealth("ready", detail="Scaled to zero.")
            return EngineHealth("starting", detail="No engine is running.")
        best = best_health([report.health for report in self._reports])
        if self._rests:
            return best
        # What was said a while ago has aged since.
        age_s = time.monotonic() - self._reported_s
        return replace(best, heartbeat_age_s=best.heartbeat_age_s + max(0.0, age_s - REPORT_AGE_S))


class RayHandleClient:
    """All models of a server, each computed by the replicas of a deployment.

    Args:
        fleets: by model name; the first is the default model.
    """

    def __init__(self, fleets: Mapping[str, Fleet]) -> None:
        self._fleets = dict(fleets)
        self._stopped = False

    async def start(self) -> None:
        """See :meth:`serve.client.EngineClient.start`: every model has an engine that has answered."""
        await asyncio.gather(*(fleet.start() for fleet in self._fleets.values() if fleet.info is None))

    async def stop(self, *, drain_s: float = 0.0) -> None:
        """Take nothing more. The engines are not this process's to stop, and Ray waits for its requests."""
        self._stopped = True

    def _of(self, model: str) -> Fleet:
        if model not in self._fleets:
            raise UnknownModelError(model)
        if self._stopped:
            raise EngineUnavailableError("The server is stopping.")
        return self._fleets[model]

    async def models(self) -> tuple[ModelInfo, ...]:
        for fleet in self._fleets.values():
            await fleet.refresh(wait=fleet.info is None)
        return tuple(fleet.model() for fleet in self._fleets.values())

    async def generate(self, request: EngineRequest) -> TokenStream:
        return await self._of(request.model).generate(request)

    async def abort(self, request_id: str) -> bool:
        results = await asyncio.gather(
            *(fleet.on_all("abort", request_id) for fleet in self._fleets.values()), return_exceptions=True
        )
        return any(True in result for result in results if isinstance(result, list))

    async def embed(self, request: EmbeddingRequest) -> Embeddings:
        return cast(Embeddings, await self._of(request.model).call("embed", request))

    async def tokenize(self, model: str, text: str, *, special: bool = True) -> tuple[int, ...]:
        return cast("tuple[int, ...]", await self._of(model).call("tokenize", model, text, special=special))

    async def detokenize(self, model: str, token_ids: Sequence[int]) -> str:
        return cast(str, await self._of(model).call("detokenize", model, tuple(token_ids)))

    async def swap_weights(self, model: str, path: str, *, running: Literal["drain", "keep"] = "drain") -> str:
        return await swap_on_all(self._of(model), path, running)

    async def reset_prefix_cache(self, model: str) -> int:
        return sum(cast("list[int]", await self._of(model).on_all("reset_prefix_cache", model)))

    async def record_experts(self, model: str, *, start: bool) -> ExpertRecord:
        results = await self._of(model).on_all("record_experts", model, start=start)
        return merge_records(cast("list[ExpertRecord]", results))

    async def expert_record(self, model: str) -> ExpertRecord:
        results = await self._of(model).on_all("expert_record", model, wait_s=REPORT_WAIT_S)
        return merge_records(cast("list[ExpertRecord]", results))

    async def health(self) -> EngineHealth:
        if self._stopped:
            return EngineHealth("draining")
        await asyncio.gather(*(fleet.refresh(wait=True) for fleet in self._fleets.values()))
        return worst_health([fleet.health() for fleet in self._fleets.values()])

    async def stats(self, model: str | None = None) -> EngineStats:
        fleets = list(self._fleets.values()) if model is None else [self._of(model)]
        await asyncio.gather(*(fleet.refresh(wait=True) for fleet in fleets))
        return merge_stats([fleet.stats() for fleet in fleets])


async def swap_on_all(fleet: Fleet, path: str, running: Literal["drain", "keep"]) -> str:
    """Other weights in every replica that runs; one that starts later has those of the deployment."""
    results = await fleet.on_all("swap_weights", fleet.model_id, path, running=running, wait_s=SWAP_WAIT_S)
    if not results:
        raise EngineUnavailableError("No engine is running.")
    versions = set(results)
    if len(versions) != 1:
        raise InvalidRequestError(f"{path}: the replicas see different weights there: {sorted(map(str, versions))}")
    (version,) = versions
    return str(version)


class ReplicaClient:
    """Layout A: this replica computes what it is asked, and all replicas are told what concerns all.

    Whichever replica Ray sends a request to, counters are those of all, and orders reach all. Tokens after the first
    travel together (:mod:`serve.hosts.ray_batches`), because they go through Ray's proxy.

    Args:
        engine: this replica's.
        fleet: all replicas; None where this one is alone.
        batch_s, batch_tokens: see :class:`serve.hosts.ray_options.RayOptions`.
    """

    def __init__(self, engine: EngineClient, fleet: Fleet | None, *, batch_s: float, batch_tokens: int) -> None:
        self._engine, self._batch_s, self._batch_tokens = engine, batch_s, batch_tokens
        self._all: EngineClient = engine if fleet is None else RayHandleClient({fleet.model_id: fleet})
        self.start, self.stop, self.models, self.health = engine.start, engine.stop, engine.models, engine.health
        self.embed, self.tokenize, self.detokenize = engine.embed, engine.tokenize, engine.detokenize
        self.swap_weights, self.reset_prefix_cache = self._all.swap_weights, self._all.reset_prefix_cache
        self.record_experts, self.expert_record = self._all.record_experts, self._all.expert_record
        self.stats = self._all.stats

    async def generate(self, request: EngineRequest) -> TokenStream:
        return BatchedStream(await self._engine.generate(request), self._batch_s, self._batch_tokens)

    async def abort(self, request_id: str) -> bool:
        return await self._engine.abort(request_id) or await self._all.abort(request_id)
