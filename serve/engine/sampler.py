"""From the scores of many sequences to one token each. Every row is drawn as if it were alone.

Cuts are made by value, not by rank: what is exactly as likely as the last token kept is kept too. So the result does
not depend on how equal values happen to be sorted, nor on the other rows. Each sequence draws one number per token
from a generator of its own, and takes the token at that point of its cumulative distribution.

Shape suffixes: B sequences, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random

import torch
from torch import Tensor

from serve.client import SamplingOptions
from serve.engine.logits import adjusted
from serve.engine.structured import Matcher

# Where nearly all of a trained model's probability is; only flatter rows are sorted whole.
_LIKELY = 256


@dataclass(frozen=True, slots=True)
class Scored:
    """A token with natural-log probabilities of the unchanged model.

    Attributes:
        logprob: None when nobody asked, and for the first token of a prompt, which nothing predicts.
        top: the likeliest tokens, best first.
    """

    token_id: int
    logprob: float | None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(slots=True)
class Chooser:
    """How one sequence's tokens are chosen.

    Attributes:
        options: the request's.
        rng: this sequence's own random stream.
        prompt_ids: for the repetition penalty.
        ends: tokens that end it; impossible before ``options.min_tokens``.
        output_ids: generated so far.
        matcher: what the text must match, or None.
    """

    options: SamplingOptions
    rng: Random
    prompt_ids: Sequence[int]
    ends: frozenset[int]
    output_ids: list[int] = field(default_factory=list)
    matcher: Matcher | None = None

    @property
    def adjusts(self) -> bool:
        """Whether its logits are changed before a token is drawn."""
        options = self.options
        return bool(
            options.logit_bias
            or options.presence_penalty
            or options.frequency_penalty
            or options.repetition_penalty != 1.0
            or len(self.output_ids) < options.min_tokens
            or (options.min_p and options.temperature)
            or self.matcher is not None
        )


def choose_tokens(logits_BV: Tensor, choosers: Sequence[Chooser]) -> list[Scored | None]:
    """One token for each row; None where the scores are NaN.

    Args:
        logits_BV: (B, V) scores on the CPU; not changed.
        choosers: of each row; their random streams advance, nothing else of them changes.
    """
    changed_BV = logits_BV
    for row, chooser in enumerate(choosers):
        if chooser.adjusts:
            if changed_BV is logits_BV:
                changed_BV = logits_BV.clone()
            changed_BV[row] = _adjusted(logits_BV[row], chooser)
    best_B, likeliest_B = changed_BV.max(-1)
    tokens = likeliest_B.tolist()
    drawn = [row for row, chooser in enumerate(choosers) if chooser.options.temperature > 0]
    if drawn:
        rows_BV = changed_BV if len(drawn) == len(choosers) else changed_BV[drawn]
        for row, token in zip(drawn, draw(rows_BV, [choosers[row] for row in drawn]), strict=True):
            tokens[row] = token
    finite = torch.isnan(best_B).logical_not_().tolist()
    return [
        _scored(logits_BV[row], tokens[row], chooser.options.logprobs) if finite[row] else None
        for row, chooser in enumerate(choosers)
    ]


def _adjusted(logits_V: Tensor, chooser: Chooser) -> Tensor:
    banned = chooser.ends if chooser.matcher is None or not chooser.matcher.complete else frozenset()
    logits_V = adjusted(logits_V, chooser.options, chooser.prompt_ids, chooser.output_ids, banned)
    return logits_V if chooser.matcher is None else chooser.matcher.masked(logits_V)


def draw(logits_BV: Tensor, choosers: Sequence[Chooser]) -> list[int]:
    """One random token for each row, by its temperature, top_k and top_p (arXiv:1904.09751)."""
    options = [chooser.options for chooser in choosers]
    vocab = logits_BV.shape[1]
    scaled_BV = logits_BV / torch.tensor([o.temperature for o in options]).unsqueeze(1)
    ks = [vocab if o.top_k is None else min(o.top_k, vocab) for o in options]
    if min(ks) < vocab:
        highest_BK = scaled_BV.topk(max(k for k in ks if k < vocab), dim=-1).values
        floors = [highest_BK[row, k - 1] if k < vocab else scaled_BV.new_tensor(-torch.inf) for row, k in enumerate(ks)]
        scaled_BV = scaled_BV.masked_fill(scaled_BV < torch.stack(floors).unsqueeze(1), -torch.inf)
    prob_BV = torch.softmax(scaled_BV, -1)
    if any(o.top_p < 1 for o in options):
        floor_B = torch.stack([nucleus_floor(prob_V, o.top_p) for prob_V, o in zip(prob_BV, options, strict=True)])
        prob_BV = prob_BV.masked_fill(prob_BV < floor_B.unsqueeze(1), 0.0)
    cumulative_BV = prob_BV.cumsum(-1, dtype=torch.float64)
    # Less than the total, so that the first point beyond it always is a token of non-zero probability.
    point_B1 = (
        torch.tensor([[chooser.rng.random()] for chooser in choosers], dtype=torch.float64) * cumulative_BV[:, -1:]
    )
    return torch.searchsorted(cumulative_BV, point_B1, right=True).squeeze(1).clamp_(max=vocab - 1).tolist()


def nucleus_floor(prob_V: Tensor, top_p: float) -> Tensor:
    """0-d: the smallest probability in the smallest set of likeliest tokens that reaches ``top_p``."""
    if top_p >= 1:
        return prob_V.new_zeros(())
    highest_K = prob_V.topk(min(_LIKELY, prob_V.numel())).values
    if float(highest_K.sum()) < top_p:
        highest_K = prob_V.sort(descending=True).values
    before_K = highest_K.cumsum(0) - highest_K
    return highest_K[(before_K < top_p).sum() - 1]


def _scored(logits_V: Tensor, token: int, top: int | None) -> Scored:
    return Scored(token, None) if top is None else score_row(torch.log_softmax(logits_V, -1), token, top)


def score_row(logprob_V: Tensor, token: int, top: int) -> Scored:
    """The log-probability of ``token`` and those of the ``top`` likeliest."""
    best = torch.topk(logprob_V, min(top, logprob_V.numel()))
    return Scored(token, float(logprob_V[token]), tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True)))
