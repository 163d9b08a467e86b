"""Token chunks to response bodies: whole, or one stream event after another.

A writer belongs to one request. For a stream, send what :meth:`ResponseWriter.opening`, then
:meth:`ResponseWriter.events` for every chunk, then :meth:`ResponseWriter.closing` return. For a whole body,
:meth:`ResponseWriter.add` every chunk and take :meth:`ResponseWriter.body`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from serve.client import TokenChunk, TokenRouting, Usage
from serve.protocol.responses import ChoiceExtras, RoutingBody, UsageBody

# Enough to compare gates' weights, and a third of the bytes of all digits.
ROUTING_DIGITS = 4


@dataclass(frozen=True, slots=True)
class ResponseHeader:
    """What every event of one response repeats, and which optional parts were asked for.

    Attributes:
        tools: the answer may call functions; parallel_tools: more than one.
    """

    response_id: str
    created: int
    model: str
    fingerprint: str
    choices: int
    logprobs: bool = False
    token_ids: bool = False
    routing: bool = False
    tools: bool = False
    parallel_tools: bool = True
    include_usage: bool = False
    continuous_usage: bool = False

    def extras(self, chunks: Sequence[TokenChunk]) -> ChoiceExtras:
        """Fields that a choice with these chunks has because they were asked for."""
        extras: ChoiceExtras = {}
        if self.token_ids:
            extras["token_ids"] = [token for chunk in chunks for token in chunk.token_ids]
        if self.routing:
            extras["routing"] = [_routing(token) for chunk in chunks for token in chunk.routing]
        return extras

    def wants(self, chunk: TokenChunk) -> bool:
        """The chunk has something to tell besides its text."""
        return bool(chunk.logprobs or (self.token_ids and chunk.token_ids) or (self.routing and chunk.routing))


class ResponseWriter(Protocol):
    """What the HTTP layer needs of either response shape."""

    def opening(self) -> Sequence[object]: ...

    def events(self, chunk: TokenChunk) -> Sequence[object]: ...

    def closing(self) -> Sequence[object]: ...

    def add(self, chunk: TokenChunk) -> None: ...

    def body(self) -> object: ...


def usage_body(usage: Usage) -> UsageBody:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }


def finite(logprob: float) -> float:
    """JSON has no infinity; OpenAI writes -9999.0 for a token that could not be."""
    return max(logprob, -9999.0)


def _routing(token: TokenRouting) -> RoutingBody:
    return {
        "experts": [list(layer) for layer in token.experts],
        "weights": [[round(weight, ROUTING_DIGITS) for weight in layer] for layer in token.weights],
    }
