"""Assignments of most score: tokens to experts with given loads, and one to one. Exact, for few columns.

Shape suffixes: T tokens (rows), E experts (columns).
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


class Assignment(NamedTuple):
    """Who goes where, and prices that say so.

    Attributes:
        expert_T: (T,) int64, with exactly the asked loads.
        bonus_E: (E,) fp64 with ``expert_T == argmax(score + bonus)`` wherever the optimum is unique: minus the prices.
    """

    expert_T: Tensor
    bonus_E: Tensor


def balanced_assignment(score_TE: Tensor, capacity_E: Tensor, bonus_E: Tensor | None = None) -> Assignment:
    """The assignment of most total score in which expert e gets exactly ``capacity_E[e]`` tokens.

    Each token goes to its best expert after ``bonus_E``, which is optimal for the loads that come out; then surplus
    tokens are passed on, one at a time, along the chain of experts that costs least (successive shortest paths; Ahuja,
    Magnanti and Orlin 1993, section 9.7). With a bonus that nearly balances, few are. On the CPU.

    Args:
        score_TE: (T, E) finite scores.
        capacity_E: (E,) int64, adding up to T.
        bonus_E: (E,) first guess; None: by Sinkhorn steps, sharper and sharper.

    Raises:
        ValueError: capacities do not add up to T, or a score is not finite.
    """
    score = score_TE.detach().double().cpu().numpy()
    capacity = capacity_E.cpu().numpy().astype(np.int64)
    if int(capacity.sum()) != score.shape[0] or bool((capacity < 0).any()):
        raise ValueError(f"capacities add up to {int(capacity.sum())}, there are {score.shape[0]} tokens")
    if not np.isfinite(score).all():
        raise ValueError("scores must be finite")
    bonus = _first_bonus(score, capacity) if bonus_E is None else bonus_E.detach().double().cpu().numpy()
    expert = (score + bonus).argmax(1)
    regret = _Regret(score, expert)
    surplus = np.bincount(expert, minlength=score.shape[1]) - capacity
    while (surplus > 0).any():
        path = _cheapest_path(regret.cost_EE, surplus)
        for source, target in itertools.pairwise(path):
            regret.move(int(regret.token_EE[source, target]), source, target)
        surplus[path[0]] -= 1
        surplus[path[-1]] += 1
    bonus = _inner_prices(regret.cost_EE) if score.shape[0] else np.zeros(score.shape[1])
    device = score_TE.device
    return Assignment(torch.from_numpy(regret.expert.copy()).to(device), torch.from_numpy(bonus).to(device))


class _Regret:
    """What it costs at least to move one token from expert e to f, and which token that is."""

    def __init__(self, score: Floats, expert: Ints) -> None:
        self.score, self.expert = score, expert
        num_experts = score.shape[1]
        self.cost_EE = np.full((num_experts, num_experts), np.inf)
        self.token_EE = np.full((num_experts, num_experts), -1, dtype=np.int64)
        for e in range(num_experts):
            self._refresh(e)

    def move(self, token: int, source: int, target: int) -> None:
        self.expert[token] = target
        self._refresh(source)
        self._refresh(target)

    def _refresh(self, e: int) -> None:
        tokens = np.flatnonzero(self.expert == e)
        if not tokens.size:
            self.cost_EE[e] = np.inf
            return
        loss = self.score[tokens, e][:, None] - self.score[tokens]
        best = loss.argmin(0)
        self.cost_EE[e] = loss[best, np.arange(loss.shape[1])]
        self.token_EE[e] = tokens[best]
        self.cost_EE[e, e] = 0.0


def _cheapest_path(cost_EE: Floats, surplus: Ints) -> list[int]:
    """Experts from one with surplus to one with room, whose moves cost least in total (Bellman-Ford)."""
    distance = np.where(surplus > 0, 0.0, np.inf)
    before = np.full(surplus.size, -1)
    for _ in range(surplus.size):
        via = distance[:, None] + cost_EE
        source = via.argmin(0)
        shorter = via[source, np.arange(surplus.size)]
        better = shorter < distance - 1e-12 * (
            1 + np.abs(distance, where=np.isfinite(distance), out=np.zeros_like(distance))
        )
        if not better.any():
            break
        distance[better], before[better] = shorter[better], source[better]
    end = int(np.where(surplus < 0, distance, np.inf).argmin())
    path = [end]
    while before[path[-1]] >= 0 and len(path) <= surplus.size:
        path.append(int(before[path[-1]]))
    return path[::-1]


def _inner_prices(cost_EE: Floats) -> Floats:
    """A bonus well inside the set {b_f - b_e <= cost_ef}: the mean of its extreme points by shortest paths."""
    distance = cost_EE.copy()
    np.fill_diagonal(distance, 0.0)
    for e in range(distance.shape[0]):
        distance = np.minimum(distance, distance[:, e, None] + distance[None, e])
    used = np.isfinite(cost_EE).all(1)
    bonus = np.zeros(len(distance))
    inner = distance[np.ix_(used, used)]
    bonus[used] = (inner.mean(0) - inner.mean(1)) / 2
    # An expert without tokens must stay below all that would send it one, by as much as moves cost elsewhere.
    margin = float(np.abs(cost_EE[np.isfinite(cost_EE)]).mean()) or 1.0
    for unused in np.flatnonzero(~used):
        bonus[unused] = (bonus[used] + cost_EE[used, unused]).min() - margin
    centred: Floats = bonus - bonus.mean()
    return centred


def _first_bonus(score: Floats, capacity: Ints) -> Floats:
    """Column potentials of entropic transport, at falling temperatures: nearly balances argmax(score + bonus)."""
    if not score.size or (capacity == 0).any():
        return np.zeros(score.shape[1])
    spread = float(score.std()) or 1.0
    score_t, target = torch.from_numpy(score), torch.from_numpy(capacity).double().log()
    bonus = torch.zeros(score.shape[1], dtype=torch.float64)
    for temperature in (0.3, 0.1, 0.03, 0.01):
        for _ in range(8):
            log_p = ((score_t + bonus) / (temperature * spread)).log_softmax(1)
            bonus += temperature * spread * (target - log_p.logsumexp(0))
    result: Floats = (bonus - bonus.mean()).numpy()
    return result


def hungarian(score_EE: Tensor) -> Tensor:
    """(E,) int64 permutation p that maximises sum_e score[e, p_e], by augmenting paths (Jonker and Volgenant 1987).

    Ties are broken the same way everywhere, so that ranks with the same scores agree. On the CPU, O(E^3).

    Raises:
        ValueError: the matrix is not square, or a score is not finite.
    """
    cost = -score_EE.detach().double().cpu().numpy()
    if cost.ndim != 2 or cost.shape[0] != cost.shape[1]:
        raise ValueError(f"scores must be square, got {cost.shape}")
    if not np.isfinite(cost).all():
        raise ValueError("scores must be finite")
    size = cost.shape[0]
    row_price, column_price = np.zeros(size), np.zeros(size)
    row_of = np.full(size, -1, dtype=np.int64)
    for new in range(size):
        shortest, before, done = np.full(size, np.inf), np.full(size, -1), np.zeros(size, dtype=bool)
        row, column, length = new, -1, 0.0
        while True:
            reduced = length + cost[row] - row_price[row] - column_price
            better = ~done & (reduced < shortest)
            shortest[better], before[better] = reduced[better], row
            column = int(np.where(done, np.inf, shortest).argmin())
            length = shortest[column]
            done[column] = True
            if row_of[column] < 0:
                break
            row = int(row_of[column])
        row_price[new] += length
        settled = done.copy()
        settled[column] = False
        row_price[row_of[settled]] += length - shortest[settled]
        column_price[settled] -= length - shortest[settled]
        while True:  # flip the path
            row = int(before[column])
            row_of[column] = row
            taken = np.flatnonzero((row_of == row) & (np.arange(size) != column))
            if row == new:
                break
            column = int(taken[0])
    permutation = np.empty(size, dtype=np.int64)
    permutation[row_of] = np.arange(size)
    return torch.from_numpy(permutation).to(score_EE.device)
