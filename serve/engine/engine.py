"""The engine behind :class:`serve.client.EngineClient`: a thread that computes, an event loop that admits and answers.

The loop's side checks and admits requests and puts orders into a box; the thread empties the box, makes one forward
pass, hands over what came of it, and begins again. One condition guards what both sides touch: the box, admission,
and the status. All else belongs to the thread alone.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any, Generic, Literal, TypeVar

from moe.errors import UserError
from moe.transformer import Transformer
from serve.client import (
    EmbeddingRequest,
    Embeddings,
    EngineDeadError,
    EngineError,
    EngineHealth,
    EngineRequest,
    EngineStats,
    EngineUnavailableError,
    ExpertRecord,
    HealthStatus,
    InvalidRequestError,
    ModelInfo,
    QueueFullError,
    RequestAbortedError,
    TokenChunk,
    TokenStream,
    UnknownModelError,
)
from serve.engine.admission import Admission, QueueLimits
from serve.engine.checks import RequestChecker
from serve.engine.core import EmbeddingJob, EngineCore, GenerationJob, Job
from serve.engine.expert_gang import GangKeeper
from serve.engine.meter import ServiceTime, Throughput
from serve.engine.stream import AnswerStream, Delivery, deliver
from serve.engine.weights import WeightsLoader

LOG = logging.getLogger("moeyard.serve.engine")
# How often an idle engine shows that it is alive.
IDLE_BEAT_S = 0.25
JOIN_S = 10.0
RunningRequests = Literal["drain", "keep"]
T = TypeVar("T")


class _Order(Generic[T]):
    """Something that the engine's thread shall do between two passes, and what came of it."""

    def __init__(self, action: Callable[[], T]) -> None:
        self._action = action
        self.done: Future[T] = Future()
        self.done.set_running_or_notify_cancel()  # whoever waits may leave; the order stands

    def carry_out(self) -> None:
        try:
            self.done.set_result(self._action())
        except Exception as error:
            self.done.set_exception(error)


@dataclass(frozen=True)
class _Swap:
    """Other weights that wait for their moment."""

    model: Transformer
    version: str
    running: RunningRequests
    done: Future[str]


