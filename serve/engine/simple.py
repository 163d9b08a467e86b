"""The first engine: one thread, one request at a time, behind the same protocol as the batching one.

The event loop admits, the thread computes, and a :class:`~serve.engine.stream.ChunkStream` carries chunks back. One
condition guards what both sides touch; nothing is called out of this class while it is held.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

from moe.errors import UserError
from moe.tokenizer import Tokenizer
from serve.client import (
    ContextLengthError,
    EngineDeadError,
    EngineHealth,
    EngineRequest,
    EngineStats,
    EngineUnavailableError,
    HealthStatus,
    InvalidRequestError,
    ModelInfo,
    Prompt,
    QueueFullError,
    RequestAbortedError,
    TokenStream,
    UnknownModelError,
    Usage,
)
from serve.engine.admission import QueueLimits, RequestLine
from serve.engine.runner import ModelRunner
from serve.engine.sequence import SequenceSpec, sequence_chunks
from serve.engine.stream import ChunkStream

LOG = logging.getLogger("moeyard.serve.engine")
# How often an idle engine shows that it is alive.
IDLE_BEAT_S = 0.25
# Tokenising this many characters takes about a millisecond; more of them would hold up every stream.
INLINE_CHARS = 16_384
MAX_SEQUENCES = 1024
JOIN_S = 10.0


class _AbortedError(Exception):
    """The running request was aborted."""


@dataclass
class _Job:
    """A request on its way through the engine; the thread owns it once it runs."""

    request: EngineRequest
    prompts: tuple[tuple[int, ...], ...]
    stream: ChunkStream
    seed: int
    admitted_s: float
    aborted: threading.Event = field(default_factory=threading.Event)
    abort_reason: str = "The request was aborted."
    completion_tokens: int = 0

    @property
    def prompt_tokens(self) -> int:
        return sum(map(len, self.prompts))


class SimpleEngine:
    """An :class:`serve.client.EngineClient` over one model in this process.

    Args:
        runner: the model.
        tokenizer: its tokenizer.
        info: what clients are told about it.
        limits: bounds of the queue.
        threads: compute threads of the engine's thread; None keeps torch's choice.
    """

    def __init__(
        self,
        runner: ModelRunner,
        tokenizer: Tokenizer,
        info: ModelInfo,
        *,
        limits: QueueLimits | None = None,
        threads: int | None = None,
    ) -> None:
        self._runner, self._tokenizer, self.info = runner, tokenizer, info
        self._threads = threads
        self._changed = threading.Condition()
        self._line: RequestLine[_Job] = RequestLine(limits or QueueLimits())
        self._running: _Job | None = None
        self._status: HealthStatus = "starting"
        self._detail = ""
        self._failure: BaseException | None = None
        self._thread: threading.Thread | None = None
        self._warm = threading.Event()
        self._beat_s = self._started_s = time.monotonic()
        self._mean_service_s = 1.0
        self._generated = self._prompted = 0
        self._finished: Counter[str] = Counter()
        self._rejected: Counter[str] = Counter()

    # The protocol; every method runs in an event loop.

    async def start(self) -> None:
        """See :meth:`serve.client.EngineClient.start`.

        Raises:
            EngineDeadError: the model does not run; its cause is why.
        """
        with self._changed:
            if self._thread is not None:
                return
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
        while self._status == "draining" and not self._line.idle and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        with self._changed:
            left = self._line.drain()
            for job in [*left, *([self._running] if self._running is not None else [])]:
                job.abort_reason = "The server stopped before the answer was complete."
                job.aborted.set()
            if self._status == "draining":
                self._status = "stopped"
            self._changed.notify_all()
        for job in left:
            self._end_aborted(job)
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join, JOIN_S)
            if self._thread.is_alive():
                LOG.warning("the engine's thread is still computing %.0f s after it was told to stop", JOIN_S)

    async def models(self) -> tuple[ModelInfo, ...]:
        return (self.info,)

    async def generate(self, request: EngineRequest) -> TokenStream:
        """See :meth:`serve.client.EngineClient.generate`."""
        if request.model != self.info.model_id:
            raise UnknownModelError(request.model)
        with self._changed:  # turn overload away before it costs a tokenisation
            self._admit_or_raise(0)
        if sum(len(prompt) for prompt in request.prompts if isinstance(prompt, str)) <= INLINE_CHARS:
            prompts = self._encode(request.prompts)
        else:
            prompts = await asyncio.to_thread(self._encode, request.prompts)
        self._check(request, prompts)
        seed = request.sampling.seed
        job = _Job(
            request,
            prompts,
            ChunkStream(lambda: self._abandon(request.request_id)),
            secrets.randbits(63) if seed is None else seed,
            time.monotonic(),
        )
        with self._changed:
            self._admit_or_raise(job.prompt_tokens)
            self._line.add(request.request_id, job, job.prompt_tokens)
            self._changed.notify_all()
        return job.stream

    async def abort(self, request_id: str) -> bool:
        """See :meth:`serve.client.EngineClient.abort`."""
        return self._abandon(request_id)

    async def health(self) -> EngineHealth:
        return EngineHealth(self._status, max(0.0, time.monotonic() - self._beat_s), self._detail)

    async def stats(self) -> EngineStats:
        with self._changed:
            return EngineStats(
                num_running=self._line.num_running,
                num_waiting=self._line.num_waiting,
                waiting_prompt_tokens=self._line.waiting_prompt_tokens,
                prompt_tokens=self._prompted,
                generation_tokens=self._generated,
                finished=dict(self._finished),
                rejected=dict(self._rejected),
                expert_load=self._runner.expert_load(),
                uptime_s=time.monotonic() - self._started_s,
            )

    # Admission.

    def _admit_or_raise(self, prompt_tokens: int) -> None:
        """With the condition held: may a request with so many prompt tokens enter the line now."""
        if self._status == "dead":
            raise EngineDeadError(self._detail)
        if self._status != "ready":
            raise EngineUnavailableError(f"The engine is {self._status} and takes no requests.")
        reason = self._line.refusal(prompt_tokens)
        if reason is not None:
            self._rejected[reason] += 1
            limits = self._line.limits
            limit = limits.max_requests if reason == "requests" else limits.max_prompt_tokens
            raise QueueFullError(reason, limit, min(60.0, self._mean_service_s))

    def _encode(self, prompts: Sequence[Prompt]) -> tuple[tuple[int, ...], ...]:
        """Token ids of each prompt. An empty one stands for the start of a document."""
        encoded = (self._tokenizer.encode(p) if isinstance(p, str) else p for p in prompts)
        return tuple(tuple(ids) or (self._tokenizer.eos_id,) for ids in encoded)

    def _check(self, request: EngineRequest, prompts: tuple[tuple[int, ...], ...]) -> None:
        limit, sampling = self.info.context_length, request.sampling
        if len(prompts) * sampling.n > MAX_SEQUENCES:
            raise InvalidRequestError(f"prompts times `n` must be at most {MAX_SEQUENCES}", "n")
        for ids in prompts:
            if len(ids) + (sampling.max_tokens or 0) > limit:
                raise ContextLengthError(limit, len(ids), sampling.max_tokens if len(ids) <= limit else None)
            if sampling.max_tokens is None and len(ids) >= limit:
                raise ContextLengthError(limit, len(ids), None)
            unknown = next((token for token in ids if token >= self.info.vocab_size), None)
            if unknown is not None:
                raise InvalidRequestError(
                    f"token id {unknown} is not in the vocabulary of {self.info.vocab_size}", "prompt"
                )
        for token, _ in sampling.logit_bias:
            if token >= self.info.vocab_size:
                raise InvalidRequestError(
                    f"token id {token} is not in the vocabulary of {self.info.vocab_size}", "logit_bias"
                )
        if sampling.max_tokens is not None and sampling.min_tokens > sampling.max_tokens:
            raise InvalidRequestError(
                f"min_tokens {sampling.min_tokens} is more than max_tokens {sampling.max_tokens}", "min_tokens"
            )

    def _abandon(self, request_id: str) -> bool:
        """The one way out before the end, for a client that left and for an explicit abort alike."""
        with self._changed:
            job = self._line.remove(request_id)
            running = self._running
            if job is None:
                if running is None or running.request.request_id != request_id:
                    return False
                running.aborted.set()
                return True
        self._end_aborted(job)
        return True

    def _end_aborted(self, job: _Job) -> None:
        with self._changed:
            self._finished["abort"] += 1
        job.stream.end(RequestAbortedError(job.abort_reason))

    # The engine's thread.

    def _run(self) -> None:
        try:
            self._runner.use_threads(self._threads)
            self._runner.warm_up(self._tokenizer.eos_id)
            with self._changed:
                if self._status == "starting":
                    self._status = "ready"
            self._warm.set()
            while (job := self._next_job()) is not None:
                self._serve(job)
        except BaseException as error:  # whatever it is, nobody may wait for this thread any more
            LOG.critical("the engine died: %s", error, exc_info=not isinstance(error, UserError))
            self._die(error)
            self._warm.set()

    def _next_job(self) -> _Job | None:
        """Waits for work; None when the engine was stopped."""
        with self._changed:
            while True:
                self._beat_s = time.monotonic()
                if self._status == "stopped":
                    return None
                self._running = self._line.start_next()
                if self._running is not None:
                    return self._running
                self._changed.wait(IDLE_BEAT_S)

    def _serve(self, job: _Job) -> None:
        started_s = time.monotonic()
        try:
            for index in range(len(job.prompts) * job.request.sampling.n):
                self._sequence(job, index)
        except _AbortedError:
            self._end_aborted(job)
        else:
            job.stream.end()
        # Not in a `finally`: after a failure, _die must still find the job.
        with self._changed:
            self._mean_service_s += 0.2 * (time.monotonic() - started_s - self._mean_service_s)
            self._running = None
            self._line.finish()
            self._changed.notify_all()

    def _die(self, error: BaseException) -> None:
        # The type is enough for clients; the text may hold paths and is in the log.
        detail = f"The engine failed ({type(error).__name__}) and must be restarted."
        with self._changed:
            self._status, self._detail, self._failure = "dead", detail, error
            jobs = self._line.drain()
            if self._running is not None:
                jobs.append(self._running)
            self._running = None
            self._line.finish()
            self._finished["error"] += len(jobs)
            self._changed.notify_all()
        for job in jobs:
            job.stream.end(EngineDeadError(detail))

    def _sequence(self, job: _Job, index: int) -> None:
        """Generates one continuation and puts its chunks on the job's stream.

        Raises:
            _AbortedError: the request was aborted meanwhile.
        """
        sampling = job.request.sampling
        prompt_index, sample = divmod(index, sampling.n)
        ids, given = job.prompts[prompt_index], job.request.prompts[prompt_index]
        spec = SequenceSpec(
            index=index,
            prompt_ids=ids,
            sampling=sampling,
            seed=job.seed + sample,
            budget=self.info.context_length - len(ids) if sampling.max_tokens is None else sampling.max_tokens,
            prompt_text=given if isinstance(given, str) else None,
            return_prompt=job.request.return_prompt,
            before=Usage(job.prompt_tokens, job.completion_tokens),
            queue_s=time.monotonic() - job.admitted_s,
        )
        with self._changed:
            self._prompted += len(ids)
        for chunk in sequence_chunks(self._runner, self._tokenizer, spec, beat=partial(self._beat, job)):
            with self._changed:
                self._generated += chunk.usage.completion_tokens - job.completion_tokens
                if chunk.finish_reason is not None:
                    self._finished[chunk.finish_reason] += 1
            job.completion_tokens = chunk.usage.completion_tokens
            job.stream.put(chunk)

    def _beat(self, job: _Job) -> None:
        """Once per token: the engine is alive, and may be told to give up this request."""
        self._beat_s = time.monotonic()
        if job.aborted.is_set():
            raise _AbortedError
