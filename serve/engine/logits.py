"""Changes to the logits before a token is drawn, each a pure function. The log-probabilities that clients see are
taken before any of them; temperature, top_k and top_p come after, in :mod:`serve.engine.sampler`.

Shape suffixes: V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from serve.client import SamplingOptions


def adjusted(
    logits_V: Tensor,
    options: SamplingOptions,
    prompt_ids: Sequence[int],
    output_ids: Sequence[int],
    end_ids: Collection[int],
) -> Tensor:
    """(V,) logits after penalties, bias, the ban on ``end_ids`` before ``min_tokens``, and the min_p cut."""
    logits_V = biased(penalised(logits_V, prompt_ids, output_ids, options), options.logit_bias)
    if len(output_ids) < options.min_tokens:
        logits_V = without(logits_V, end_ids)
    return min_p_cut(logits_V, options.min_p, options.temperature)


def penalised(
    logits_V: Tensor, prompt_ids: Sequence[int], output_ids: Sequence[int], options: SamplingOptions
) -> Tensor:
    """Repetition penalty over prompt and generated tokens, then OpenAI's penalties over the generated ones.

    Repetition (CTRL, arXiv 1909.05858, section 4.1): a positive logit is divided, a negative one multiplied.
    Presence and frequency (OpenAI API reference): ``logit -= presence * (count > 0) + frequency * count``.
    """
    if options.repetition_penalty != 1.0 and (prompt_ids or output_ids):
        seen = torch.tensor(sorted({*prompt_ids, *output_ids}), device=logits_V.device)
        scores = logits_V[seen]
        factor = options.repetition_penalty
        logits_V = logits_V.index_copy(0, seen, torch.where(scores > 0, scores / factor, scores * factor))
    if output_ids and (options.presence_penalty or options.frequency_penalty):
        output = torch.tensor(output_ids, device=logits_V.device)
        count_V = torch.bincount(output, minlength=logits_V.numel()).to(logits_V.dtype)
        logits_V = logits_V - options.frequency_penalty * count_V - options.presence_penalty * (count_V > 0)
    return logits_V


def biased(logits_V: Tensor, bias: Sequence[tuple[int, float]]) -> Tensor:
    """Adds each bias to its token's logit."""
    if not bias:
        return logits_V
    tokens = torch.tensor([token for token, _ in bias], device=logits_V.device)
    values = torch.tensor([value for _, value in bias], dtype=logits_V.dtype, device=logits_V.device)
    return logits_V.index_add(0, tokens, values)


def without(logits_V: Tensor, banned: Collection[int]) -> Tensor:
    """Makes tokens impossible."""
    if not banned:
        return logits_V
    return logits_V.index_fill(0, torch.tensor(sorted(banned), device=logits_V.device), -math.inf)


def min_p_cut(logits_V: Tensor, min_p: float, temperature: float) -> Tensor:
    """Drops tokens whose probability at this temperature is below ``min_p`` times the likeliest one's
    (arXiv 2407.01082). The likeliest always stays; greedy decoding needs no cut."""
    if min_p <= 0 or temperature <= 0:
        return logits_V
    floor = logits_V.max() + temperature * math.log(min_p)
    return logits_V.masked_fill(logits_V < floor, -math.inf)
