"""What is asked of an engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

Prompt: TypeAlias = str | tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Structure:
    """What a generated text must match.

    Attributes:
        kind: what ``source`` is.
        source: a JSON schema as JSON text, a regular expression, a JSON list of strings to choose from, or a Lark
            grammar; empty for ``json_object``, which is any JSON object.
    """

    kind: Literal["json_object", "json_schema", "regex", "choice", "grammar"]
    source: str = ""


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
        structure: what the text must match; None: anything.
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
    structure: Structure | None = None


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """One request.

    Attributes:
        request_id: unique among all requests of the engine's life; clients do not choose it.
        return_prompt: give the prompt back with the first chunk of each sequence.
        return_routing: say for each generated token which experts computed it.
        priority: lower ones are served first, and pre-empted last; equal ones in order of arrival.
    """

    request_id: str
    model: str
    prompts: tuple[Prompt, ...]
    sampling: SamplingOptions = SamplingOptions()
    return_prompt: bool = False
    return_routing: bool = False
    priority: int = 0


@dataclass(frozen=True, slots=True)
class EmbeddingRequest:
    """Texts, or token ids, to turn into one vector each; admitted, counted and aborted like an EngineRequest."""

    request_id: str
    model: str
    inputs: tuple[Prompt, ...]
    priority: int = 0
