"""Which experts get copies in this step: the mode's rule, fed with loads, link and compute times.

Everything that a decision depends on is an integer that all ranks share: global loads, and measurements of the first
steps that the ranks have agreed on. So all ranks decide alike without talking, and a resumed run decides as the
uninterrupted one, because the state is part of the checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from statistics import median
from typing import Any

import numpy as np

from moe.errors import CheckpointError
from parallel.config import ParallelConfig
from parallel.exchange import LinkModel
from parallel.load_predictor import build_predictor
from parallel.placement import Ints, Placement
from parallel.planner import even_quotas, plan_copies, plan_more_copies, plan_spill
from parallel.sharder import plan_owners, worth_moving
from parallel.topology import Topology

PROFILED_STEPS = 3
"""Steps that are timed before copies are decided by times; the first one, which warms up, does not count."""


class CopyPolicy:
    """Decides placements for all layers of a model.

    Attributes:
        link: what the links do; also decides how copies travel. None until it is measured or loaded.
        overlap_degree_L: (L,) experts per layer whose copies hide under the attention before it.
    """

    def __init__(
        self, config: ParallelConfig, topology: Topology, node_W: Sequence[int], shape: tuple[int, int]
    ) -> None:
        self.config = config
        self.link: LinkModel | None = None
        self._topology, self._node_W, self._shape = topology, node_W, shape
        layers, experts = shape
        self._predictor = build_predictor(config.predictor, config.window, layers, experts)
        self._max_copies = experts if config.max_copies is None else config.max_copies
        fixed = config.overlap_degree
        self.overlap_degree_L = [0 if fixed == "auto" else fixed] * layers
        self._rows_L = [0] * layers
        self._compute_ns = self._link_ns = 0  # of one row in a step: on the rank that computes it, on a link
        self._copy_ns = 0  # of one copy in a step: its own way, once or twice, and that of its gradient
        self._profile: list[tuple[list[int], int]] = []
        self._profiled = not self._needs_profile

    @property
    def _needs_profile(self) -> bool:
        gathers = self.config.mode in ("fssdp-keep", "fssdp-rm")
        return gathers and (self.config.overlap_degree == "auto" or self.config.planner != "predict")

    @property
    def profiling(self) -> bool:
        """Does :meth:`after_step` want times?"""
        return not self._profiled

    @property
    def decides_after_gate(self) -> bool:
        """Do placements depend on the true loads of the micro-batch?"""
        return self.config.mode in ("fssdp-keep", "fssdp-rm") and self.config.planner != "predict"

    def before_step(self, shardings: Sequence[Placement]) -> list[Placement]:
        """The placement of each layer by what is known before the step."""
        mode = self.config.mode
        if mode == "fsdp":
            return [sharding.everywhere() for sharding in shardings]
        if mode == "ep":
            return list(shardings)
        placements = []
        for layer, (sharding, load_E) in enumerate(zip(shardings, self._predictor.predict(), strict=True)):
            degree = self.overlap_degree_L[layer]
            if self.config.overlap_degree == "auto" and self._copy_ns and self._rows_L[layer]:
                # The prediction is in proportion only; the step has about as many rows as the last one.
                rows_E = load_E * self._rows_L[layer] // max(1, int(load_E.sum()))
                degree = best_degree(rows_E, sharding, degree, self._compute_ns, self._link_ns, self._copy_ns)
            placements.append(plan_copies(sharding, load_E, degree, self._max_copies, self._node_W))
        return placements

    def after_gate(self, layer: int, placement: Placement, count_WE: Ints) -> tuple[Placement, Ints | None]:
        """The layer's placement now that the loads of this micro-batch are known.

        Returns:
            The placement, and the (E, W) rows of each expert that each rank shall compute if the policy says that too.
        """
        load_E = count_WE.sum(0)
        if self.config.planner == "spill":
            # A copy that moves fewer rows than it costs in time is not worth it.
            least = -(-self._copy_ns // self._row_ns) if self._row_ns else 1
            settled_EW = even_quotas(count_WE, placement, self._node_W)
            spill = plan_spill(placement, load_E, self._max_copies, settled_EW=settled_EW, min_rows=least)
            return spill.placement, spill.quota_EW
        more = plan_more_copies(
            placement,
            load_E,
            self.overlap_degree_L[layer],
            self._max_copies,
            self._node_W,
            ns_per_row=self._row_ns,
            ns_per_copy=self._copy_ns,
        )
        return more, None

    @property
    def _row_ns(self) -> int:
        return self._compute_ns + self._link_ns

    def after_step(
        self, load_LE: Ints, *, chunk_bytes: int, row_bytes: int, free_ns_L: list[int], ns_per_row: int
    ) -> None:
        """Take notice of a step. Collective while :attr:`profiling`.

        Args:
            load_LE: (L, E) global loads.
            chunk_bytes, row_bytes: what one copy and one row are on the way.
            free_ns_L: (L,) how long this rank's link was free before each layer.
            ns_per_row: what computing one row cost this rank's experts in forward.
        """
        self._predictor.observe(load_LE)
        self._rows_L = load_LE.sum(1).tolist()
        if not self.profiling:
            return
        self._profile.append((free_ns_L, ns_per_row))
        if len(self._profile) < PROFILED_STEPS:
            return
        steps = self._profile[1:]
        mine = [int(median(free[layer] for free, _ in steps)) for layer in range(self._shape[0])]
        everyone = self._topology.gather_objects((mine, int(median(row for _, row in steps))))
        copy_ns = max(1, chunk_bytes * 10**9 // self._rate)
        if self.config.overlap_degree == "auto":
            self.overlap_degree_L = [
                int(median(free[layer] for free, _ in everyone)) // copy_ns for layer in range(self._shape[0])
            ]
        # Backward computes twice as much as forward. A row travels four times: there and back, and so its gradient.
        self._compute_ns = 3 * int(median(row for _, row in everyone))
        self._link_ns = 4 * row_bytes * 10**9 // self._rate
        self._copy_ns = (3 if self.config.mode == "fssdp-rm" else 2) * copy_ns
        self._profiled, self._profile = True, []

    def owners(self, owner_LE: Ints, slots_W: Ints, expert_bytes: int) -> Ints:
        """Owners for the loads expected now; the present ones if moving costs more time than it saves.

        Without measured times (a given overlap degree, copies by prediction alone) moving is taken to pay.

        Args:
            owner_LE: (L, E) the present owners.
            slots_W: (W,) experts that each rank shall own in all.
            expert_bytes: what one expert is on the way to a new owner, optimizer state included.
        """
        degree, load_LE = min(self.overlap_degree_L), self._predictor.predict()
        new_LE = plan_owners(load_LE, owner_LE, degree, slots_W, self._node_W)
        if not self._row_ns:
            return new_LE
        rows_LE = load_LE * np.array(self._rows_L)[:, None] // np.maximum(1, load_LE.sum(1, keepdims=True))
        pays = worth_moving(
            rows_LE,
            owner_LE,
            new_LE,
            degree,
            self._topology.world_size,
            steps=self.config.reshard_interval,
            ns_per_row=self._row_ns,
            ns_per_move=expert_bytes * 10**9 // self._rate,
        )
        return new_LE if pays else owner_LE

    @property
    def _rate(self) -> int:
        assert self.link is not None
        return min(self.link.bytes_per_s, self.link.node_bytes_per_s or self.link.bytes_per_s)

    # --- checkpoints ----------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """What a checkpoint must keep, in types that JSON has."""
        return {
            "predictor": self._predictor.state(),
            "link": None if self.link is None else asdict(self.link),
            "rows_L": self._rows_L,
            "overlap_degree_L": self.overlap_degree_L,
            "ns": [self._compute_ns, self._link_ns, self._copy_ns],
            "profile": self._profile,
            "profiled": self._profiled,
        }

    def load_state(self, state: Mapping[str, Any], *, same_ranks: bool) -> None:
        """Go on from a saved state: its loads if they are predicted alike, its times if as many ranks took them.

        Args:
            same_ranks: as many ranks as when it was saved.

        Raises:
            CheckpointError: the state is not what :meth:`state` gave for this model.
        """
        try:
            self._load_state(state, same_ranks)
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"the checkpoint's state of experts over ranks is damaged ({type(error).__name__}: {error});"
                " resume from an earlier checkpoint"
            ) from error

    def _load_state(self, state: Mapping[str, Any], same_ranks: bool) -> None:
        saved, here = state["predictor"], self._predictor.state()
        if (saved["kind"], saved["window"]) == (here["kind"], here["window"]):  # else it begins anew
            self._predictor.load_state(saved)
            self._rows_L = list(state["rows_L"])
        if not same_ranks:
            return
        if state["link"] is not None and self.config.link_mbit is None:
            self.link = LinkModel(**state["link"])
        if self._needs_profile:
            self._profile = [(list(free), row) for free, row in state["profile"]]
            self._profiled = state["profiled"]
            self._compute_ns, self._link_ns, self._copy_ns = state["ns"]
            if self.config.overlap_degree == "auto":
                self.overlap_degree_L = list(state["overlap_degree_L"])


def best_degree(rows_E: Ints, sharding: Placement, hidden: int, compute_ns: int, link_ns: int, copy_ns: int) -> int:
    """How many of the most loaded experts to copy everywhere: those whose copies hide, and more as long as they pay.

    The paper stops at what hides (arXiv:2502.02581, section 4.2). Where links are slow, tokens are what they carry
    most, and a copy that everybody waits for may save more rows than it costs. For each number of copied experts the
    layer's time is modelled: rows of the busiest rank, rows on the busiest link, and copies beyond the hidden ones.

    Args:
        rows_E: (E,) rows expected of each expert, over all ranks.
        hidden: copies that cost nothing.
        compute_ns, link_ns: of one row, where it is computed and on a link; forward and backward.
        copy_ns: of one copy on a link, its gradient included.

    Returns:
        At least ``hidden``; of equally good ones the smallest.
    """
    world, experts = sharding.world_size, sharding.num_experts
    order = np.argsort(-rows_E, kind="stable")
    owned_EW = np.zeros((experts + 1, world), dtype=np.int64)
    owned_EW[np.arange(1, experts + 1), sharding.owner_E[order]] = rows_E[order]
    gone_EW = owned_EW.cumsum(0)  # row t: what the t most loaded experts take off their owners
    left_EW = gone_EW[-1] - gone_EW
    computed_E = (left_EW + gone_EW.sum(1, keepdims=True) // world).max(1)
    received_EW, sent_EW = left_EW * (world - 1) // world, (left_EW.sum(1, keepdims=True) - left_EW) // world
    carried_E = np.maximum(received_EW, sent_EW).max(1)
    waited_E = np.maximum(np.arange(experts + 1) - hidden, 0)
    total_E = computed_E * compute_ns + carried_E * link_ns + waited_E * copy_ns
    return hidden + int(total_E[min(hidden, experts) :].argmin())
