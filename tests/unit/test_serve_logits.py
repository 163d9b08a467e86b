"""Changes to logits against loops over plain numbers."""

from __future__ import annotations

import math

import pytest
import torch

from serve.client import SamplingOptions
from serve.engine.logits import adjusted, biased, min_p_cut, penalised, without

pytestmark = pytest.mark.unit

LOGITS = [1.5, -0.5, 0.0, 3.0, -2.0, 0.25]


def test_penalties_equal_the_formulae_token_by_token() -> None:
    prompt, output = [0, 1, 1], [3, 3, 4, 1]
    options = SamplingOptions(presence_penalty=0.5, frequency_penalty=0.25, repetition_penalty=1.3)
    expected = []
    for token, logit in enumerate(LOGITS):
        value = logit
        if token in prompt or token in output:
            value = logit / 1.3 if logit > 0 else logit * 1.3
        count = output.count(token)
        expected.append(value - 0.25 * count - (0.5 if count else 0.0))
    logits_V = torch.tensor(LOGITS)
    assert penalised(logits_V, prompt, output, options).tolist() == pytest.approx(expected)
    assert logits_V.tolist() == LOGITS  # pure


def test_neutral_options_return_the_very_logits() -> None:
    logits_V = torch.tensor(LOGITS)
    assert adjusted(logits_V, SamplingOptions(), [1], [2], {3}) is logits_V


def test_bias_ban_and_min_p() -> None:
    logits_V = torch.tensor(LOGITS)
    assert biased(logits_V, ((1, 2.0), (4, -100.0))).tolist() == pytest.approx([1.5, 1.5, 0.0, 3.0, -102.0, 0.25])
    assert without(logits_V, {3, 0}).tolist() == [-math.inf, -0.5, 0.0, -math.inf, -2.0, 0.25]
    for temperature in (0.5, 1.0, 2.0):
        weights = [math.exp(logit / temperature) for logit in LOGITS]
        kept = [weight >= 0.1 * max(weights) for weight in weights]
        assert torch.isfinite(min_p_cut(logits_V, 0.1, temperature)).tolist() == kept
    assert torch.isfinite(min_p_cut(logits_V, 1.0, 1.0)).tolist() == [logit == 3.0 for logit in LOGITS]
    assert min_p_cut(logits_V, 0.0, 1.0) is logits_V
    assert logits_V.tolist() == LOGITS


def test_end_tokens_are_banned_until_min_tokens_even_if_biased() -> None:
    options = SamplingOptions(min_tokens=2, logit_bias=((3, 100.0),))
    logits_V = torch.tensor(LOGITS)
    banned = [bool(torch.isinf(adjusted(logits_V, options, [], [0] * done, {3})[3])) for done in range(4)]
    assert banned == [True, True, False, False]
