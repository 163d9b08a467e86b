"""A model-free engine that routes plausibly, for tests of what shows routing."""

from __future__ import annotations

import asyncio
import codecs
import random
import re
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from serve.client import (
    CacheStats,
    EmbeddingRequest,
    Embeddings,
    EngineDeadError,
    EngineHealth,
    EngineRequest,
    EngineStats,
    ExpertRecord,
    ModelInfo,
    QueueFullError,
    TokenChunk,
    TokenLogprobs,
    TokenRouting,
    TokenScore,
    Usage,
)

TEXT = (
    "A mixture of experts is a network whose feed-forward layers come in many copies. "
    "For every token a small router picks a few of them, and only those do any work.\n\n"
    "So the model can know a lot while each token stays cheap: routing decides who computes what."
)
HOSTILE = "<img src=x onerror=\"document.title='owned'\"></script><script>document.title='owned'</script> &amp; done"
# Every byte of it is a token of its own.
SPLIT = "Grüße, 😀 日本 €!"
ENDLESS = "and so on " * 20_000
SPECIAL = b"<|end_of_turn|>"


@dataclass
class YardEngine:
    """Answers what the last line of the prompt asks for, token by token.

    Attributes:
        layers, experts, chosen: MoE layers, experts of each, and how many of them take a token.
        pause_s: before each token.
        full: refuse everything.
        seen, closed: requests that came, and ids of those that were ended before their last token.
    """

    layers: int = 4
    experts: int = 8
    chosen: int = 2
    pause_s: float = 0.002
    full: bool = False
    seen: list[EngineRequest] = field(default_factory=list)
    closed: list[str] = field(default_factory=list)
    generated: int = 0

    def __post_init__(self) -> None:
        self.load_LE = [[0] * self.experts for _ in range(self.layers)]
        self.route = cache(self._route)

    async def start(self) -> None: ...

    async def stop(self, *, drain_s: float = 0.0) -> None: ...

    async def models(self) -> tuple[ModelInfo, ...]:
        blocks = tuple(range(1, 2 * self.layers, 2))
        return (ModelInfo("yard", 0, 4096, 50_000, num_experts=self.experts, moe_layers=blocks, gate="topk"),)

    async def generate(self, request: EngineRequest) -> YardStream:
        if self.full:
            raise QueueFullError("requests", 64, 7.0)
        self.seen.append(request)
        return YardStream(self, request)

    async def abort(self, request_id: str) -> bool:
        return False

    async def embed(self, request: EmbeddingRequest) -> Embeddings:
        raise NotImplementedError

    async def tokenize(self, model: str, text: str, *, special: bool = True) -> tuple[int, ...]:
        raise NotImplementedError

    async def detokenize(self, model: str, token_ids: Sequence[int]) -> str:
        raise NotImplementedError

    async def swap_weights(self, model: str, path: str, *, running: str = "drain") -> str:
        raise NotImplementedError

    async def reset_prefix_cache(self, model: str) -> int:
        raise NotImplementedError

    async def record_experts(self, model: str, *, start: bool) -> ExpertRecord:
        raise NotImplementedError

    async def expert_record(self, model: str) -> ExpertRecord:
        raise NotImplementedError

    async def health(self) -> EngineHealth:
        return EngineHealth("ready")

    async def stats(self, model: str | None = None) -> EngineStats:
        return EngineStats(
            num_running=3,
            num_waiting=5,
            generation_tokens=self.generated,
            cache=CacheStats(16, 100, 87, 0, 13),
            expert_load=tuple(map(tuple, self.load_LE)),
        )

    def _route(self, piece: bytes) -> TokenRouting:
        """The same word always goes to the same experts, and deeper layers have clearer favourites."""
        experts, weights = [], []
        for layer in range(self.layers):
            rng = random.Random(f"{layer} {piece.strip().lower()!r}")
            fame = [
                1 + layer / self.layers * ((5 * e + layer) % self.experts) / self.experts for e in range(self.experts)
            ]
            ranked = sorted(range(self.experts), key=lambda e: rng.random() ** (1 / fame[e]), reverse=True)
            first = rng.uniform(0.5, 0.9)
            shares = [first * (1 - first) ** place for place in range(self.chosen)]
            experts.append(tuple(ranked[: self.chosen]))
            weights.append(tuple(share / sum(shares) for share in shares))
        return TokenRouting(tuple(experts), tuple(weights))

    def strongest(self, piece: str, layer: int) -> int:
        routing = self.route(piece.encode())
        return routing.experts[layer][routing.weights[layer].index(max(routing.weights[layer]))]


class YardStream:
    """Like a real engine's: a token leaves with the last of its text, and a chunk may hold several tokens."""

    def __init__(self, engine: YardEngine, request: EngineRequest) -> None:
        self._engine, self._request, self._over = engine, request, False
        self._chunks = self._run()

    def __aiter__(self) -> YardStream:
        return self

    async def __anext__(self) -> TokenChunk:
        return await anext(self._chunks)

    async def aclose(self) -> None:
        if not self._over:
            self._engine.closed.append(self._request.request_id)
        self._over = True

    async def _run(self) -> AsyncIterator[TokenChunk]:
        asked = question(str(self._request.prompts[0]))
        pieces = answer_pieces(asked)
        limit = self._request.sampling.max_tokens or len(pieces)
        decoder = codecs.getincrementaldecoder("utf-8")()
        text, held = "", list[bytes]()
        for number, piece in enumerate(pieces[:limit]):
            await asyncio.sleep(self._engine.pause_s)
            held.append(piece)
            text += "" if piece == SPECIAL else decoder.decode(piece)
            if text and number % 3 != 1:
                yield self._chunk(text, held)
                text, held = "", []
            if asked.startswith("break") and number > 6:
                raise EngineDeadError("The engine failed (OSError) and must be restarted.")
        yield self._chunk(text, held, "length" if limit < len(pieces) else "stop")
        self._over = True

    def _chunk(self, text: str, pieces: list[bytes], finish: Any = None) -> TokenChunk:
        engine = self._engine
        routing = tuple(map(engine.route, pieces))
        engine.generated += len(pieces)
        for token in routing:
            for load_E, experts in zip(engine.load_LE, token.experts, strict=True):
                for expert in experts:
                    load_E[expert] += 1
        scores = tuple(TokenLogprobs(TokenScore(7, p.decode("utf-8", "replace"), p, -0.5)) for p in pieces)
        return TokenChunk(0, text, tuple(map(len, pieces)), Usage(9, 9), scores, finish, routing=routing)


def question(prompt: str) -> str:
    """The last thing that the user said; all of a prompt that is no conversation."""
    return prompt.removesuffix("Assistant:").strip().rpartition("User: ")[2]


def answer_pieces(asked: str) -> list[bytes]:
    """The tokens of the answer to a question."""
    if asked.startswith("split"):
        return [bytes([byte]) for byte in SPLIT.encode()]
    text = {"hostile": HOSTILE, "endless": ENDLESS, "long": ENDLESS[:60_000]}.get(asked.partition(" ")[0], TEXT)
    pieces = [piece.encode() for piece in re.findall(r"\n+| ?\w{1,6}|.", text)]
    return [*pieces[:3], SPECIAL, *pieces[3:]] if asked.startswith("special") else pieces
