"""What stands between the HTTP layer and an inference engine: values and one protocol.

The HTTP layer knows only this module, so an engine in this process, a batching engine or a handle to another process
can stand behind the same routes. Nothing here imports torch, FastAPI or Ray, and every value pickles.

A *request* has one or more prompts; each prompt is continued ``n`` times. One continuation is a *sequence*, and
sequence ``index`` is ``prompt_index * n + sample_index``, which is the order of an OpenAI response's ``choices``.
A request is admitted, counted and aborted as a whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol, TypeAlias, runtime_checkable

Prompt: TypeAlias = str | tuple[int, ...]
FinishReason: TypeAlias = Literal["stop", "length"]
HealthStatus: TypeAlias = Literal["starting", "ready", "draining", "stopped", "dead"]


@dataclass(frozen=True, slots=True)
class SamplingOptions:
    """How the next token is chosen and when a sequence ends.

    Attributes:
        max_tokens: most tokens to generate; None: until the model's context is full. 0 only scores the prompt.
        min_tokens: end-of-text tokens and stop strings do not count before this many tokens.
        temperature: 0 is greedy.
        top_p, top_k, min_p: nucleus, rank and relative-probability cuts; 1.0, None and 0.0 turn them off.
        presence_penalty, frequency_penalty: subtracted from the logit of generated tokens (OpenAI's definition).
        repetition_penalty: divides positive and multiplies negative logits of seen tokens (CTRL, arXiv 1909.05858).
        logit_bias: (token id, bias) pairs added to the logits before sampling.
        seed: sample ``i`` of the request draws from ``seed + i``; None draws a fresh seed.
        n: continuations of each prompt.
        stop: strings that end a sequence; neither they nor what follows is returned.
        stop_token_ids: tokens that end a sequence besides the model's end-of-text tokens.
        ignore_eos: go on after end-of-text tokens (load generators).
        logprobs: None: none; k: the chosen token's log-probability and those of the k likeliest tokens.
        prompt_logprobs: the same for the prompt's tokens; needs ``EngineRequest.return_prompt``.
        skip_special_tokens: leave special tokens out of the text.
    """

    max_tokens: int | None = None
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = None
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int | None = None
    n: int = 1
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """One request. ``request_id`` is unique among all requests of the engine's life; clients do not choose it."""

    request_id: str
    model: str
    prompts: tuple[Prompt, ...]
    sampling: SamplingOptions = SamplingOptions()
    return_prompt: bool = False


@dataclass(frozen=True, slots=True)
class TokenScore:
    """A token and its natural-log probability under the model, before temperature and cuts.

    ``text`` is the token alone, U+FFFD where its bytes are not a whole character; ``raw`` is exact. ``logprob`` is
    None for the first token of a prompt, which nothing predicts.
    """

    token_id: int
    text: str
    raw: bytes
    logprob: float | None


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """The chosen token, the likeliest alternatives (best first) and where its text starts.

    ``text_offset`` counts characters from the start of the generated text, or of the prompt for prompt tokens.
    """

    chosen: TokenScore
    top: tuple[TokenScore, ...] = ()
    text_offset: int = 0


@dataclass(frozen=True, slots=True)
class PromptEcho:
    """The prompt of one sequence, as text and as tokens; ``logprobs`` only when asked for."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of a whole request so far. ``cached_tokens`` of the prompt's were not computed again."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Timings:
    """Where one sequence spent its time, in seconds."""

    queue_s: float
    prefill_s: float
    decode_s: float


@dataclass(frozen=True, slots=True)
class TokenChunk:
    """New tokens of one sequence; an engine may put any number of them in a chunk.

    Attributes:
        index: which sequence.
        text: text that became certain: whole characters that cannot be part of a stop string.
        token_ids: the tokens of that text.
        logprobs: one entry per token id when asked for.
        finish_reason: set once, in the sequence's last chunk.
        stop_reason: the stop string or token id that ended it; None for end-of-text and length.
        usage: of the whole request, up to and with this chunk.
        prompt: in the first chunk of a sequence when ``return_prompt`` was set.
        timings: in the last chunk of a sequence.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    usage: Usage
    logprobs: tuple[TokenLogprobs, ...] = ()
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    prompt: PromptEcho | None = None
    timings: Timings | None = None


@dataclass(frozen=True, slots=True)
class SamplingDefaults:
    """What a model's ``generation_config.json`` says for requests that leave these out."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = None
    min_p: float = 0.0
    repetition_penalty: float = 1.0


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """A served model.

    Attributes:
        model_id: the name that requests use.
        created: Unix time of the model's files.
        context_length: most tokens of prompt and continuation together.
        vocab_size: valid token ids are below this.
        num_params, active_params: parameters in all, and those that one token uses.
        num_experts: experts of each MoE layer (E); moe_layers: block index of each MoE layer.
        weights_version: changes whenever the weights do.
        chat_template: Jinja source, or None for a model without one.
        special_tokens: names to strings (``bos_token``, ``eos_token``, ...) for the chat template.
    """

    model_id: str
    created: int
    context_length: int
    vocab_size: int
    num_params: int = 0
    active_params: int = 0
    num_experts: int = 0
    moe_layers: tuple[int, ...] = ()
    weights_version: str = "0"
    chat_template: str | None = None
    special_tokens: Mapping[str, str] = field(default_factory=dict)
    defaults: SamplingDefaults = SamplingDefaults()


@dataclass(frozen=True, slots=True)
class EngineHealth:
    """Liveness without asking the engine to do anything.

    ``heartbeat_age_s`` is the time since the engine last passed its loop; a busy engine keeps it small, a wedged one
    lets it grow. ``detail`` says why it is dead.
    """

    status: HealthStatus
    heartbeat_age_s: float = 0.0
    detail: str = ""


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Counters since start and gauges of now.

    ``expert_load`` is (L, E): tokens that each expert of each MoE layer took, prompt and generated ones alike;
    ``rejected`` and ``finished`` count requests by reason.
    """

    num_running: int = 0
    num_waiting: int = 0
    waiting_prompt_tokens: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    finished: Mapping[str, int] = field(default_factory=dict)
    rejected: Mapping[str, int] = field(default_factory=dict)
    expert_load: tuple[tuple[int, ...], ...] = ()
    uptime_s: float = 0.0


class EngineError(Exception):
    """Base of what an engine may raise for a request; the message is safe to show to clients."""


class UnknownModelError(EngineError):
    """The engine does not serve this model."""

    def __init__(self, model: str) -> None:
        self.model = model
        super().__init__(model)

    def __str__(self) -> str:
        return f"The model `{self.model}` does not exist"


class InvalidRequestError(EngineError):
    """A value that the model cannot take; ``param`` names the request's field."""

    def __init__(self, message: str, param: str | None = None) -> None:
        self.message, self.param = message, param
        super().__init__(message, param)

    def __str__(self) -> str:
        return self.message


class ContextLengthError(EngineError):
    """Prompt, or prompt and ``max_tokens`` together, exceed the model's context."""

    def __init__(self, limit: int, prompt_tokens: int, max_tokens: int | None) -> None:
        self.limit, self.prompt_tokens, self.max_tokens = limit, prompt_tokens, max_tokens
        super().__init__(limit, prompt_tokens, max_tokens)

    def __str__(self) -> str:
        head = f"This model's maximum context length is {self.limit} tokens. However, "
        if self.max_tokens is None:
            return head + f"your prompt has {self.prompt_tokens} tokens and leaves no room. Please shorten it."
        return head + (
            f"you requested {self.prompt_tokens + self.max_tokens} tokens ({self.prompt_tokens} in the prompt,"
            f" {self.max_tokens} for the completion). Please shorten the prompt or lower max_tokens."
        )


class QueueFullError(EngineError):
    """The engine takes no more work now. ``reason`` is the limit that was hit."""

    def __init__(self, reason: Literal["requests", "prompt_tokens"], limit: int, retry_after_s: float) -> None:
        self.reason, self.limit, self.retry_after_s = reason, limit, retry_after_s
        super().__init__(reason, limit, retry_after_s)

    def __str__(self) -> str:
        what = {"requests": "requests", "prompt_tokens": "prompt tokens"}[self.reason]
        return f"The server is overloaded: {self.limit} {what} are already waiting. Please retry later."


class EngineUnavailableError(EngineError):
    """The engine has not started, is draining or has stopped; another replica, or a later try, may answer."""


class EngineDeadError(EngineError):
    """The engine failed for good and fails every request."""


class RequestAbortedError(EngineError):
    """The request was aborted by somebody other than the reader of its stream."""


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

    async def health(self) -> EngineHealth:
        """Never waits for the engine."""
        ...

    async def stats(self) -> EngineStats:
        """Never waits for the engine."""
        ...
