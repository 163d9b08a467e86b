"""Answers of ``/v1/chat/completions``."""

from __future__ import annotations

from collections.abc import Sequence

from serve.client import FinishReason, TokenChunk, TokenLogprobs, TokenScore, Usage
from serve.protocol.responses import (
    AssistantMessage,
    ChatChoice,
    ChatChunkChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatDelta,
    ChatFinishReason,
    ChatLogprobs,
    ChatTokenLogprob,
    ToolCallBody,
    TopLogprob,
)
from serve.protocol.tool_calls import Piece, ToolCall, ToolCallParser
from serve.protocol.writers import ResponseHeader, finite, usage_body


class ChatWriter:
    """``chat.completion`` and ``chat.completion.chunk``.

    The stream's order is what clients count on: the role of every choice, content, for each choice one event with
    its finish reason and an empty delta, then usage (with an empty choices list) when asked for.
    """

    def __init__(self, header: ResponseHeader) -> None:
        self._header = header
        self._usage = Usage(0, 0)
        self._chunks: list[list[TokenChunk]] = [[] for _ in range(header.choices)]
        self._parsers = [self._parser() for _ in range(header.choices)] if header.tools else []
        self._num_calls = [0] * header.choices

    def _parser(self) -> ToolCallParser:
        return ToolCallParser(None if self._header.parallel_tools else 1)

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
        deltas = self._deltas(chunk)
        if not deltas and self._header.wants(chunk):
            deltas = [{"content": ""}]
        events = []
        for position, delta in enumerate(deltas):
            # A chunk's tokens are told once, with the first part of its text.
            told = [chunk] if position == 0 else []
            choice: ChatChunkChoice = {**self._choice(chunk.index, delta), **self._header.extras(told)}
            if self._header.logprobs:
                choice["logprobs"] = _chat_logprobs(told)
            events.append(self._event([choice]))
        if chunk.finish_reason is not None:
            last = self._choice(chunk.index, {})
            last["finish_reason"] = _finish_reason(chunk.finish_reason, self._num_calls[chunk.index])
            events.append(self._event([last]))
        return events

    def _deltas(self, chunk: TokenChunk) -> list[ChatDelta]:
        """The chunk's text, with calls taken out of it where there may be some."""
        if not self._parsers:
            return [{"content": chunk.text}] if chunk.text else []
        parser = self._parsers[chunk.index]
        pieces = parser.push(chunk.text)
        if chunk.finish_reason is not None:
            pieces += parser.finish()
        return [self._delta(chunk.index, piece) for piece in pieces]

    def _delta(self, index: int, piece: Piece) -> ChatDelta:
        if isinstance(piece, str):
            return {"content": piece}
        number = self._num_calls[index]
        self._num_calls[index] += 1
        return {"tool_calls": [{"index": number, **self._call(index, number, piece)}]}

    def _call(self, index: int, number: int, call: ToolCall) -> ToolCallBody:
        # Unique, because the response's id is, and the same whether streamed or whole.
        call_id = f"call_{self._header.response_id.rpartition('-')[2]}_{index}_{number}"
        return {"id": call_id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}

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
            "choices": [self._whole_choice(index, chunks) for index, chunks in enumerate(self._chunks)],
            "usage": usage_body(self._usage),
            "system_fingerprint": self._header.fingerprint,
        }

    def _whole_choice(self, index: int, chunks: Sequence[TokenChunk]) -> ChatChoice:
        text = "".join(chunk.text for chunk in chunks)
        calls: list[ToolCall] = []
        if self._header.tools:
            parser = self._parser()
            pieces = [*parser.push(text), *parser.finish()]
            calls = [piece for piece in pieces if isinstance(piece, ToolCall)]
            text = "".join(piece for piece in pieces if isinstance(piece, str))
        message: AssistantMessage = {"role": "assistant", "content": text, "refusal": None}
        if calls:
            message["content"] = text or None
            message["tool_calls"] = [self._call(index, number, call) for number, call in enumerate(calls)]
        return {
            "index": index,
            "message": message,
            "logprobs": _chat_logprobs(chunks) if self._header.logprobs else None,
            "finish_reason": _finish_reason(chunks[-1].finish_reason or "stop", len(calls)),
            **self._header.extras(chunks),
        }


def _finish_reason(reason: FinishReason, num_calls: int) -> ChatFinishReason:
    """An answer that was cut stays "length", so that clients see that calls may be missing."""
    return "tool_calls" if num_calls and reason == "stop" else reason


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


def _top_logprob(score: TokenScore) -> TopLogprob:
    return {"token": score.text, "logprob": finite(score.logprob or 0.0), "bytes": list(score.raw)}
