"""The seam between the HTTP layer and inference engines: one protocol, and all values that cross it.

The HTTP layer knows only this module, so an engine in this process, or a handle to engines in others, can stand behind
the same routes. Nothing here imports torch, FastAPI or Ray, and every value pickles.

A *request* has one or more prompts; each prompt is continued ``n`` times. One continuation is a *sequence*, and
sequence ``index`` is ``prompt_index * n + sample_index``, which is the order of an OpenAI response's ``choices``.
A request is admitted, counted and aborted as a whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol, runtime_checkable

from serve.errors import (
    ContextLengthError,
    EngineDeadError,
    EngineError,
    EngineUnavailableError,
    InvalidRequestError,
    QueueFullError,
    RequestAbortedError,
    UnknownModelError,
)
from serve.requests import (
    EmbeddingRequest,
    EngineRequest,
    Prompt,
    SamplingOptions,
    Structure,
)
from serve.results import (
    Embeddings,
    FinishReason,
    PromptEcho,
    Timings,
    TokenChunk,
    TokenLogprobs,
    TokenRouting,
    TokenScore,
    Usage,
)
from serve.status import (
    CacheStats,
    EngineHealth,
    EngineStats,
    ExpertRecord,
    HealthStatus,
    ModelInfo,
    SamplingDefaults,
)

__all__ = [
    "CacheStats",
    "ContextLengthError",
    "EmbeddingRequest",
    "Embeddings",
    "EngineClient",
    "EngineDeadError",
    "EngineError",
    "EngineHealth",
    "EngineRequest",
    "EngineStats",
    "EngineUnavailableError",
    "ExpertRecord",
    "FinishReason",
    "HealthStatus",
    "InvalidRequestError",
    "ModelInfo",
    "Prompt",
    "PromptEcho",
    "QueueFullError",
    "RequestAbortedError",
    "SamplingDefaults",
    "SamplingOptions",
    "Structure",
    "Timings",
    "TokenChunk",
    "TokenLogprobs",
    "TokenRouting",
    "TokenScore",
    "TokenStream",
    "UnknownModelError",
    "Usage",
]


@runtime_checkable
class TokenStream(Protocol):
    """Chunks of one admitted request, in order within each sequence; sequences may interleave.

    Iteration ends after the last chunk of the last sequence, or raises :class:`EngineError`. ``aclose`` before the
    end aborts the request; after it, it does nothing.
    """

    def __aiter__(self) -> TokenStream: ...

    async def __anext__(self) -> TokenChunk: ...

    async def aclose(self) -> None: ...


@runtime_checkable
class EngineClient(Protocol):
    """What the HTTP layer asks of an engine. Every method may be called from any task of the event loop."""

    async def start(self) -> None:
        """Make the engine ready. Calling it again does nothing."""
        ...

    async def stop(self, *, drain_s: float = 0.0) -> None:
        """Admit nothing more, give running requests ``drain_s`` seconds, abort the rest, free everything."""
        ...

    async def models(self) -> tuple[ModelInfo, ...]:
        """Served models; the first is the default one."""
        ...

    async def generate(self, request: EngineRequest) -> TokenStream:
        """Admit the request or raise at once; tokens come through the stream.

        Raises:
            UnknownModelError, InvalidRequestError, ContextLengthError: the request can never be served.
            QueueFullError, EngineUnavailableError: not now.
            EngineDeadError: the engine has failed.
        """
        ...

    async def abort(self, request_id: str) -> bool:
        """End this request, queued or running, and nobody else's. False when it is unknown or already over."""
        ...

    async def embed(self, request: EmbeddingRequest) -> Embeddings:
        """One vector per input; raises what :meth:`generate` raises, and RequestAbortedError."""
        ...

    async def tokenize(self, model: str, text: str, *, special: bool = True) -> tuple[int, ...]:
        """Token ids of ``text``. ``special``: names of special tokens in it become those tokens.

        Raises:
            UnknownModelError, InvalidRequestError: no such model, or not a text.
        """
        ...

    async def detokenize(self, model: str, token_ids: Sequence[int]) -> str:
        """The text of token ids, special tokens included.

        Raises:
            UnknownModelError, InvalidRequestError: no such model, or no such token.
        """
        ...

    async def swap_weights(self, model: str, path: str, *, running: Literal["drain", "keep"] = "drain") -> str:
        """Serve the weights of another model directory from now on; returns their version.

        Args:
            running: "drain" lets running requests end with the old weights first; "keep" computes them again and
                goes on with the new ones, after the text that they have.

        Raises:
            UnknownModelError: no such model.
            InvalidRequestError: not a model directory, or one of another shape or vocabulary; nothing has changed.
            EngineDeadError, EngineUnavailableError: the engine takes no orders now.
        """
        ...

    async def reset_prefix_cache(self, model: str) -> int:
        """Forget all cached prompts; returns how many blocks that freed."""
        ...

    async def record_experts(self, model: str, *, start: bool) -> ExpertRecord:
        """Start counting expert loads from zero, or stop; returns what the recording that this ends had counted."""
        ...

    async def expert_record(self, model: str) -> ExpertRecord:
        """What has been counted since recording was started. Never waits for the engine."""
        ...

    async def health(self) -> EngineHealth:
        """Never waits for the engine."""
        ...

    async def stats(self, model: str | None = None) -> EngineStats:
        """Of one model, or of all together. Never waits for the engine.

        Raises:
            UnknownModelError: nothing is served under that name.
        """
        ...
