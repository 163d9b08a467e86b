"""A second, model-free implementation of :class:`serve.client.EngineClient`, and ways to talk HTTP to it."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, Literal

import httpx
from fastapi import FastAPI

from serve.client import (
    CacheStats,
    ContextLengthError,
    EmbeddingRequest,
    Embeddings,
    EngineClient,
    EngineDeadError,
    EngineHealth,
    EngineRequest,
    EngineStats,
    ExpertRecord,
    InvalidRequestError,
    ModelInfo,
    Prompt,
    PromptEcho,
    QueueFullError,
    RequestAbortedError,
    Timings,
    TokenChunk,
    TokenLogprobs,
    TokenRouting,
    TokenScore,
    TokenStream,
    UnknownModelError,
    Usage,
)
from serve.http.app import build_app
from serve.http.settings import ServerSettings

Json = dict[str, Any]
VOCAB = 0x110000
# Unit vectors whose parts 32-bit floats cannot hold exactly.
VECTORS = ((0.6, 0.8, 0.0), (0.0, 0.6, -0.8))


class ParrotEngine:
    """Says the prompt again, one character per token (its code point), ``n`` times.

    Prompts that begin with a keyword do something else: "wait" never ends, "fail" dies after one token as an engine
    does, "abort" is aborted by somebody, "bug" breaks as a program does.

    Args:
        says: the answer to every prompt, instead of the prompt.
        piece: characters in one chunk.
        chat_template: of the model.
        keywords: look at them; False: every prompt is just text.
    """

    def __init__(
        self,
        context_length: int = 1000,
        *,
        says: str | None = None,
        piece: int = 1,
        chat_template: str | None = None,
        keywords: bool = True,
    ) -> None:
        self.info = ModelInfo(
            "parrot",
            1_700_000_000,
            context_length,
            VOCAB,
            num_experts=2,
            moe_layers=(1, 3),
            embedding_dim=3,
            gate="topk",
            weights_version="abc123def456789",
            chat_template=chat_template,
        )
        self.says, self.piece, self._keywords = says, piece, keywords
        self.state = EngineHealth("ready")
        self.load_LE: tuple[tuple[int, ...], ...] = ((3, 1), (0, 0))
        self.recorded = ExpertRecord()
        self.full = False
        self.seen: list[EngineRequest] = []
        self.embedded: list[EmbeddingRequest] = []
        self.swaps: list[tuple[str, str, str]] = []
        self.closed: list[str] = []
        self.reading = asyncio.Event()

    async def start(self) -> None: ...

    async def stop(self, *, drain_s: float = 0.0) -> None:
        self.state = EngineHealth("stopped")

    async def models(self) -> tuple[ModelInfo, ...]:
        return (self.info,)

    async def abort(self, request_id: str) -> bool:
        return False

    async def health(self) -> EngineHealth:
        return self.state

    async def stats(self, model: str | None = None) -> EngineStats:
        return EngineStats(
            num_running=1,
            num_waiting=2,
            waiting_prompt_tokens=30,
            prompt_tokens=40,
            generation_tokens=50,
            finished={"stop": 5},
            rejected={"requests": 6},
            preemptions=7,
            steps=8,
            step_tokens=90,
            read_bytes=1000,
            read_gb_per_s=1.5,
            cache=CacheStats(block_size=16, total=40, free=20, cached=10, used=10, queries=100, hits=60),
            expert_load=self.load_LE,
            uptime_s=7.0,
        )

    async def embed(self, request: EmbeddingRequest) -> Embeddings:
        total = self._admit(request.model, request.inputs, 0)
        self.embedded.append(request)
        if self.is_told(request.inputs[0], "abort"):
            raise RequestAbortedError("The request was aborted.")
        if self.is_told(request.inputs[0], "wait"):
            self.reading.set()
            try:
                await asyncio.Event().wait()
            finally:
                self.closed.append(request.request_id)
        return Embeddings(tuple(VECTORS[index % 2] for index in range(len(request.inputs))), total)

    async def tokenize(self, model: str, text: str, *, special: bool = True) -> tuple[int, ...]:
        self._know(model)
        return tuple(map(ord, text))

    async def detokenize(self, model: str, token_ids: Sequence[int]) -> str:
        self._know(model)
        self._check_ids(token_ids, "tokens")
        return "".join(map(chr, token_ids))

    async def swap_weights(self, model: str, path: str, *, running: Literal["drain", "keep"] = "drain") -> str:
        self._know(model)
        if not path.startswith("/models/"):
            raise InvalidRequestError(f"{path}: not a model directory", "path")
        self.swaps.append((model, path, running))
        self.info = dataclasses.replace(self.info, weights_version=path.removeprefix("/models/"))
        return self.info.weights_version

    async def reset_prefix_cache(self, model: str) -> int:
        self._know(model)
        return 3

    async def record_experts(self, model: str, *, start: bool) -> ExpertRecord:
        self._know(model)
        before = self.recorded
        if start:
            self.recorded = ExpertRecord(recording=True, load=((0, 0), (0, 0)), peak_imbalance=(1.0, 1.0))
            return before
        self.recorded = ExpertRecord(seconds=2.5, steps=4, tokens=9, load=((6, 3), (9, 0)), peak_imbalance=(1.5, 2.0))
        return self.recorded

    async def expert_record(self, model: str) -> ExpertRecord:
        self._know(model)
        return self.recorded

    async def generate(self, request: EngineRequest) -> TokenStream:
        self._admit(request.model, request.prompts, request.sampling.max_tokens)
        structure = request.sampling.structure
        if structure is not None and structure.source == "(":
            raise InvalidRequestError("not a usable regex: unclosed group", "response_format")
        self.seen.append(request)
        return ParrotStream(self, request)

    def is_told(self, prompt: Prompt, keyword: str) -> bool:
        return self._keywords and isinstance(prompt, str) and prompt.startswith(keyword)

    def _know(self, model: str) -> None:
        if model != self.info.model_id:
            raise UnknownModelError(model)

    def _check_ids(self, ids: Sequence[int], field: str) -> None:
        if any(not 0 <= token < VOCAB for token in ids):
            raise InvalidRequestError("no such token", field)

    def _admit(self, model: str, prompts: Sequence[Prompt], max_tokens: int | None) -> int:
        """The prompts' tokens, if all is well."""
        self._know(model)
        if self.full:
            raise QueueFullError("requests", 64, 2.2)
        total = sum(map(len, prompts))
        if total > self.info.context_length:
            raise ContextLengthError(self.info.context_length, total, None)
        if total + (max_tokens or 0) > self.info.context_length:
            raise ContextLengthError(self.info.context_length, total, max_tokens)
        for prompt in prompts:
            if not isinstance(prompt, str):
                self._check_ids(prompt, "prompt")
        return total


