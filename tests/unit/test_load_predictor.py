"""Predictors: against NumPy's means, fractions and a plain average; resumed bit by bit; deaf to what is no load."""

from __future__ import annotations

import json
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from parallel.load_predictor import PredictorKind, build_predictor

pytestmark = pytest.mark.unit

KINDS: tuple[PredictorKind, ...] = ("mean", "ema", "last")


def steps(count: int, seed: int = 0) -> list[np.ndarray]:
    return list(np.random.default_rng(seed).integers(0, 10_000, (count, 2, 3)))


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_before_any_observation(kind: PredictorKind) -> None:
    predicted_LE = build_predictor(kind, 5, 2, 3).predict()
    assert predicted_LE.dtype == np.int64
    assert predicted_LE.tolist() == [[0, 0, 0], [0, 0, 0]]


@pytest.mark.parametrize("seen", [1, 3, 4, 9])
def test_mean_is_the_mean_of_the_window_times_the_steps_in_it(seen: int) -> None:
    predictor, observed = build_predictor("mean", 4, 2, 3), steps(seen)
    for load_LE in observed:
        predictor.observe(load_LE)
    window = observed[-4:]
    assert np.array_equal(predictor.predict(), np.rint(np.mean(window, axis=0) * len(window)))


def test_last_is_the_last_step() -> None:
    predictor, observed = build_predictor("last", 5, 2, 3), steps(7)
    for load_LE in observed:
        predictor.observe(load_LE)
    assert np.array_equal(predictor.predict(), observed[-1])


def test_ema_follows_the_exact_average_within_its_fraction() -> None:
    predictor, observed = build_predictor("ema", 5, 2, 3), steps(40)
    exact = [[Fraction(int(rows)) for rows in layer] for layer in observed[0]]
    predictor.observe(observed[0])
    for load_LE in observed[1:]:
        predictor.observe(load_LE)
        exact = [
            [old + Fraction(2, 6) * (int(new) - old) for old, new in zip(olds, news, strict=True)]
            for olds, news in zip(exact, load_LE, strict=True)
        ]
    away = np.abs(predictor.predict() / 256 - np.array(exact, dtype=float))
    assert away.max() < 3 / 256  # each floor loses less than 1/256, and a third of what was lost before fades


def test_ema_of_an_expert_that_died_comes_down_to_zero() -> None:
    predictor = build_predictor("ema", 5, 1, 1)
    predictor.observe(np.array([[1000]]))
    for _ in range(60):
        predictor.observe(np.array([[0]]))
    assert predictor.predict().tolist() == [[0]]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cut", [0, 1, 3, 6])
def test_a_resumed_predictor_goes_on_bit_by_bit(kind: PredictorKind, cut: int) -> None:
    observed = steps(10)
    whole, before, after = (build_predictor(kind, 4, 2, 3) for _ in range(3))
    for load_LE in observed[:cut]:
        whole.observe(load_LE)
        before.observe(load_LE)
    after.load_state(json.loads(json.dumps(before.state())))
    for load_LE in observed[cut:]:
        assert np.array_equal(after.predict(), whole.predict())
        whole.observe(load_LE)
        after.observe(load_LE)
    assert after.predict().dtype == np.int64
    assert np.array_equal(after.predict(), whole.predict())
    assert after.state() == whole.state()


@pytest.mark.parametrize("kind", KINDS)
def test_neither_the_observed_nor_the_predicted_array_is_shared(kind: PredictorKind) -> None:
    predictor = build_predictor(kind, 4, 1, 2)
    load_LE = np.array([[3, 5]])
    predictor.observe(load_LE)
    first = predictor.predict()
    load_LE[:] = 0
    predictor.predict()[:] = 0
    assert np.array_equal(predictor.predict(), first)


@pytest.mark.parametrize(
    ("load_LE", "words"),
    [
        (np.zeros((3, 2), dtype=int), "loads have shape (3, 2), this predictor was built for (L, E) = (2, 3)"),
        (np.zeros((2, 3)), "loads are counts of rows: integers of at least 0, not float64"),
        (np.full((2, 3), -1), "loads are counts of rows: integers of at least 0, not int64 from -1"),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_load_is_refused(kind: PredictorKind, load_LE: Any, words: str) -> None:
    predictor = build_predictor(kind, 5, 2, 3)
    with pytest.raises(ValueError, match=r"loads") as caught:
        predictor.observe(load_LE)
    assert words in str(caught.value)
    assert not predictor.predict().any()


def test_a_state_of_another_kind_window_or_shape_is_refused() -> None:
    mean, ema = build_predictor("mean", 5, 2, 3), build_predictor("ema", 5, 2, 3)
    mean.observe(steps(1)[0])
    with pytest.raises(ValueError, match="the saved predictor is mean over 5 steps, this one is ema over 5"):
        ema.load_state(mean.state())
    with pytest.raises(ValueError, match="the saved predictor is mean over 5 steps, this one is mean over 4"):
        build_predictor("mean", 4, 2, 3).load_state(mean.state())
    with pytest.raises(ValueError, match=r"loads have shape \(2, 3\), this predictor was built for"):
        build_predictor("mean", 5, 3, 2).load_state(mean.state())


def test_no_such_predictor() -> None:
    with pytest.raises(ValueError, match="no predictor is called 'median'; there are mean, ema, last"):
        build_predictor("median", 5, 1, 1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="window is 0: a predictor looks back 1 step or more"):
        build_predictor("mean", 0, 1, 1)
