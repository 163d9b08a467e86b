"""Tokens from scores: against moe.generate's rules, plain loops, and the distribution that they must follow."""

from __future__ import annotations

import math
from collections import Counter
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe.generate import SamplingParams, keep_likely
from serve.client import SamplingOptions
from serve.engine.sampler import Chooser, choose_tokens, draw, nucleus_floor

pytestmark = pytest.mark.unit

VOCAB = 40


def chooser(seed: int = 0, **options: object) -> Chooser:
    return Chooser(SamplingOptions(**options), Random(seed), (1, 2), frozenset({0}))  # type: ignore[arg-type]


def logits(rows: int, seed: int = 0, vocab: int = VOCAB) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 2


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 99), st.sampled_from([None, 1, 3, 39, 100]), st.sampled_from([1.0, 0.9, 0.4, 1e-6]))
def test_only_tokens_that_moe_generate_keeps_are_drawn(seed: int, top_k: int | None, top_p: float) -> None:
    row_V = logits(1, seed)[0]
    options = {"temperature": 0.8, "top_k": top_k, "top_p": top_p}
    kept = torch.isfinite(keep_likely(row_V, SamplingParams(temperature=0.8, top_k=top_k, top_p=top_p)))
    drawn = {draw(row_V[None], [chooser(number, **options)])[0] for number in range(60)}
    assert drawn <= set(kept.nonzero().flatten().tolist())


def test_draws_follow_the_distribution() -> None:
    row_V = logits(1)[0]
    rng = chooser(3, temperature=1.3, top_k=6)
    count = Counter(token for _ in range(40) for token in draw(row_V.expand(500, -1), [rng] * 500))
    wanted_V = torch.softmax(keep_likely(row_V, SamplingParams(temperature=1.3, top_k=6)), -1)
    assert set(count) == set(wanted_V.nonzero().flatten().tolist())
    for token, times in count.items():
        prob = float(wanted_V[token])
        assert abs(times / 20_000 - prob) < 5 * math.sqrt(prob * (1 - prob) / 20_000)


def test_a_row_is_drawn_as_if_it_were_alone() -> None:
    rows_BV = logits(6)
    options = [
        {"temperature": 1.0},
        {"temperature": 0.0},
        {"temperature": 0.7, "top_k": 5},
        {"temperature": 1.5, "top_p": 0.6, "presence_penalty": 1.0},
        {"temperature": 1.0, "top_k": 3, "top_p": 0.9, "min_p": 0.1},
        {"temperature": 2.0, "logit_bias": ((3, 5.0),)},
    ]
    together = choose_tokens(rows_BV, [chooser(number, **o) for number, o in enumerate(options)])
    for number, o in enumerate(options):
        assert choose_tokens(rows_BV[number : number + 1], [chooser(number, **o)]) == [together[number]]


def test_equal_values_are_kept_or_cut_together() -> None:
    """Sorting breaks ties by chance; what a seed gives must not depend on it."""
    row_V = torch.full((VOCAB,), -5.0)
    row_V[[4, 9, 30]] = 1.0
    drawn = {draw(row_V[None], [chooser(number, temperature=1.0, top_k=2)])[0] for number in range(80)}
    assert drawn == {4, 9, 30}


def test_greedy_takes_the_lowest_of_equal_ids_and_reports_the_unchanged_model() -> None:
    row_V = torch.zeros(VOCAB)
    row_V[[7, 11]] = 3.0
    (scored,) = choose_tokens(row_V[None], [chooser(temperature=0.0, logprobs=2, logit_bias=((20, 9.0),))])
    assert scored is not None
    assert scored.token_id == 20
    assert scored.logprob == pytest.approx(float(torch.log_softmax(row_V, -1)[20]))
    assert {token for token, _ in scored.top} == {7, 11}
    (plain,) = choose_tokens(row_V[None], [chooser(temperature=0.0)])
    assert plain is not None
    assert (plain.token_id, plain.logprob, plain.top) == (7, None, ())


def test_scores_that_are_not_numbers_give_no_token_and_harm_no_neighbour() -> None:
    rows_BV = logits(3)
    rows_BV[1, 5] = math.nan
    for temperature in (0.0, 1.0):
        found = choose_tokens(rows_BV, [chooser(number, temperature=temperature) for number in range(3)])
        assert found[1] is None
        assert found[0] == choose_tokens(rows_BV[:1], [chooser(0, temperature=temperature)])[0]


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 20), st.floats(0.01, 0.999), st.sampled_from([0.01, 1.0, 4.0]))
def test_the_nucleus_is_the_smallest_set_that_reaches_top_p(seed: int, top_p: float, scale: float) -> None:
    prob_V = torch.softmax(logits(1, seed, vocab=600)[0] * scale, -1)
    floor = float(nucleus_floor(prob_V, top_p))
    ordered = sorted(prob_V.tolist(), reverse=True)
    total, wanted = 0.0, ordered[0]
    for prob in ordered:
        if total >= top_p + 1e-6:
            break
        total, wanted = total + prob, prob
    assert floor == pytest.approx(wanted, rel=2e-2)


def test_the_stream_of_random_numbers_belongs_to_the_sequence() -> None:
    rows_BV = logits(1)
    one = chooser(5, temperature=1.0)
    first = [draw(rows_BV, [one])[0] for _ in range(10)]
    again = chooser(5, temperature=1.0)
    assert [draw(rows_BV, [again])[0] for _ in range(10)] == first
    assert len(set(first)) > 1
