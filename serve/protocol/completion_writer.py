"""Answers of ``/v1/completions``."""

from __future__ import annotations

from collections.abc import Sequence

from serve.client import TokenChunk, TokenLogprobs, TokenScore, Usage
from serve.protocol.responses import Completion, CompletionLogprobs
from serve.protocol.writers import ResponseHeader, finite, usage_body


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
        told = self._header.wants(chunk) or (chunk.prompt is not None and chunk.prompt.logprobs)
        if not (chunk.text or echo or told or chunk.finish_reason):
            return []
        frame = self._frame()
        frame["choices"] = [
            {
                "index": chunk.index,
                "text": echo + chunk.text,
                "logprobs": self._completion_logprobs(chunk.index, [chunk]) if self._header.logprobs else None,
                "finish_reason": chunk.finish_reason,
                **self._header.extras([chunk]),
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
                    **self._header.extras(chunks),
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
                None if entry.chosen.logprob is None else finite(entry.chosen.logprob) for _, entry in entries
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
    return {_legacy_token(score): finite(score.logprob or 0.0) for score in scores}
