"""Which experts get copies in this step: the mode's rule, fed with loads, link and compute times.

Everything that a decision depends on is an integer that all ranks share: global loads, and measurements of the first
steps that the ranks have agreed on. So all ranks decide alike without talking, and a resumed run decides as the
uninterrupted one, because the state is part of the checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from statistics import median
from typing import Any

from parallel.config import ParallelConfig
from parallel.exchange import LinkModel
from parallel.load_predictor import build_predictor
from parallel.placement import Ints, Placement
from parallel.planner import plan_copies, plan_more_copies, plan_spill
from parallel.sharder import plan_owners
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
        self._ns_per_row = 0
        self._ns_per_copy = 0
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
        if mode == "ep" or self.config.planner == "spill":
            return list(shardings)
        load_LE = self._predictor.predict()
        return [
            plan_copies(sharding, load_E, degree, self._max_copies, self._node_W)
            for sharding, load_E, degree in zip(shardings, load_LE, self.overlap_degree_L, strict=True)
        ]

    def after_gate(self, layer: int, placement: Placement, count_WE: Ints) -> tuple[Placement, Ints | None]:
        """The layer's placement now that the loads of this micro-batch are known.

        Returns:
            The placement, and the (E, W) rows of each expert that each rank shall compute if the policy says that too.
        """
        load_E = count_WE.sum(0)
        if self.config.planner == "spill":
            # A copy that moves fewer rows than it costs in time is not worth it.
            least = -(-self._ns_per_copy // self._ns_per_row) if self._ns_per_row else 1
            spill = plan_spill(placement.sharding(), load_E, self._max_copies, min_rows=least)
            return spill.placement, spill.quota_EW
        degree, times = self.overlap_degree_L[layer], (self._ns_per_row, self._ns_per_copy)
        more = plan_more_copies(
            placement, load_E, degree, self._max_copies, self._node_W, ns_per_row=times[0], ns_per_copy=times[1]
        )
        return more, None

    def after_step(self, load_LE: Ints, chunk_bytes: int, free_ns_L: list[int], ns_per_row: int) -> None:
        """Take notice of a step. Collective while :attr:`profiling`.

        Args:
            load_LE: (L, E) global loads.
            chunk_bytes: what one copy is on the way.
            free_ns_L: (L,) how long this rank's link was free before each layer.
            ns_per_row: what one row cost this rank's experts in forward.
        """
        self._predictor.observe(load_LE)
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
        # Backward costs twice the forward; a copy's gradient travels as long as the copy.
        self._ns_per_row, self._ns_per_copy = 3 * int(median(row for _, row in everyone)), 2 * copy_ns
        self._profiled, self._profile = True, []

    def owners(self, owner_LE: Ints, slots_W: Ints) -> Ints:
        """(L, E) owners for the loads expected now, each rank owning ``slots_W`` (W,) experts in all."""
        degree = min(self.overlap_degree_L)
        return plan_owners(self._predictor.predict(), owner_LE, degree, slots_W, self._node_W)

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
            "overlap_degree_L": self.overlap_degree_L,
            "ns_per_row": self._ns_per_row,
            "ns_per_copy": self._ns_per_copy,
            "profile": self._profile,
            "profiled": self._profiled,
        }

    def load_state(self, state: Mapping[str, Any], *, same_ranks: bool) -> None:
        """Go on from a saved state: its loads if they are predicted alike, its times if as many ranks took them.

        Args:
            same_ranks: as many ranks as when it was saved.
        """
        with suppress(ValueError):  # another predictor now: it begins anew
            self._predictor.load_state(state["predictor"])
        if not same_ranks:
            return
        if state["link"] is not None and self.config.link_mbit is None:
            self.link = LinkModel(**state["link"])
        if self._needs_profile:
            self._profile = [(list(free), row) for free, row in state["profile"]]
            self._profiled = state["profiled"]
            self._ns_per_row, self._ns_per_copy = state["ns_per_row"], state["ns_per_copy"]
            if self.config.overlap_degree == "auto":
                self.overlap_degree_L = list(state["overlap_degree_L"])
