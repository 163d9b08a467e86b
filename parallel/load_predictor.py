"""What load to expect of each expert in the next step, from the loads of past steps.

Loads are global (summed over ranks), so every rank that observes the same loads predicts the same. All arithmetic is
on integers: a resumed run plans as the uninterrupted one would have. Hecate (arXiv:2502.02581, section 4.1) takes the
mean of the last 5 steps, because loads drift slowly.

Only proportions of a prediction mean something: planners compare experts with each other, and sums and fixed-point
numbers are exact where means are not. Shape suffixes: L layers, E experts, S steps.
"""

from __future__ import annotations

from typing import Any, Literal, Protocol

import numpy as np

from parallel.placement import Ints

PredictorKind = Literal["mean", "ema", "last"]

FRACTION_BITS = 8
"""A moving average keeps this many binary digits behind the point: a change of one row moves it in windows to 500."""


class LoadPredictor(Protocol):
    """Predicts from what it has observed."""

    def observe(self, load_LE: Ints) -> None:
        """Take notice of one step's global loads, (L, E) rows per expert.

        Raises:
            ValueError: another shape than (L, E), or not integers of at least 0.
        """
        ...

    def predict(self) -> Ints:
        """(L, E) numbers in proportion to the loads expected next; zeros before any observation."""
        ...

    def state(self) -> dict[str, Any]:
        """What a checkpoint must keep, in types that JSON has."""
        ...

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from a saved state as if never interrupted.

        Raises:
            ValueError: the state is of another kind, window or shape.
        """
        ...


class WindowMean:
    """The mean of the last ``window`` steps, told as their sum. A window of 1 is the last step."""

    def __init__(self, window: int, num_layers: int, num_experts: int) -> None:
        self._window, self._shape = window, (num_layers, num_experts)
        self._recent_SLE: list[Ints] = []

    def observe(self, load_LE: Ints) -> None:
        self._recent_SLE = [*self._recent_SLE, _checked(load_LE, self._shape)][-self._window :]

    def predict(self) -> Ints:
        total_LE = np.zeros(self._shape, dtype=np.int64)
        for load_LE in self._recent_SLE:
            total_LE += load_LE
        return total_LE

    def state(self) -> dict[str, Any]:
        return {"kind": "mean", "window": self._window, "recent": [load_LE.tolist() for load_LE in self._recent_SLE]}

    def load_state(self, state: dict[str, Any]) -> None:
        _check_origin(state, "mean", self._window)
        self._recent_SLE = [_checked(np.array(load, dtype=np.int64), self._shape) for load in state["recent"]]


class MovingAverage:
    """An exponential moving average in fixed point; a step weighs 2 / (window + 1), as is usual."""

    def __init__(self, window: int, num_layers: int, num_experts: int) -> None:
        self._window, self._shape = window, (num_layers, num_experts)
        self._average_LE: Ints | None = None

    def observe(self, load_LE: Ints) -> None:
        scaled_LE = _checked(load_LE, self._shape) << FRACTION_BITS
        if self._average_LE is None:
            self._average_LE = scaled_LE
        else:
            self._average_LE = self._average_LE + 2 * (scaled_LE - self._average_LE) // (self._window + 1)

    def predict(self) -> Ints:
        return np.zeros(self._shape, dtype=np.int64) if self._average_LE is None else self._average_LE.copy()

    def state(self) -> dict[str, Any]:
        average = None if self._average_LE is None else self._average_LE.tolist()
        return {"kind": "ema", "window": self._window, "average": average}

    def load_state(self, state: dict[str, Any]) -> None:
        _check_origin(state, "ema", self._window)
        average = state["average"]
        self._average_LE = None if average is None else _checked(np.array(average, dtype=np.int64), self._shape)


def build_predictor(kind: PredictorKind, window: int, num_layers: int, num_experts: int) -> LoadPredictor:
    """A predictor by name.

    Args:
        kind: ``mean`` of the window, ``ema`` that weighs a step by 2 / (window + 1), or ``last`` step alone.
        window: steps, at least 1; ``last`` does not look at it.

    Raises:
        ValueError: no such kind, or an empty window.
    """
    if window < 1:
        raise ValueError(f"window is {window}: a predictor looks back 1 step or more")
    if kind == "mean":
        return WindowMean(window, num_layers, num_experts)
    if kind == "last":
        return WindowMean(1, num_layers, num_experts)
    if kind == "ema":
        return MovingAverage(window, num_layers, num_experts)
    raise ValueError(f"no predictor is called {kind!r}; there are mean, ema, last")


def _checked(load_LE: Ints, shape: tuple[int, int]) -> Ints:
    if load_LE.shape != shape:
        raise ValueError(f"loads have shape {load_LE.shape}, this predictor was built for (L, E) = {shape}")
    if load_LE.dtype.kind not in "iu" or (load_LE.size and load_LE.min() < 0):
        raise ValueError(f"loads are counts of rows: integers of at least 0, not {load_LE.dtype} from {load_LE.min()}")
    return load_LE.astype(np.int64)


def _check_origin(state: dict[str, Any], kind: str, window: int) -> None:
    if (state.get("kind"), state.get("window")) != (kind, window):
        raise ValueError(
            f"the saved predictor is {state.get('kind')} over {state.get('window')} steps,"
            f" this one is {kind} over {window}"
        )