class ParrotStream:
    """What a :class:`ParrotEngine` says to one request."""

    def __init__(self, engine: ParrotEngine, request: EngineRequest) -> None:
        self._engine, self._request = engine, request
        self._chunks = self._run()
        self._over = False

    def __aiter__(self) -> ParrotStream:
        return self

    async def __anext__(self) -> TokenChunk:
        return await anext(self._chunks)

    async def aclose(self) -> None:
        if not self._over:
            self._engine.closed.append(self._request.request_id)
        self._over = True

    async def _run(self) -> AsyncIterator[TokenChunk]:
        request, options = self._request, self._request.sampling
        total = sum(map(len, request.prompts))
        done = 0
        for index in range(len(request.prompts) * options.n):
            prompt = request.prompts[index // options.n]
            text = prompt if isinstance(prompt, str) else "".join(map(chr, prompt))
            echo = None
            if request.return_prompt:
                scores = tuple(token(c, None if i == 0 else -1.0, i) for i, c in enumerate(text))
                wanted = options.prompt_logprobs is not None
                echo = PromptEcho(text, tuple(map(ord, text)), scores if wanted else ())
            if self._engine.is_told(text, "wait"):
                yield TokenChunk(index, "w", (ord("w"),), Usage(total, 1))
                self._engine.reading.set()
                await asyncio.Event().wait()
            said = text if self._engine.says is None else self._engine.says
            budget = len(said) if options.max_tokens is None else min(options.max_tokens, len(said))
            for position in range(0, budget, self._engine.piece):
                part = said[position : min(position + self._engine.piece, budget)]
                done += len(part)
                yield TokenChunk(
                    index,
                    part,
                    tuple(map(ord, part)),
                    Usage(total, done),
                    () if options.logprobs is None else tuple(token(c, -0.5, position + i) for i, c in enumerate(part)),
                    prompt=echo,
                    routing=tuple(map(routing, part)) if request.return_routing else (),
                )
                echo = None
                if self._engine.is_told(text, "fail"):
                    raise EngineDeadError("The engine failed (OSError) and must be restarted.")
                if self._engine.is_told(text, "abort"):
                    raise RequestAbortedError("The request was aborted.")
                if self._engine.is_told(text, "bug"):
                    raise RuntimeError("secret /path")
            reason: Literal["stop", "length"] = "length" if budget < len(said) else "stop"
            yield TokenChunk(index, "", (), Usage(total, done), (), reason, None, echo, Timings(0.1, 0.2, 0.3))
        self._over = True


def token(char: str, logprob: float | None, offset: int) -> TokenLogprobs:
    raw = char.encode("utf-8", "replace")
    other = TokenScore(0, "\ufffd", b"\xe2", -float("inf"))
    return TokenLogprobs(TokenScore(ord(char), char, raw, logprob), (other,), offset)


def routing(char: str) -> TokenRouting:
    """Two layers, one of two experts each."""
    return TokenRouting(experts=((ord(char) % 2,), (1,)), weights=((0.123456,), (1.0,)))


def call(
    work: Callable[[httpx.AsyncClient, ParrotEngine], Awaitable[None]],
    settings: ServerSettings | None = None,
    make: Callable[[], ParrotEngine] = ParrotEngine,
) -> None:
    """Runs ``work`` with a client of a fresh application."""

    async def run() -> None:
        engine = make()
        assert isinstance(engine, EngineClient)
        transport = httpx.ASGITransport(build_app(engine, settings), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            await work(client, engine)

    asyncio.run(run())


def frames(text: str) -> list[Json]:
    """The JSON events of a complete stream."""
    lines = text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""], lines[-3:]
    assert all(line.startswith("data: ") for line in lines[:-1])
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]


@contextlib.asynccontextmanager
async def raw_request(
    engine: ParrotEngine,
    body: Json | bytes,
    sent: list[Json],
    leave: asyncio.Event,
    path: str = "/v1/completions",
    app: FastAPI | None = None,
) -> AsyncIterator[asyncio.Future[None]]:
    """One request over bare ASGI, whose client leaves when ``leave`` is set. Bytes are a body that breaks off."""
    whole = not isinstance(body, bytes)
    content = [body if isinstance(body, bytes) else json.dumps(body).encode()]

    async def receive() -> Json:
        if content:
            return {"type": "http.request", "body": content.pop(), "more_body": not whole}
        await leave.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(dict(message))

    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": "POST",
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "query_string": b"",
        "headers": [(b"content-type", b"application/json")],
        "scheme": "http",
        "server": ("server", 80),
        "client": ("client", 1),
    }
    app = app or build_app(engine, ServerSettings(keep_alive_s=0.05))
    task = asyncio.ensure_future(app(scope, receive, send))
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
