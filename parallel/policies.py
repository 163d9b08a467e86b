"""Policies of placing experts, for replay under a cost model: FSSDP's own, and the ideas of earlier systems.

Each decides for all layers of a step. What is decided before the gate has spoken may depend on earlier steps alone; a
policy that looks at the step's own loads pays for what it then copies on the critical path. The earlier systems are
written anew from their papers and simplified: what they place and what that moves, not how they schedule kernels.

Shape suffixes: L layers, E experts, W ranks. Of two W, the first is the source.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np

from parallel.cost_model import ClusterModel, Floats, ModelShape
from parallel.load_predictor import LoadPredictor, PredictorKind, build_predictor
from parallel.placement import Ints, Placement, even_owners
from parallel.planner import even_quotas, plan_copies, plan_more_copies, plan_spill
from parallel.sharder import moves, plan_owners


@dataclass(frozen=True)
class LayerPlan:
    """What a policy decides for one layer and step.

    Attributes:
        placement: who computes what.
        early: who holds what before the gate has spoken; the rest of ``placement`` is copied on the critical path.
        split: rows stay on their rank if it holds the expert, else on its node (``near``), or go evenly to all holders
            (``spread``), or as ``quota_EW`` says.
        resident: holders keep their copies over steps, with optimizer state: nothing is gathered.
        quota_EW: (E, W) rows of each expert that each rank computes.
    """

    placement: Placement
    early: Placement
    split: Literal["near", "spread", "quota"] = "near"
    resident: bool = False
    quota_EW: Ints | None = None


@dataclass(frozen=True)
class StepPlan:
    """Plans of all layers, and what moved with optimizer state before the step: (W, W) experts."""

    layers: list[LayerPlan]
    moved_WW: Floats


class Policy(Protocol):
    """Decides, step after step.

    Attributes:
        name: in tables.
        gathers: how often a step gathers copies: 1 (kept from forward to backward) or 2 (released in between).
    """

    name: str
    gathers: int

    def plan(self, step: int, count_LWE: Ints) -> StepPlan:
        """The plan for a step with these rows; also takes notice of them for the steps to come."""
        ...


@dataclass(frozen=True)
class Setting:
    """What policies know of where they run."""

    shape: ModelShape
    cluster: ClusterModel

    @property
    def even_LE(self) -> Ints:
        return even_owners(self.shape.layers, self.shape.experts, self.cluster.world_size)

    @property
    def nodes(self) -> list[int]:
        nodes: list[int] = self.cluster.node_W.tolist()
        return nodes

    @property
    def ns_per_row(self) -> int:
        """In its expert and on the busy rank's share of the slower link: forward and backward, there and back."""
        rate = min(self.cluster.rank_bytes_per_s, self.cluster.node_bytes_per_s / self.cluster.ranks_per_node)
        return max(1, round(1e9 * (3 * self.shape.row_s(self.cluster) + 4 * self.shape.row_bytes / rate)))

    @property
    def ns_per_copy(self) -> int:
        """There, and its gradient back, if nothing hides it."""
        rate = min(self.cluster.rank_bytes_per_s, self.cluster.node_bytes_per_s)
        return round(2e9 * self.shape.expert_bytes / rate)

    def predictor(self, window: int, kind: PredictorKind = "mean") -> LoadPredictor:
        return build_predictor(kind, window, self.shape.layers, self.shape.experts)

    def sharding(self, owner_E: Ints) -> Placement:
        return Placement(owner_E, world_size=self.cluster.world_size)


def _nothing_moved(setting: Setting) -> Floats:
    return np.zeros((setting.cluster.world_size, setting.cluster.world_size))


# --- FSSDP ------------------------------------------------------------------------------------------------------------


