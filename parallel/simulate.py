"""Replay of a load trace under a policy and a cost model: what the policy would level, move and cost.

Everything here is modelled: loads are real or made up, placements are what the policies decide, but times come from the
formulae of :mod:`parallel.cost_model`. Compare policies with each other; do not quote times.

Shape suffixes: L layers, E experts, W ranks. Of two W, the first is the source.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass

import numpy as np

from parallel.cost_model import Floats, memory_ratio
from parallel.load_trace import TraceStep
from parallel.placement import Ints, Placement
from parallel.policies import LayerPlan, Policy, Setting


@dataclass(frozen=True)
class Outcome:
    """Means over the steps of a replay, from the first one counted on.

    Attributes:
        imbalance: rows of the busiest rank over the mean, mean over layers too.
        token_bytes: rows that leave their rank, there and back, forward and backward, all ranks together.
        copy_bytes, gradient_bytes, moved_bytes: of copies, their gradients, and experts with optimizer state that
            change ranks; all ranks together.
        exposed_s: time of copies and gradients that attention does not hide.
        moved_s: time of moving experts with optimizer state; nothing hides it.
        step_s: time of a step's MoE layers and attention.
        memory_ratio: memory of experts on the fullest rank over that of plain expert parallelism.
    """

    policy: str
    imbalance: float
    token_bytes: float
    copy_bytes: float
    gradient_bytes: float
    moved_bytes: float
    exposed_s: float
    moved_s: float
    step_s: float
    memory_ratio: float

    def as_dict(self) -> dict[str, str | float]:
        """For JSON."""
        return asdict(self)


@dataclass(frozen=True)
class _LayerCost:
    imbalance: float
    token_bytes: float
    copy_bytes: float
    gradient_bytes: float
    exposed_s: float
    total_s: float


def replay(policy: Policy, trace: Iterable[TraceStep], setting: Setting, skip: int = 10) -> Outcome:
    """Run a policy over a trace.

    Args:
        trace: counts of shape (L, W, E) as in ``setting``.
        skip: first steps that are played but not counted, while predictors fill.

    Raises:
        ValueError: the trace has no step to count, or another shape.
    """
    shape, cluster = setting.shape, setting.cluster
    expected = (shape.layers, cluster.world_size, shape.experts)
    costs: list[list[_LayerCost]] = []
    moved: list[Floats] = []
    copies_WL: list[Ints] = []
    plans: list[LayerPlan] = []
    for index, (_, count_LWE) in enumerate(trace):
        if count_LWE.shape != expected:
            raise ValueError(f"the trace has counts of shape {count_LWE.shape}, the setting (L, W, E) = {expected}")
        decided = policy.plan(index, count_LWE)
        if index < skip:
            continue
        plans = decided.layers
        moved.append(decided.moved_WW * shape.state_bytes)
        costs.append(
            [
                _layer_cost(plan, count_WE, setting, policy.gathers)
                for plan, count_WE in zip(plans, count_LWE, strict=True)
            ]
        )
        copies_WL.append(np.array([plan.placement.copies_W for plan in plans]).T)
    if not costs:
        raise ValueError(f"the trace has no step behind the first {skip}, which are not counted")

    def per_step(name: str) -> float:
        return float(np.mean([sum(getattr(cost, name) for cost in step) for step in costs]))

    moved_s = float(np.mean([cluster.exchange_s(bytes_WW) for bytes_WW in moved]))
    return Outcome(
        policy=policy.name,
        imbalance=per_step("imbalance") / shape.layers,
        token_bytes=per_step("token_bytes"),
        copy_bytes=per_step("copy_bytes"),
        gradient_bytes=per_step("gradient_bytes"),
        moved_bytes=float(np.mean([bytes_WW.sum() for bytes_WW in moved])),
        exposed_s=per_step("exposed_s"),
        moved_s=moved_s,
        step_s=per_step("total_s") + moved_s,
        memory_ratio=float(np.mean([_memory(at_WL, plans, setting, policy.gathers) for at_WL in copies_WL])),
    )


def lower_bound(trace: Iterable[TraceStep], setting: Setting) -> Outcome:
    """What no policy can beat: every rank computes the mean, no row leaves its rank, and nothing is copied."""
    mean_rows = float(np.mean([count_LWE.sum((1, 2)).mean() for _, count_LWE in trace])) / setting.cluster.world_size
    step_s = (
        setting.shape.layers
        * 3
        * (setting.shape.attention_s(setting.cluster) + mean_rows * setting.shape.row_s(setting.cluster))
    )
    return Outcome("lower bound", 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, step_s, 1.0)


def balanced(trace: Iterable[TraceStep]) -> list[TraceStep]:
    """The trace with every rank's rows spread evenly over all experts: the usual ideal that is within EP's reach."""
    steps = []
    for step, count_LWE in trace:
        experts = count_LWE.shape[2]
        base, rest = np.divmod(count_LWE.sum(2, keepdims=True), experts)
        begins = np.arange(count_LWE.shape[1])[:, None]
        steps.append(TraceStep(step, base + ((np.arange(experts) - begins) % experts < rest)))
    return steps


def _layer_cost(plan: LayerPlan, count_WE: Ints, setting: Setting, gathers: int) -> _LayerCost:
    shape, cluster = setting.shape, setting.cluster
    rows_WW = routed_rows(plan, count_WE, cluster.node_W)
    rows_W = rows_WW.sum(0)
    off_rank = float(rows_WW.sum() - np.trace(rows_WW))
    exchange_s = cluster.exchange_s(rows_WW * shape.row_bytes)
    owners_EW, early_EW = plan.placement.sharding().holders_EW, plan.early.holders_EW
    held_EW = plan.placement.holders_EW
    attention_s = shape.attention_s(cluster)
    copies = int(plan.placement.copies_E.sum())

    gradient_s = cluster.copies_s(owners_EW, held_EW, shape.expert_bytes)
    if plan.resident:
        # Holders keep their own optimizer state, so each needs the whole sum: an all-reduce moves it twice.
        hidden_forward, late_s, gradient_s, gathered = 0.0, 0.0, 2 * gradient_s, 0
    else:
        hidden_forward = cluster.copies_s(owners_EW, early_EW, shape.expert_bytes)
        late_s = cluster.copies_s(early_EW, held_EW, shape.expert_bytes)
        gathered = copies * gathers
    again_s = (gathers - 1) * cluster.copies_s(owners_EW, held_EW, shape.expert_bytes)
    exposed_s = max(0.0, hidden_forward - attention_s) + late_s + max(0.0, gradient_s + again_s - 2 * attention_s)
    compute_s = 3 * (attention_s + float(rows_W.max()) * shape.row_s(cluster))
    return _LayerCost(
        imbalance=float(rows_W.max() / max(rows_W.mean(), 1e-9)),
        token_bytes=4 * off_rank * shape.row_bytes,
        copy_bytes=float(gathered * shape.expert_bytes),
        gradient_bytes=float(copies * shape.expert_bytes * (2 if plan.resident else 1)),
        exposed_s=exposed_s,
        total_s=compute_s + 4 * exchange_s + exposed_s,
    )


def routed_rows(plan: LayerPlan, count_WE: Ints, node_W: Ints) -> Floats:
    """(W, W) rows from each rank to each; shares may be fractions of a row.

    Args:
        count_WE: (W, E) rows that each rank has for each expert.
        node_W: (W,) node of each rank.
    """
    placement = plan.placement
    rows_WW: Floats = count_WE.astype(np.float64) @ _only_owners(placement)
    for expert in np.flatnonzero(placement.copies_E).tolist():
        held_W, count_W = placement.holders_EW[expert], count_WE[:, expert].astype(np.float64)
        if plan.split == "quota":
            assert plan.quota_EW is not None
            rows_WW += _transported(count_W, plan.quota_EW[expert].astype(np.float64))
            continue
        share_WW = np.tile(held_W / held_W.sum(), (held_W.size, 1))
        if plan.split == "near":
            near_WW = held_W & (node_W[:, None] == node_W)
            on_node_W = near_WW.sum(1)
            share_WW = np.where(on_node_W[:, None] > 0, near_WW / np.maximum(on_node_W, 1)[:, None], share_WW)
            share_WW[held_W] = np.eye(held_W.size)[held_W]
        rows_WW += count_W[:, None] * share_WW
    return rows_WW


def _only_owners(placement: Placement) -> Floats:
    """(E, W) 1 where an expert's rows all go because nobody else holds it."""
    alone = placement.copies_E == 0
    only_EW: Floats = (placement.holders_EW & alone[:, None]).astype(np.float64)
    return only_EW


def _transported(have_W: Floats, want_W: Floats) -> Floats:
    """(W, W) rows at home as far as wanted there, the others in proportion to what is missing elsewhere."""
    home_W = np.minimum(have_W, want_W)
    left_W, missing_W = have_W - home_W, want_W - home_W
    rows_WW: Floats = np.diag(home_W) + np.outer(left_W, missing_W) / max(missing_W.sum(), 1e-9)
    return rows_WW


def _memory(copies_WL: Ints, plans: list[LayerPlan], setting: Setting, gathers: int) -> float:
    """Of the fullest rank, over expert parallelism's."""
    shape, world = setting.shape, setting.cluster.world_size
    owned = shape.layers * shape.experts / world
    if plans[0].resident:
        return 1 + float(copies_WL.sum(1).max()) / owned
    return max(
        memory_ratio(copies_L.astype(np.float64), owned, shape.number_bytes, keep=gathers == 1)
        for copies_L in copies_WL
    )
