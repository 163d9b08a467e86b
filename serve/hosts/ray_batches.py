"""Tokens that travel together: an item that goes to another process costs about as much as a token of a small model."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import AsyncGenerator
from dataclasses import replace
from itertools import chain

from serve.client import TokenChunk, TokenStream


def joined(chunks: list[TokenChunk]) -> list[TokenChunk]:
    """One chunk for each sequence, in place of all its consecutive ones; the latest, whose usage counts, is last."""
    groups: dict[int, list[TokenChunk]] = {}
    for chunk in chunks:
        groups[chunk.index] = [*groups.pop(chunk.index, []), chunk]
    return [
        replace(
            group[-1],
            text="".join(chunk.text for chunk in group),
            token_ids=tuple(chain.from_iterable(chunk.token_ids for chunk in group)),
            logprobs=tuple(chain.from_iterable(chunk.logprobs for chunk in group)),
            routing=tuple(chain.from_iterable(chunk.routing for chunk in group)),
            prompt=group[0].prompt,
        )
        if len(group) > 1
        else group[0]
        for group in groups.values()
    ]


async def batches(stream: TokenStream, every_s: float, max_tokens: int) -> AsyncGenerator[list[TokenChunk], None]:
    """The stream's chunks in lists: the first at once, then what came within ``every_s`` or ``max_tokens`` tokens.

    Sending an item to another process costs about as much as a token of a small model, whatever is in it, and the
    same again for every event that a proxy passes on; so the chunks of a list are joined. What was read before an
    error is yielded before the error is raised.
    """
    pending: list[TokenChunk] = []
    some, enough = asyncio.Event(), asyncio.Event()
    tokens = 0

    async def pump() -> None:
        nonlocal tokens
        try:
            async for chunk in stream:
                pending.append(chunk)
                tokens += len(chunk.token_ids)
                some.set()
                if tokens >= max_tokens:
                    enough.set()
        finally:
            some.set()
            enough.set()

    reader = asyncio.ensure_future(pump())
    due = 0.0
    try:
        while not reader.done() or pending:
            await some.wait()
            wait_s = due - time.monotonic()
            if wait_s > 0 and not enough.is_set():
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(enough.wait(), wait_s)
            batch, pending = pending, []
            tokens = 0
            if not reader.done():
                some.clear()
                enough.clear()
            if batch:
                due = time.monotonic() + every_s
                yield joined(batch)
        reader.result()
    finally:
        reader.cancel()
        await asyncio.gather(reader, return_exceptions=True)


class BatchedStream:
    """A :class:`serve.client.TokenStream` whose chunks are joined as :func:`batches` says."""

    def __init__(self, stream: TokenStream, every_s: float, max_tokens: int) -> None:
        self._stream = stream
        self._lists = batches(stream, every_s, max_tokens)
        self._chunks: deque[TokenChunk] = deque()

    def __aiter__(self) -> BatchedStream:
        return self

    async def __anext__(self) -> TokenChunk:
        while not self._chunks:
            self._chunks.extend(await anext(self._lists))
        return self._chunks.popleft()

    async def aclose(self) -> None:
        await self._lists.aclose()
        await self._stream.aclose()
