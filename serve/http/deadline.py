"""The time that one whole answer may take."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable
from typing import TypeVar

from serve.client import TokenChunk, TokenStream
from serve.protocol.errors import ApiError

T = TypeVar("T")


class Deadline:
    """Runs from when it is made.

    Args:
        seconds: None: no limit.
    """

    def __init__(self, seconds: float | None) -> None:
        self._seconds = seconds
        self._at = None if seconds is None else asyncio.get_running_loop().time() + seconds

    async def bound(self, work: Awaitable[T]) -> T:
        """The result of ``work``, which is cancelled when it takes too long.

        Raises:
            ApiError: 408.
        """
        if self._at is None:
            return await work
        limit = asyncio.timeout_at(self._at)
        try:
            async with limit:
                return await work
        except TimeoutError:
            if not limit.expired():
                raise
            raise self._error() from None

    def chunks(self, tokens: TokenStream) -> AsyncIterator[TokenChunk]:
        """The stream's chunks, as long as there is time."""
        return tokens if self._at is None else _Timed(tokens, self)

    def check(self) -> None:
        """For work that never waits, and so is never interrupted.

        Raises:
            ApiError: 408 when the time is over.
        """
        if self._at is not None and asyncio.get_running_loop().time() >= self._at:
            raise self._error()

    def _error(self) -> ApiError:
        return ApiError(
            408,
            f"The answer was not complete after {self._seconds:g} s, which is this server's limit.",
            type="timeout_error",
            code="timeout",
            # OpenAI's client repeats requests after a 408; this one would only take as long again.
            headers={"x-should-retry": "false"},
        )


class _Timed:
    def __init__(self, tokens: TokenStream, deadline: Deadline) -> None:
        self._tokens, self._deadline = tokens, deadline

    def __aiter__(self) -> _Timed:
        return self

    async def __anext__(self) -> TokenChunk:
        self._deadline.check()
        return await self._deadline.bound(self._tokens.__anext__())