class AsyncEngine:
    """One model in this process.

    Args:
        core: what computes.
        info: what clients are told about the model.
        checker: turns requests into token ids, or refuses them.
        weights: loads other weights for this engine; None: they cannot be changed.
        limits: bounds of the queue.
        threads: compute threads of the engine's thread; None keeps torch's choice.

    Attributes:
        keeper: looks after the processes that experts are spread over, if they are; set before the start.
    """

    def __init__(
        self,
        core: EngineCore,
        info: ModelInfo,
        checker: RequestChecker,
        *,
        weights: WeightsLoader | None = None,
        limits: QueueLimits | None = None,
        threads: int | None = None,
    ) -> None:
        self.core, self.info = core, info
        self._checker, self._weights, self._threads = checker, weights, threads
        self._changed = threading.Condition()
        self._box: deque[Job | _Order[Any]] = deque()
        self._admission = Admission(limits or QueueLimits(), core.scheduler.limits.max_sequences)
        self._aborting: set[str] = set()
        self._status: HealthStatus = "starting"
        self._detail = ""
        self._failure: BaseException | None = None
        self._thread: threading.Thread | None = None
        self._warm = threading.Event()
        self._beat_s = self._started_s = time.monotonic()
        self._rejected: Counter[str] = Counter()
        self._service, self._throughput = ServiceTime(), Throughput()
        self._swap: _Swap | None = None
        self._swapping = asyncio.Lock()
        self.keeper: GangKeeper | None = None

    def memory_line(self) -> str:
        """What the cache of keys and values holds, for people."""
        runner = self.core.runner
        positions = runner.num_blocks * runner.block_size
        gib = positions * runner.kv.position_bytes / 2**30
        prefix = "kept for prompts that begin alike" if self.core.reuses_prompts else "prefix cache off"
        return f"{positions:,} positions in blocks of {runner.block_size} ({gib:.2f} GiB), {prefix}"

    def products_line(self) -> str:
        """Who multiplies, for people."""
        bank = next((layer.experts for _, layer in self.core.runner.model.moe_layers()), None)
        return "" if bank is None else "experts by {}: {}".format(*bank.op_choice())

    # The protocol; every method runs in an event loop.

    async def start(self) -> None:
        """See :meth:`serve.client.EngineClient.start`.

        Raises:
            EngineDeadError: the model does not run; its cause is why.
        """
        with self._changed:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="moeyard-engine", daemon=True)
                self._beat_s = self._started_s = time.monotonic()
                self._thread.start()
        await asyncio.to_thread(self._warm.wait)
        if self._status == "dead":
            raise EngineDeadError(self._detail) from self._failure

    async def stop(self, *, drain_s: float = 0.0) -> None:
        """See :meth:`serve.client.EngineClient.stop`."""
        with self._changed:
            if self._status in ("starting", "ready"):
                self._status = "draining"
        deadline = time.monotonic() + drain_s
        while self._status == "draining" and self._admission.num_requests and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        with self._changed:
            if self._status == "draining":
                self._status = "stopped"
            self._changed.notify_all()
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join, JOIN_S)
            if self._thread.is_alive():
                LOG.warning("the engine's thread is still computing %.0f s after it was told to stop", JOIN_S)
        if self.keeper is not None:
            await asyncio.to_thread(self.keeper.gang.close)

    async def models(self) -> tuple[ModelInfo, ...]:
        return (self.info,)

    async def generate(self, request: EngineRequest) -> TokenStream:
        """See :meth:`serve.client.EngineClient.generate`."""
        self._know(request.model)
        self._turn_away()
        prompts = await self._checker.encode(request.prompts)
        self._checker.check(request.sampling, prompts)
        matchers = await self._checker.matchers(request.sampling, len(prompts))
        seed = request.sampling.seed
        stream: AnswerStream[TokenChunk] = AnswerStream(lambda: self._abandon(request.request_id))
        job = GenerationJob(request.request_id, stream, prompts, request.priority, time.monotonic())
        job.request, job.matchers = request, matchers
        job.seed = secrets.randbits(63) if seed is None else seed
        self._admit(job, len(prompts) * request.sampling.n)
        return stream

    async def embed(self, request: EmbeddingRequest) -> Embeddings:
        """See :meth:`serve.client.EngineClient.embed`."""
        self._know(request.model)
        self._turn_away()
        prompts = await self._checker.encode(request.inputs)
        self._checker.check_lengths(prompts, 0)
        stream: AnswerStream[Embeddings] = AnswerStream(lambda: self._abandon(request.request_id))
        self._admit(EmbeddingJob(request.request_id, stream, prompts, request.priority, time.monotonic()), len(prompts))
        try:
            return await anext(stream)
        finally:
            await stream.aclose()

    async def tokenize(self, model: str, text: str, *, special: bool = True) -> tuple[int, ...]:
        """See :meth:`serve.client.EngineClient.tokenize`."""
        self._know(model)
        return await self._checker.tokenize(text, special=special)

    async def detokenize(self, model: str, token_ids: Sequence[int]) -> str:
        """See :meth:`serve.client.EngineClient.detokenize`."""
        self._know(model)
        return self._checker.detokenize(token_ids)

    async def swap_weights(self, model: str, path: str, *, running: RunningRequests = "drain") -> str:
        """See :meth:`serve.client.EngineClient.swap_weights`."""
        self._know(model)
        if self._weights is None:
            raise InvalidRequestError("the weights of this engine cannot be changed", "path")
        async with self._swapping:
            loaded, version = await asyncio.to_thread(self._weights.load, path)
            swap = _Swap(loaded, version, running, Future())
            swap.done.set_running_or_notify_cancel()
            await self._order(lambda: self._begin_swap(swap))
            return await asyncio.wrap_future(swap.done)

    async def limit(self, queue: QueueLimits, max_step_tokens: int) -> None:
        """Other bounds from now on. What waits already goes on waiting, also beyond them.

        Raises:
            ValueError: fewer tokens a pass than sequences.
            EngineDeadError, EngineUnavailableError: the engine takes no orders now.
        """
        scheduler = self.core.scheduler

        def use() -> None:
            scheduler.limits = replace(scheduler.limits, max_step_tokens=max_step_tokens)

        await self._order(use)
        with self._changed:
            self._admission.limits = queue

    async def reset_prefix_cache(self, model: str) -> int:
        """See :meth:`serve.client.EngineClient.reset_prefix_cache`."""
        self._know(model)
        return await self._order(self.core.pool.forget)

    async def record_experts(self, model: str, *, start: bool) -> ExpertRecord:
        """See :meth:`serve.client.EngineClient.record_experts`."""
        self._know(model)
        return await self._order(lambda: self.core.experts.record(start=start))

    async def expert_record(self, model: str) -> ExpertRecord:
        """See :meth:`serve.client.EngineClient.expert_record`."""
        self._know(model)
        return self.core.experts.recorded()

    async def rebalance_experts(self) -> Mapping[str, Any] | None:
        """Move experts between the processes of the gang now, by what they had to do; None: there is no gang."""
        keeper, core = self.keeper, self.core
        if keeper is None:
            return None
        return await self._order(lambda: keeper.rebalance(core.experts, core.step_tokens))

    async def abort(self, request_id: str) -> bool:
        """See :meth:`serve.client.EngineClient.abort`."""
        return self._abandon(request_id)

    async def health(self) -> EngineHealth:
        if self._warm.is_set() and self._thread is not None and not self._thread.is_alive() and self._status == "ready":
            return EngineHealth("dead", detail="The engine's thread is gone.")
        return EngineHealth(self._status, max(0.0, time.monotonic() - self._beat_s), self._detail)

    async def stats(self, model: str | None = None) -> EngineStats:
        """See :meth:`serve.client.EngineClient.stats`."""
        if model is not None:
            self._know(model)
        core = self.core
        with self._changed:
            requests, waiting = self._admission.num_requests, self._admission.num_waiting
            waiting_tokens = self._admission.waiting_prompt_tokens
        return EngineStats(
            num_running=requests - waiting,
            num_waiting=waiting,
            waiting_prompt_tokens=waiting_tokens,
            prompt_tokens=core.prompt_tokens,
            generation_tokens=core.generation_tokens,
            finished=dict(core.finished),
            rejected=dict(self._rejected),
            preemptions=core.scheduler.preemptions,
            steps=core.steps,
            step_tokens=core.step_tokens,
            read_bytes=core.read_bytes,
            read_gb_per_s=self._throughput.per_s(time.monotonic()) / 1e9,
            cache=core.cache_stats(),
            expert_load=core.experts.total(),
            uptime_s=time.monotonic() - self._started_s,
        )

    # Admission, in the event loop.

    def _know(self, model: str) -> None:
        if model != self.info.model_id:
            raise UnknownModelError(model)

    def _turn_away(self) -> None:
        """Refuse overload before it costs a tokenisation."""
        with self._changed:
            self._admit_or_raise(0)

    def _admit_or_raise(self, prompt_tokens: int) -> None:
        """With the condition held: may so much more work come in now."""
        self._alive_or_raise()
        reason = self._admission.refusal(prompt_tokens)
        if reason is not None:
            self._rejected[reason] += 1
            limits = self._admission.limits
            limit = limits.max_requests if reason == "requests" else limits.max_prompt_tokens
            raise QueueFullError(reason, limit, self._service.until_one_ends())

    def _alive_or_raise(self) -> None:
        if self._status == "dead":
            raise EngineDeadError(self._detail)
        if self._status != "ready":
            raise EngineUnavailableError(f"The engine is {self._status} and takes no requests.")

    def _admit(self, job: Job, sequences: int) -> None:
        prompt_tokens = sum(map(len, job.prompts))
        with self._changed:
            self._admit_or_raise(prompt_tokens)
            self._admission.add(job.request_id, sequences, prompt_tokens)
            self._box.append(job)
            self._changed.notify_all()

    def _abandon(self, request_id: str) -> bool:
        """The one way out before the end, for a client that left and for an explicit abort alike."""
        with self._changed:
            if request_id not in self._admission or request_id in self._aborting:
                return False
            self._aborting.add(request_id)
            # After the job itself, if that is still in the box.
            self._box.append(_Order(lambda: self._carry_out_abort(request_id)))
            self._changed.notify_all()
        return True

    async def _order(self, action: Callable[[], T]) -> T:
        """Let the thread do something between two passes; its result."""
        order = _Order(action)
        with self._changed:
            self._alive_or_raise()
            self._box.append(order)
            self._changed.notify_all()
        return await asyncio.wrap_future(order.done)

    # The engine's thread.

    def _run(self) -> None:
        try:
            self.core.runner.use_threads(self._threads)
            self.core.warm_up()
            with self._changed:
                if self._status == "starting":
                    self._status = "ready"
            self._warm.set()
            while self._take_orders():
                self._hand_over(self.core.step())
                self._throughput.add(self.core.read_bytes, time.monotonic())
                if self.keeper is not None:
                    self.keeper.after_pass(self.core.experts, self.core.step_tokens)
                if self._swap is not None and (self._swap.running == "keep" or not self.core.scheduler.running):
                    self._carry_out_swap(self._swap)
            self._refuse_all(RequestAbortedError("The server stopped before the answer was complete."))
        except BaseException as error:  # whatever it is, nobody may wait for this thread any more
            LOG.critical("the engine died: %s", error, exc_info=not isinstance(error, UserError))
            # The type is enough for clients; the text may hold paths and is in the log.
            self._detail = f"The engine failed ({type(error).__name__}) and must be restarted."
            self._failure = error
            with self._changed:
                self._status = "dead"
            self._refuse_all(EngineDeadError(self._detail))
            self._warm.set()
            if self.keeper is not None:
                self.keeper.gang.close()

    def _take_orders(self) -> bool:
        """Carries out what is in the box; waits while there is nothing to do at all. False: stop."""
        while True:
            if self.keeper is not None and self.core.idle:
                self.keeper.while_idle()  # before anything is taken out of the box, as it may be the end
            with self._changed:
                self._beat_s = time.monotonic()
                if self._status == "stopped":
                    return False
                if not self._box and self.core.idle and self._swap is None:
                    self._changed.wait(IDLE_BEAT_S)
                entries = list(self._box)
                self._box.clear()
            for entry in entries:
                if isinstance(entry, _Order):
                    entry.carry_out()
                else:
                    self.core.add(entry)
            if not self.core.idle or self._swap is not None:
                return True

    def _hand_over(self, deliveries: list[Delivery]) -> None:
        """Account for what a pass gave before its readers can see it."""
        with self._changed:
            for request_id in self.core.started:
                self._admission.started(request_id)
            for request_id in self.core.ended:
                self._admission.sequence_over(request_id)
                if request_id not in self._admission:
                    self._service.ended(time.monotonic())
        self.core.started.clear()
        self.core.ended.clear()
        deliver(deliveries)

    def _carry_out_abort(self, request_id: str) -> None:
        deliveries = self.core.abort(request_id)
        with self._changed:
            self._aborting.discard(request_id)
            self._admission.remove(request_id)
        deliver(deliveries)

    def _begin_swap(self, swap: _Swap) -> None:
        self._swap = swap
        self.core.scheduler.holding = swap.running == "drain"

    def _carry_out_swap(self, swap: _Swap) -> None:
        assert self._weights is not None
        self.core.use_weights(swap.model, swap.version)
        if self.keeper is not None:
            self.keeper.gang.swap(swap.model)
        self.core.scheduler.holding = False
        self.info = self._weights.renewed(self.info, swap.version)
        self._swap = None
        swap.done.set_result(swap.version)

    def _refuse_all(self, error: EngineError) -> None:
        """The end: every reader and everybody with an order is told; nobody will look into the box again."""
        with self._changed:
            entries = list(self._box)
            self._box.clear()
            self._admission.clear()
        dead = isinstance(error, EngineDeadError)
        deliveries = self.core.give_up(error) if dead else self.core.abort_all(error)
        for entry in entries:
            if isinstance(entry, _Order):
                entry.done.set_exception(error)
            else:
                self.core.finished["error" if dead else "abort"] += 1
                deliveries.append(Delivery(entry.sink, error, last=True))
        if self._swap is not None:
            self._swap.done.set_exception(error)
        deliver(deliveries)