class Hecate:
    """Expert parallelism, plus whichever parts of Hecate (arXiv:2502.02581) are asked for.

    Args:
        copies: Algorithm 1 before every step.
        reshard_interval: Algorithm 2 every so many steps; 0: never.
        calibrate: after the gate, ``more`` copies by Algorithm 1 if they pay, or ``spill`` of what is left.
        release: copies are released after forward and gathered again for backward (Hecate-RM).
        max_copies: per rank and layer; None: as many as hide.
    """

    def __init__(
        self,
        setting: Setting,
        name: str,
        *,
        copies: bool = True,
        reshard_interval: int = 0,
        calibrate: Literal["", "more", "spill"] = "",
        release: bool = False,
        window: int = 5,
        kind: PredictorKind = "mean",
        max_copies: int | None = None,
        overlap_degree: int | None = None,
    ) -> None:
        self.name, self.gathers = name, 2 if release else 1
        self._setting, self._interval, self._calibrate = setting, reshard_interval, calibrate
        hidden = setting.shape.overlap_degree(setting.cluster) if overlap_degree is None else overlap_degree
        self._overlap = hidden if copies else 0
        self._max_copies = hidden if max_copies is None else max_copies
        self._owner_LE = setting.even_LE
        self._slots_W = np.bincount(self._owner_LE.ravel(), minlength=setting.cluster.world_size)
        self._predictor = setting.predictor(window, kind)

    def plan(self, step: int, count_LWE: Ints) -> StepPlan:
        setting, predicted_LE = self._setting, self._predictor.predict()
        moved_WW = _nothing_moved(setting)
        # The first owners are planned as soon as the window is full, or a short trace would never see them.
        if self._interval and (step == min(5, self._interval) or (step and step % self._interval == 0)):
            new_LE = plan_owners(predicted_LE, self._owner_LE, self._overlap, self._slots_W, setting.nodes)
            for move in moves(self._owner_LE, new_LE):
                moved_WW[move.src, move.dst] += 1
            self._owner_LE = new_LE
        layers = []
        for owner_E, predicted_E, count_WE in zip(self._owner_LE, predicted_LE, count_LWE, strict=True):
            limits = (self._overlap, self._max_copies, setting.nodes)
            early = plan_copies(setting.sharding(owner_E), predicted_E, *limits)
            layers.append(self._calibrated(early, count_WE))
        self._predictor.observe(count_LWE.sum(1))
        return StepPlan(layers, moved_WW)

    def _calibrated(self, early: Placement, count_WE: Ints) -> LayerPlan:
        setting, load_E = self._setting, count_WE.sum(0)
        if self._calibrate == "more":
            times = {"ns_per_row": setting.ns_per_row, "ns_per_copy": setting.ns_per_copy}
            final = plan_more_copies(early, load_E, self._overlap, 2 * self._max_copies, setting.nodes, **times)
            return LayerPlan(final, early)
        if self._calibrate == "spill":
            settled_EW, least = even_quotas(count_WE, early, setting.nodes), setting.ns_per_copy // setting.ns_per_row
            spill = plan_spill(early, load_E, 2 * self._max_copies, settled_EW=settled_EW, min_rows=least)
            return LayerPlan(spill.placement, early, "quota", quota_EW=spill.quota_EW)
        return LayerPlan(early, early)


class Spill:
    """No prediction: least-loaded spill by true loads; all copies are on the critical path (LLEP, arXiv:2601.17111)."""

    gathers = 1

    def __init__(self, setting: Setting, name: str = "spill") -> None:
        self.name, self._setting = name, setting
        self._least = setting.ns_per_copy // setting.ns_per_row

    def plan(self, step: int, count_LWE: Ints) -> StepPlan:
        layers = []
        for owner_E, count_WE in zip(self._setting.even_LE, count_LWE, strict=True):
            sharding = self._setting.sharding(owner_E)
            spill = plan_spill(sharding, count_WE.sum(0), sharding.num_experts, min_rows=self._least)
            layers.append(LayerPlan(spill.placement, sharding, "quota", quota_EW=spill.quota_EW))
        return StepPlan(layers, _nothing_moved(self._setting))


# --- earlier systems --------------------------------------------------------------------------------------------------


class Shadowing:
    """After the gate, hot experts go to everyone as long as the model says that it pays (FasterMoE, PPoPP 2022)."""

    name, gathers = "FasterMoE shadowing", 1

    def __init__(self, setting: Setting) -> None:
        self._setting = setting

    def plan(self, step: int, count_LWE: Ints) -> StepPlan:
        layers = []
        for owner_E, count_WE in zip(self._setting.even_LE, count_LWE, strict=True):
            sharding = self._setting.sharding(owner_E)
            shadowed = self._shadowed(owner_E, count_WE)
            held_EW = sharding.holders_EW.copy()
            held_EW[shadowed] = True
            layers.append(LayerPlan(Placement(owner_E, held_EW), sharding))
        return StepPlan(layers, _nothing_moved(self._setting))

    def _shadowed(self, owner_E: Ints, count_WE: Ints) -> Ints:
        load_E = count_WE.sum(0)
        hottest = np.argsort(-load_E, kind="stable")
        rows_W = np.bincount(owner_E, load_E, minlength=len(count_WE))
        best, best_ns = 0, self._setting.ns_per_row * rows_W.max()
        for chosen, expert in enumerate(hottest, 1):
            rows_W[owner_E[expert]] -= load_E[expert]
            rows_W += count_WE[:, expert]
            ns = self._setting.ns_per_row * rows_W.max() + chosen * self._setting.ns_per_copy
            if ns < best_ns:
                best, best_ns = chosen, ns
        return hottest[:best]


