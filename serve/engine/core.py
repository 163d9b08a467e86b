"""The engine without threads: requests go in, :meth:`EngineCore.step` makes one forward pass, answers come out.

It puts three parts together that do not know each other: the scheduler, which decides who computes how much; the
runner, which computes; and each sequence's chooser and output, which turn scores into tokens and tokens into chunks.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from random import Random
from typing import Any

from torch import Tensor

from moe.tokenizer import Tokenizer
from moe.transformer import Transformer
from serve.client import (
    CacheStats,
    Embeddings,
    EngineError,
    EngineRequest,
    RequestAbortedError,
    Timings,
)
from serve.engine.blocks import BlockPool
from serve.engine.experts import ExpertCounts
from serve.engine.output import Generated, RequestUsage, SequenceOutput, prompt_echo
from serve.engine.runner import ModelRunner, PassResult, routing_of
from serve.engine.sampler import Chooser, Scored, choose_tokens, score_row
from serve.engine.scheduler import BatchLimits, Scheduler, Slice
from serve.engine.sequence import Sequence
from serve.engine.stream import Delivery, Sink
from serve.engine.structured import Matcher


@dataclass(eq=False, slots=True)
class Job:
    """A request on its way through the engine.

    Attributes:
        request_id: the request's.
        sink: where its answers go.
        prompts: token ids.
        admitted_s: when, by the monotonic clock.
        live: its sequences that are not over.
        started_s: when its first sequence started; 0 before.
    """

    request_id: str
    sink: Sink
    prompts: tuple[tuple[int, ...], ...]
    priority: int
    admitted_s: float
    live: dict[Sequence, Any] = field(default_factory=dict)
    started_s: float = 0.0


@dataclass(eq=False, slots=True)
class GenerationJob(Job):
    """Continue prompts. ``matchers``: one per sequence, or none."""

    request: EngineRequest | None = None
    seed: int = 0
    matchers: tuple[Matcher, ...] = ()


@dataclass(eq=False, slots=True)
class EmbeddingJob(Job):
    """Turn prompts into vectors."""

    sums: dict[int, Tensor] = field(default_factory=dict)


@dataclass(eq=False, slots=True)
class _Continuation:
    """What a generating sequence is besides its tokens."""

    chooser: Chooser
    output: SequenceOutput
    budget: int
    given: str | None
    prompt_scores: list[Scored]
    started_s: float = 0.0
    first_token_s: float = 0.0


class EngineCore:
    """One model, its cache, and the sequences in flight. Everything in one thread.

    Args:
        runner: the model and its cache.
        tokenizer: of the model.
        end_ids: tokens that end a text unless a request ignores them.
        context_length: most tokens of one sequence.
        limits: bounds of a pass.
        prefix_cache: reuse what is cached of a prompt.
        version: of the weights.

    Attributes:
        started: ids of requests whose first sequence has started; whoever reads it empties it.
        ended: ids of requests, once for each of their sequences that has ended, but not been aborted; likewise.
    """

    def __init__(
        self,
        runner: ModelRunner,
        tokenizer: Tokenizer,
        end_ids: frozenset[int],
        context_length: int,
        *,
        limits: BatchLimits | None = None,
        prefix_cache: bool = True,
        version: str = "0",
    ) -> None:
        self.runner, self.tokenizer, self.end_ids = runner, tokenizer, end_ids
        self._context_length, self.reuses_prompts = context_length, prefix_cache
        self.pool = BlockPool(runner.num_blocks, runner.block_size)
        self.scheduler = Scheduler(self.pool, limits or BatchLimits(), version.encode())
        config = runner.model.config
        self.experts = ExpertCounts(config.num_moe_layers, config.moe.num_experts)
        self.finished: Counter[str] = Counter()
        self.prompt_tokens = self.generation_tokens = self.steps = self.step_tokens = self.read_bytes = 0
        self.started: list[str] = []
        self.ended: list[str] = []
        self._jobs: dict[str, Job] = {}
        self._job_of: dict[Sequence, Job] = {}
        self._arrivals = 0

    @property
    def idle(self) -> bool:
        return self.scheduler.idle

    # What comes in.

    def add(self, job: Job) -> None:
        """A request that was admitted."""
        self._jobs[job.request_id] = job
        for sequence, state in self._sequences(job):
            job.live[sequence] = state
            self._job_of[sequence] = job
            self.scheduler.add(sequence)

    def _sequences(self, job: Job) -> Iterator[tuple[Sequence, Any]]:
        if isinstance(job, EmbeddingJob):
            for index, ids in enumerate(job.prompts):
                yield self._sequence(job, index, ids, reuse=False), index
            return
        assert isinstance(job, GenerationJob)
        assert job.request is not None
        request, sampling = job.request, job.request.sampling
        usage = RequestUsage(sum(map(len, job.prompts)))
        ends = frozenset(sampling.stop_token_ids) | (frozenset() if sampling.ignore_eos else self.end_ids)
        for prompt_index, ids in enumerate(job.prompts):
            given = request.prompts[prompt_index]
            budget = self._context_length - len(ids) if sampling.max_tokens is None else sampling.max_tokens
            leader = None
            for sample in range(sampling.n):
                index = prompt_index * sampling.n + sample
                sequence = self._sequence(job, index, ids, reuse=sampling.prompt_logprobs is None)
                sequence.leader, leader = leader, leader or sequence
                chooser = Chooser(sampling, Random(job.seed + sample), ids, ends)
                chooser.matcher = job.matchers[index] if job.matchers else None
                output = SequenceOutput(self.tokenizer, sampling, index, budget, ends, usage)
                if request.return_prompt and sampling.prompt_logprobs is None:
                    text = given if isinstance(given, str) else None
                    output.return_prompt(prompt_echo(self.tokenizer, ids, text, ()))
                yield sequence, _Continuation(chooser, output, budget, given if isinstance(given, str) else None, [])

    def _sequence(self, job: Job, index: int, ids: tuple[int, ...], *, reuse: bool) -> Sequence:
        self._arrivals += 1
        return Sequence(
            (job.request_id, index),
            list(ids),
            len(ids),
            (job.priority, self._arrivals),
            reuse=reuse and self.reuses_prompts,
        )

    def abort(self, request_id: str, error: EngineError | None = None) -> list[Delivery]:
        """End a request in whatever state it is; nothing when it is over. ``error``: what its reader is told."""
        job = self._jobs.pop(request_id, None)
        if job is None:
            return []
        self.finished["abort"] += 1
        self._drop(job)
        return [Delivery(job.sink, error or RequestAbortedError("The request was aborted."), last=True)]

    def abort_all(self, error: EngineError) -> list[Delivery]:
        """End every request."""
        return [delivery for request_id in list(self._jobs) for delivery in self.abort(request_id, error)]

    def give_up(self, error: EngineError) -> list[Delivery]:
        """Tell every reader that the engine has failed. Looks at nothing else, which may be in any state."""
        jobs = list(self._jobs.values())
        self._jobs, self._job_of = {}, {}
        self.finished["error"] += len(jobs)
        return [Delivery(job.sink, error, last=True) for job in jobs]

    def _drop(self, job: Job) -> None:
        for sequence in job.live:
            self.scheduler.end(sequence)
            del self._job_of[sequence]
        job.live = {}

    # One forward pass.

    def step(self) -> list[Delivery]:
        """Compute one pass and return what came of it; nothing when there is nothing to compute."""
        slices = self.scheduler.plan()
        if not slices:
            return []
        now_s = time.monotonic()
        for part in slices:
            self._note_start(part.sequence, now_s)
        result = self.runner.run(slices)
        self.scheduler.commit(slices)
        tokens = sum(part.stop - part.start for part in slices)
        self.experts.add(result.load_LE, tokens)
        self.steps += 1
        self.step_tokens += tokens
        self.read_bytes += result.read_bytes
        return list(self._deliveries(slices, result))

    def _note_start(self, sequence: Sequence, now_s: float) -> None:
        job = self._job_of[sequence]
        if not job.started_s:
            job.started_s = now_s
            self.started.append(job.request_id)
        state = job.live[sequence]
        if isinstance(state, _Continuation) and not state.started_s:
            state.started_s = now_s

    def _deliveries(self, slices: list[Slice], result: PassResult) -> Iterator[Delivery]:
        choosing: list[tuple[int, Slice, _Continuation]] = []  # (row of the pass, ...)
        rows: list[int] = []  # of the logits
        row, ended = 0, 0
        for part in slices:
            job, last = self._job_of[part.sequence], row + part.stop - part.start - 1
            state = job.live[part.sequence]
            self.prompt_tokens += max(0, min(part.stop, part.sequence.prompt_len) - part.start)
            if isinstance(state, _Continuation):
                self._score_prompt(job, part, state, result, row)
                if part.ends_known and state.budget:
                    choosing.append((last, part, state))
                    rows.append(ended)
                elif part.ends_known:
                    yield from self._end(part.sequence, state)
            else:
                yield from self._embed(job, part, state, result, row)
            ended += part.ends_known
            row = last + 1
        if choosing:
            logits_BV = result.logits_BV if len(rows) == ended else result.logits_BV[rows]
            chosen = choose_tokens(logits_BV, [state.chooser for _, _, state in choosing])
            now_s = time.monotonic()
            for (last, part, state), scored in zip(choosing, chosen, strict=True):
                if part.sequence.status == "running":  # not ended by a sibling's failure
                    yield from self._advance(part.sequence, state, scored, result, last, now_s)

    def _score_prompt(self, job: Job, part: Slice, state: _Continuation, result: PassResult, row: int) -> None:
        """Log-probabilities of the prompt's tokens that this slice predicts, and the echo once they are complete."""
        sampling = state.chooser.options
        if sampling.prompt_logprobs is None or len(state.prompt_scores) == part.sequence.prompt_len:
            return
        tokens = part.sequence.tokens[: part.sequence.prompt_len]
        if not state.prompt_scores:
            state.prompt_scores.append(Scored(tokens[0], None))
        # A pre-empted sequence computes its beginning again, which is scored already.
        first = max(part.start, len(state.prompt_scores) - 1)
        targets = tokens[first + 1 : part.stop + 1]
        if targets:
            hidden_TD = result.hidden_TD[row + first - part.start :]
            for token, logprob_V in zip(targets, self.runner.logprobs_of(hidden_TD, targets), strict=True):
                state.prompt_scores.append(score_row(logprob_V, token, sampling.prompt_logprobs))
        if len(state.prompt_scores) == len(tokens):
            state.output.return_prompt(prompt_echo(self.tokenizer, tuple(tokens), state.given, state.prompt_scores))

    def _advance(
        self,
        sequence: Sequence,
        state: _Continuation,
        scored: Scored | None,
        result: PassResult,
        row: int,
        now_s: float,
    ) -> Iterator[Delivery]:
        """One token more, or the reason why there is none."""
        job = self._job_of[sequence]
        assert isinstance(job, GenerationJob)
        assert job.request is not None
        if scored is None:
            self.finished["error"] += 1
            self.ended += [job.request_id] * len(job.live)
            del self._jobs[job.request_id]
            self._drop(job)
            error = EngineError("The model's scores are not numbers: its weights are damaged.")
            yield Delivery(job.sink, error, last=True)
            return
        if not state.first_token_s:
            state.first_token_s = now_s
            if sequence.id[1] % job.request.sampling.n == 0:
                state.output.usage.cached_tokens += sequence.reused or 0
        self.generation_tokens += 1
        matcher = state.chooser.matcher
        complete = False
        if matcher is not None and scored.token_id not in state.chooser.ends:
            matcher.push(scored.token_id)
            complete = matcher.complete
        routing = routing_of(result.plans, row) if job.request.return_routing else None
        chunk = state.output.push(Generated(scored, routing), complete=complete)
        if chunk is not None:
            yield Delivery(job.sink, chunk)
        if state.output.finish is not None:
            yield from self._end(sequence, state)
        else:
            state.chooser.output_ids.append(scored.token_id)
            self.scheduler.append(sequence, scored.token_id)

    def _end(self, sequence: Sequence, state: _Continuation) -> Iterator[Delivery]:
        job, now_s = self._job_of[sequence], time.monotonic()
        first_s = state.first_token_s or now_s
        timings = Timings(state.started_s - job.admitted_s, first_s - state.started_s, now_s - first_s)
        chunk = state.output.last_chunk(timings)
        self.finished[chunk.finish_reason or "length"] += 1
        yield Delivery(job.sink, chunk, last=self._over(sequence, job))

    def _embed(self, job: Job, part: Slice, index: int, result: PassResult, row: int) -> Iterator[Delivery]:
        """Mean of the normalised hidden states over the input, as one unit vector."""
        assert isinstance(job, EmbeddingJob)
        if part.start == 0:  # also when it is computed again
            job.sums.pop(index, None)
        sum_D = self.runner.embedding_sum(result.hidden_TD[row : row + part.stop - part.start])
        job.sums[index] = job.sums[index] + sum_D if index in job.sums else sum_D
        if not part.ends_known:
            return
        self.finished["stop"] += 1
        if self._over(part.sequence, job):
            vectors = (job.sums[i] / job.sums[i].norm().clamp_min(1e-12) for i in range(len(job.prompts)))
            answer = Embeddings(tuple(tuple(v.tolist()) for v in vectors), sum(map(len, job.prompts)))
            yield Delivery(job.sink, answer, last=True)

    def _over(self, sequence: Sequence, job: Job) -> bool:
        """The sequence has ended; whether its request has, too."""
        self.scheduler.end(sequence)
        self.ended.append(job.request_id)
        del self._job_of[sequence], job.live[sequence]
        if job.live:
            return False
        del self._jobs[job.request_id]
        return True

    # Orders.

    def use_weights(self, model: Transformer, version: str) -> None:
        """Other weights of the same shape from now on; sequences in flight are computed again with them."""
        self.scheduler.renew(version.encode())
        self.runner.use_model(model)

    def warm_up(self) -> None:
        """Two small passes, so that no request pays for lazy initialisation; nothing of them counts."""
        for tokens in (min(8, self._context_length), 1):
            sequence = Sequence(("warm-up", 0), [self.tokenizer.eos_id] * tokens, tokens, (0, 0), reuse=False)
            self.scheduler.add(sequence)
            self.runner.run(self.scheduler.plan())
            self.scheduler.end(sequence)

    def cache_stats(self) -> CacheStats:
        pool = self.pool
        return CacheStats(
            pool.block_size, pool.total, pool.num_free, pool.num_cached, pool.num_used, pool.queries, pool.hits
        )

    def check(self) -> None:
        """Proves the books: blocks, queues, and that every sequence belongs to a request in flight."""
        self.scheduler.check()
        known = {id(sequence) for sequence in [*self.scheduler.waiting, *self.scheduler.running]}
        assert known == {id(sequence) for sequence in self._job_of}, "a sequence without a request, or the reverse"
        assert set(self._jobs) == {job.request_id for job in self._job_of.values()}, "a request without sequences"
