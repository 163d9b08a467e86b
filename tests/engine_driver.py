"""Runs an engine's core in the test's own thread, one pass after another, with its books checked after each."""

from __future__ import annotations

import asyncio
import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from moe.tokenizer import Tokenizer
from moe.transformer import Transformer
from serve.client import EngineError, EngineRequest, SamplingOptions, TokenChunk
from serve.engine.core import EmbeddingJob, EngineCore, GenerationJob
from serve.engine.products import choose_products
from serve.engine.runner import ModelRunner
from serve.engine.scheduler import BatchLimits
from serve.engine.structured import StructureCompiler


@dataclass(eq=False)
class Reader:
    """Keeps what it gets. There is no event loop."""

    items: list[Any] = field(default_factory=list)
    over: bool = False
    loop: asyncio.AbstractEventLoop = None  # type: ignore[assignment]

    def receive(self, item: Any, last: bool) -> None:
        assert not self.over, "something follows the last item"
        self.items.append(item)
        self.over = last

    def abandon(self) -> None: ...

    @property
    def chunks(self) -> list[TokenChunk]:
        for item in self.items:
            if isinstance(item, EngineError):
                raise item
        return self.items

    def text(self, index: int = 0) -> str:
        return "".join(chunk.text for chunk in self.chunks if chunk.index == index)

    def tokens(self, index: int = 0) -> list[int]:
        return [token for chunk in self.chunks if chunk.index == index for token in chunk.token_ids]


class Driver:
    """A core over ``model``; see :class:`EngineCore` for the options.

    Args:
        native: as a served model computes, with native ops or without them; None leaves the model as it is.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        *,
        num_blocks: int = 64,
        block_size: int = 4,
        sequences: int = 8,
        step_tokens: int = 64,
        end_ids: frozenset[int] = frozenset(),
        batch_invariant: bool = False,
        prefix_cache: bool = True,
        native: bool | None = None,
    ) -> None:
        ops = None
        if native is not None:
            model = copy.deepcopy(model)
            products = choose_products(native, model.embed.weight.dtype, "cpu", batch_invariant=batch_invariant)
            products.prepare(model)
            ops = products.ops
        runner = ModelRunner(model, num_blocks, block_size, batch_invariant=batch_invariant, ops=ops)
        self.tokenizer = tokenizer
        self.core = EngineCore(
            runner,
            tokenizer,
            end_ids,
            model.config.max_seq_len,
            limits=BatchLimits(sequences, step_tokens),
            prefix_cache=prefix_cache,
            version="w1",
        )
        self._structures = StructureCompiler(tokenizer, end_ids, model.config.vocab_size or 0)
        self._count = 0

    def ask(self, *prompts: str | tuple[int, ...], **options: Any) -> Reader:
        """Add a request; greedy unless told otherwise."""
        self._count += 1
        extra = {key: options.pop(key) for key in ("return_prompt", "return_routing", "priority") if key in options}
        seed = options.get("seed") or 0
        sampling = SamplingOptions(**{"temperature": 0.0, **options})
        request = EngineRequest(f"r{self._count}", "m", prompts, sampling, **extra)
        ids = tuple(tuple(self.tokenizer.encode(p)) if isinstance(p, str) else p for p in prompts)
        job = GenerationJob(request.request_id, Reader(), ids, request.priority, time.monotonic())
        job.request, job.seed = request, seed
        if sampling.structure is not None:
            job.matchers = tuple(self._structures.matcher(sampling.structure) for _ in range(len(ids) * sampling.n))
        self.core.add(job)
        assert isinstance(job.sink, Reader)
        return job.sink

    def embed(self, *prompts: tuple[int, ...]) -> Reader:
        self._count += 1
        job = EmbeddingJob(f"r{self._count}", Reader(), prompts, 0, time.monotonic())
        self.core.add(job)
        assert isinstance(job.sink, Reader)
        return job.sink

    def step(self) -> None:
        for sink, item, last in self.core.step():
            sink.receive(item, last)
        self.core.check()

    def run(self, until: Callable[[], bool] | None = None) -> None:
        """Pass after pass, until nothing is left or ``until`` holds."""
        for _ in range(5000):
            if self.core.idle or (until is not None and until()):
                return
            self.step()
        raise AssertionError("the engine does not come to an end")

    def abort(self, request_id: str) -> None:
        for sink, item, last in self.core.abort(request_id):
            sink.receive(item, last)
        self.core.check()
