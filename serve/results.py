"""What an engine answers: values that leave it while it generates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

FinishReason: TypeAlias = Literal["stop", "length"]


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
class TokenRouting:
    """The experts that computed one generated token: those that the position which predicted it was sent to.

    Attributes:
        experts: for each MoE layer, the experts' indices, in the order of the gate's choice.
        weights: for each MoE layer, the weight of each of them.
    """

    experts: tuple[tuple[int, ...], ...]
    weights: tuple[tuple[float, ...], ...]


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
        routing: one entry per token id when asked for.
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
    routing: tuple[TokenRouting, ...] = ()


@dataclass(frozen=True, slots=True)
class Embeddings:
    """One vector of unit length for each input, and the number of tokens that all of them took."""

    vectors: tuple[tuple[float, ...], ...]
    prompt_tokens: int