@dataclass
class _Packed:
    """Base of policies that keep experts where they packed them until the next time they pack.

    Every copy has optimizer state; a step of packing moves what a rank did not hold before.
    """

    setting: Setting
    interval: int
    window: int = 5
    gathers: int = 1
    _placements: list[Placement] = field(init=False)
    _predictor: LoadPredictor = field(init=False)

    def __post_init__(self) -> None:
        self._placements = [self.setting.sharding(owner_E) for owner_E in self.setting.even_LE]
        self._predictor = self.setting.predictor(self.window)

    def plan(self, step: int, count_LWE: Ints) -> StepPlan:
        moved_WW = _nothing_moved(self.setting)
        if step == min(5, self.interval) or (step and step % self.interval == 0):
            packed = [
                self._pack(old, load_E) for old, load_E in zip(self._placements, self._predictor.predict(), strict=True)
            ]
            for old, new in zip(self._placements, packed, strict=True):
                for expert, rank in np.argwhere(new.holders_EW & ~old.holders_EW):
                    moved_WW[old.owner_E[expert], rank] += 1
            self._placements = packed
        self._predictor.observe(count_LWE.sum(1))
        layers = [LayerPlan(placement, placement, "spread", resident=True) for placement in self._placements]
        return StepPlan(layers, moved_WW)

    def _pack(self, old: Placement, load_E: Ints) -> Placement:
        raise NotImplementedError


def _pack_evenly(weight_N: Floats, expert_N: Ints, old: Placement, slots: int) -> Placement:
    """Heaviest first to the least loaded rank with a slot, if possible one that does not have the expert yet."""
    world, weight_W = old.world_size, [0.0] * old.world_size
    used_W = [0] * world
    holders: dict[int, list[int]] = {}
    for index in np.argsort(-weight_N, kind="stable").tolist():
        expert = int(expert_N[index])
        held = holders.setdefault(expert, [])
        rank = min(
            (r for r in range(world) if used_W[r] < slots),
            key=lambda r: (r in held, weight_W[r], not old.holders_EW[expert, r], r),
        )
        held.append(rank)
        used_W[rank] += 1
        weight_W[rank] += float(weight_N[index])
    owner_E = [
        next((rank for rank in holders[expert] if rank == old.owner_E[expert]), holders[expert][0])
        for expert in range(old.num_experts)
    ]
    pairs = [(expert, rank) for expert, ranks in holders.items() for rank in ranks]
    return Placement(owner_E, world_size=world).with_copies(pairs)


@dataclass
class SmartSwaps(_Packed):
    """Experts change ranks within their layer, one copy each, as many per rank as before (SmartMoE, ATC 2023)."""

    name: str = "SmartMoE swaps"

    def _pack(self, old: Placement, load_E: Ints) -> Placement:
        slots = -(-old.num_experts // old.world_size)
        return _pack_evenly(load_E.astype(np.float64), np.arange(old.num_experts), old, slots)


@dataclass
class RedundantExperts(_Packed):
    """``extra`` more slots on each rank: most rows per copy gets the next copy, then all are packed (EPLB, 2025)."""

    name: str = "EPLB"
    extra: int = 1

    def _pack(self, old: Placement, load_E: Ints) -> Placement:
        world, experts = old.world_size, old.num_experts
        slots = -(-experts // world) + self.extra
        copies_E = np.ones(experts, dtype=np.int64)
        for _ in range(slots * world - experts):
            copies_E[np.argmax(np.where(copies_E < world, load_E / copies_E, -1.0))] += 1
        expert_N = np.repeat(np.arange(experts), copies_E)
        return _pack_evenly((load_E / copies_E)[expert_N], expert_N, old, slots)


@dataclass
class FlexibleReplicas(_Packed):
    """Grows the copies of hot experts and shrinks those of cold ones, a few at a time (FlexMoE, arXiv:2304.03946)."""

    name: str = "FlexMoE"
    extra: int = 2
    changes: int = 8

    def _pack(self, old: Placement, load_E: Ints) -> Placement:
        held_EW, owner_E = old.holders_EW.copy(), old.owner_E
        slots = -(-old.num_experts // old.world_size) + self.extra
        for _ in range(self.changes):
            share_E = load_E / held_EW.sum(1)
            rows_W = share_E @ held_EW
            busiest = int(rows_W.argmax())
            hot = int(np.where(held_EW[:, busiest] & ~held_EW.all(1), share_E, -1.0).argmax())
            trial_EW = held_EW.copy()
            taker = int(np.where(held_EW[hot], np.inf, rows_W).argmin())
            if trial_EW[:, taker].sum() >= slots:
                # The coldest copy there makes room, unless all that it has it owns.
                spare_E = trial_EW[:, taker] & (owner_E != taker)
                if not spare_E.any():
                    break
                trial_EW[int(np.where(spare_E, share_E, np.inf).argmin()), taker] = False
            trial_EW[hot, taker] = True
            if (load_E / trial_EW.sum(1) @ trial_EW).max() >= rows_W.max():
                break
            held_EW = trial_EW
        return Placement(owner_E, held_EW)
