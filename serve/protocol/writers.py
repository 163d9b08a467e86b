"""Token chunks to response bodies: whole, or one stream event after another.

A writer belongs to one request. For a stream, send what :meth:`ResponseWriter.opening`, then
:meth:`ResponseWriter.events` for every chunk, then :meth:`ResponseWriter.closing` return. For a whole body,
:meth:`ResponseWriter.add` every chunk and take :meth:`ResponseWriter.body`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from serve.client import TokenChunk, TokenLogprobs, TokenScore, Usage
from serve.protocol.responses import (
    ChatChunkChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatDelta,
    ChatLogprobs,
    ChatTokenLogprob,
    Completion,
    CompletionLogprobs,
    TopLogprob,
    UsageBody,
)


@dataclass(frozen=True, slots=True)
class ResponseHeader:
    """What every event of one response repeats, and which optional parts were asked for."""

    response_id: str
    created: int
    model: str
    fingerprint: str
    choices: int
    logprobs: bool = False
    include_usage: bool = False
    continuous_usage: bool = False


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


def _top_logprob(score: TokenScore) -> TopLogprob:
    return {"token": score.text, "logprob": _finite(score.logprob or 0.0), "bytes": list(score.raw)}


def _finite(logprob: float) -> float:
    """JSON has no infinity; OpenAI writes -9999.0 for a token that could not be."""
    return max(logprob, -9999.0)


class ChatWriter:
    """``chat.completion`` and ``chat.completion.chunk``.

    The stream's order is what clients count on: the role of every choice, content, for each choice one event with
    its finish reason and an empty delta, then usage (with an empty choices list) when asked for.
    """

    def __init__(self, header: ResponseHeader) -> None:
        self._header = header
        self._usage = Usage(0, 0)
        self._chunks: list[list[TokenChunk]] = [[] for _ in range(header.choices)]

    def _event(self, choices: list[ChatChunkChoice]) -> ChatCompletionChunk:
        chunk: ChatCompletionChunk = {
            "id": self._header.response_id,
            "object": "chat.completion.chunk",
            "created": self._header.created,
            "model": self._header.model,
            "choices": choices,
            "system_fingerprint": self._header.fingerprint,
        }
        if self._header.include_usage:
            chunk["usage"] = usage_body(self._usage) if self._header.continuous_usage or not choices else None
        return chunk

    def _choice(self, index: int, delta: ChatDelta) -> ChatChunkChoice:
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def opening(self) -> list[ChatCompletionChunk]:
        return [
            self._event([self._choice(index, {"role": "assistant", "content": ""})])
            for index in range(len(self._chunks))
        ]

    def events(self, chunk: TokenChunk) -> list[ChatCompletionChunk]:
        self._usage = chunk.usage
        events = []
        if chunk.text or chunk.logprobs:
            choice = self._choice(chunk.index, {"content": chunk.text})
            if self._header.logprobs:
                choice["logprobs"] = _chat_logprobs([chunk])
            events.append(self._event([choice]))
        if chunk.finish_reason is not None:
            last = self._choice(chunk.index, {})
            last["finish_reason"] = chunk.finish_reason
            events.append(self._event([last]))
        return events

    def closing(self) -> list[ChatCompletionChunk]:
        return [self._event([])] if self._header.include_usage else []

    def add(self, chunk: TokenChunk) -> None:
        self._usage = chunk.usage
        self._chunks[chunk.index].append(chunk)

    def body(self) -> ChatCompletion:
        return {
            "id": self._header.response_id,
            "object": "chat.completion",
            "created": self._header.created,
            "model": self._header.model,
            "choices": [
                {
                    "index": index,
                    "message": {
                        "role": "assistant",
                        "content": "".join(chunk.text for chunk in chunks),
                        "refusal": None,
                    },
                    "logprobs": _chat_logprobs(chunks) if self._header.logprobs else None,
                    "finish_reason": chunks[-1].finish_reason or "stop",
                }
                for index, chunks in enumerate(self._chunks)
            ],
            "usage": usage_body(self._usage),
            "system_fingerprint": self._header.fingerprint,
        }


def _chat_logprobs(chunks: Sequence[TokenChunk]) -> ChatLogprobs:
    return {"content": [_chat_token(entry) for chunk in chunks for entry in chunk.logprobs], "refusal": None}


def _chat_token(entry: TokenLogprobs) -> ChatTokenLogprob:
    chosen = _top_logprob(entry.chosen)
    return {
        "token": chosen["token"],
        "logprob": chosen["logprob"],
        "bytes": chosen["bytes"],
        "top_logprobs": [_top_logprob(score) for score in entry.top],
    }


class CompletionWriter:
    """``text_completion``, whole or in pieces: both have the same shape."""

    def __init__(self, header: ResponseHeader) -> None:
        self._header = header
        self._usage = Usage(0, 0)
        self._chunks: list[list[TokenChunk]] = [[] for _ in range(header.choices)]
        # Characters that the echoed prompt puts before the generated text of each choice.
        self._shift = [0] * header.choices

    def _frame(self) -> Completion:
        return {
            "id": self._header.response_id,
            "object": "text_completion",
            "created": self._header.created,
            "model": self._header.model,
            "choices": [],
            "system_fingerprint": self._header.fingerprint,
        }

    def opening(self) -> list[Completion]:
        return []

    def events(self, chunk: TokenChunk) -> list[Completion]:
        self._usage = chunk.usage
        if chunk.prompt is not None:
            self._shift[chunk.index] = len(chunk.prompt.text)
        echo = chunk.prompt.text if chunk.prompt is not None else ""
        scored = chunk.logprobs or (chunk.prompt is not None and chunk.prompt.logprobs)
        if not (chunk.text or echo or scored or chunk.finish_reason):
            return []
        frame = self._frame()
        frame["choices"] = [
            {
                "index": chunk.index,
                "text": echo + chunk.text,
                "logprobs": self._completion_logprobs(chunk.index, [chunk]) if self._header.logprobs else None,
                "finish_reason": chunk.finish_reason,
            }
        ]
        if self._header.include_usage:
            frame["usage"] = usage_body(self._usage) if self._header.continuous_usage else None
        return [frame]

    def closing(self) -> list[Completion]:
        if not self._header.include_usage:
            return []
        frame = self._frame()
        frame["usage"] = usage_body(self._usage)
        return [frame]

    def add(self, chunk: TokenChunk) -> None:
        self._usage = chunk.usage
        if chunk.prompt is not None:
            self._shift[chunk.index] = len(chunk.prompt.text)
        self._chunks[chunk.index].append(chunk)

    def body(self) -> Completion:
        frame = self._frame()
        for index, chunks in enumerate(self._chunks):
            echo = "".join(chunk.prompt.text for chunk in chunks if chunk.prompt is not None)
            frame["choices"].append(
                {
                    "index": index,
                    "text": echo + "".join(chunk.text for chunk in chunks),
                    "logprobs": self._completion_logprobs(index, chunks) if self._header.logprobs else None,
                    "finish_reason": chunks[-1].finish_reason,
                }
            )
        frame["usage"] = usage_body(self._usage)
        return frame

    def _completion_logprobs(self, index: int, chunks: Sequence[TokenChunk]) -> CompletionLogprobs:
        shift = self._shift[index]
        entries = [(0, entry) for chunk in chunks if chunk.prompt is not None for entry in chunk.prompt.logprobs]
        entries += [(shift, entry) for chunk in chunks for entry in chunk.logprobs]
        return {
            "tokens": [_legacy_token(entry.chosen) for _, entry in entries],
            "token_logprobs": [
                None if entry.chosen.logprob is None else _finite(entry.chosen.logprob) for _, entry in entries
            ],
            "top_logprobs": [_legacy_top(entry) for _, entry in entries],
            "text_offset": [offset + entry.text_offset for offset, entry in entries],
        }


def _legacy_token(score: TokenScore) -> str:
    """Completions have no ``bytes`` field, so OpenAI spells a token that is not whole characters ``bytes:\\xe2``."""
    if score.text.encode("utf-8", "replace") == score.raw:
        return score.text
    return "bytes:" + "".join(f"\\x{byte:02x}" for byte in score.raw)


def _legacy_top(entry: TokenLogprobs) -> dict[str, float] | None:
    """The likeliest tokens and the chosen one; null where nothing was predicted."""
    if entry.chosen.logprob is None:
        return None
    scores = [*entry.top, entry.chosen]
    return {_legacy_token(score): _finite(score.logprob or 0.0) for score in scores}
