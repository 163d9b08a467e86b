"""Who holds which expert: the algebra that sharding, copying and reducing are said in.

A placement says for every expert of one layer which rank owns it (parameters, optimizer state) and which ranks hold it
while the layer runs. A sharding P is the placement in which only owners hold; a materialised placement P' adds
short-lived copies. ``sparse_all_gather(P, P')`` makes the copies, ``sparse_reduce_scatter(P', P)`` brings their
gradients home. With P' = P this is expert parallelism, with P' = everything fully sharded data parallelism.

Pure data on integers: no process group, no floats, the same on every rank.
Shape suffixes: E experts of a layer, W ranks, L layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


class PlacementError(ValueError):
    """The placement cannot be: an expert without an owner, an unknown rank, or a copy that nobody can make."""


class Placement:
    """Owner and holders of each expert of one layer. Immutable; equal when all pairs are.

    Args:
        owner_E: (E,) rank that owns each expert.
        holders_EW: (E, W) bool, True where the rank holds the expert; owners must. None: owners alone.
        world_size: W; needed when ``holders_EW`` is None.

    Raises:
        PlacementError: an owner is no rank of this world, or does not hold what it owns; or a shape is wrong.
    """

    def __init__(
        self, owner_E: Sequence[int] | Ints, holders_EW: Any | None = None, *, world_size: int | None = None
    ) -> None:
        owner_E = np.array(owner_E, dtype=np.int64)
        if holders_EW is None:
            if world_size is None:
                raise PlacementError("a placement without holders_EW needs world_size")
            held = np.zeros((owner_E.size, world_size), dtype=np.bool_)
        else:
            held = np.array(holders_EW, dtype=np.bool_)
        if owner_E.ndim != 1 or held.ndim != 2 or held.shape[0] != owner_E.size:
            raise PlacementError(
                f"owner_E has shape {owner_E.shape}, holders_EW {held.shape}; they must be (E,), (E, W)"
            )
        if world_size is not None and held.shape[1] != world_size:
            raise PlacementError(f"holders_EW has {held.shape[1]} ranks, the world has {world_size}")
        ranks = held.shape[1]
        for expert in np.flatnonzero((owner_E < 0) | (owner_E >= ranks))[:1]:
            what = "has no owner" if owner_E[expert] < 0 else f"is owned by rank {owner_E[expert]}"
            raise PlacementError(f"expert {expert} {what}; ranks are 0 to {ranks - 1}")
        experts = np.arange(owner_E.size)
        if holders_EW is None:
            held[experts, owner_E] = True
        for expert in np.flatnonzero(~held[experts, owner_E])[:1]:
            raise PlacementError(f"rank {owner_E[expert]} owns expert {expert} but is not among its holders")
        owner_E.flags.writeable = held.flags.writeable = False
        self.owner_E: Ints = owner_E
        self.holders_EW: Bools = held

    @property
    def num_experts(self) -> int:
        return self.owner_E.size

    @property
    def world_size(self) -> int:
        return int(self.holders_EW.shape[1])

    @cached_property
    def copies_E(self) -> Ints:
        """(E,) short-lived copies of each expert, the owner's not counted."""
        return _read_only(self.holders_EW.sum(1) - 1)

    @cached_property
    def copies_W(self) -> Ints:
        """(W,) copies on each rank, owned experts not counted."""
        return _read_only(self.holders_EW.sum(0) - self.owned_W)

    @cached_property
    def owned_W(self) -> Ints:
        """(W,) experts that each rank owns."""
        return _read_only(np.bincount(self.owner_E, minlength=self.world_size))

    def owned_by(self, rank: int) -> list[int]:
        """Experts that ``rank`` owns, ascending."""
        return np.flatnonzero(self.owner_E == rank).tolist()

    def copied_to(self, rank: int) -> list[int]:
        """Experts that ``rank`` holds without owning them, ascending."""
        return np.flatnonzero(self.holders_EW[:, rank] & (self.owner_E != rank)).tolist()

    def held_by(self, rank: int) -> list[int]:
        """Experts that ``rank`` computes, in the order of its rows: owned ones first, then copies."""
        return self.owned_by(rank) + self.copied_to(rank)

    def holders(self, expert: int) -> list[int]:
        """Ranks that hold ``expert``, ascending."""
        return np.flatnonzero(self.holders_EW[expert]).tolist()

    def sharding(self) -> Placement:
        """The same owners without any copy."""
        return Placement(self.owner_E, world_size=self.world_size)

    def everywhere(self) -> Placement:
        """The same owners with every expert on every rank."""
        return Placement(self.owner_E, np.ones_like(self.holders_EW))

    def with_copies(self, pairs: Iterable[tuple[int, int]]) -> Placement:
        """These holders and the (expert, rank) pairs given.

        Raises:
            PlacementError: a pair names an unknown expert or rank.
        """
        held = self.holders_EW.copy()
        for expert, rank in pairs:
            if not (0 <= expert < self.num_experts and 0 <= rank < self.world_size):
                raise PlacementError(
                    f"no copy of expert {expert} on rank {rank}: there are {self.num_experts} experts"
                    f" and {self.world_size} ranks"
                )
            held[expert, rank] = True
        return Placement(self.owner_E, held)

    def union(self, other: Placement) -> Placement:
        """Every pair of either. Materialising P' and then P'' leaves their union.

        Raises:
            PlacementError: they have other owners.
        """
        _check_same_owners(self, other)
        return Placement(self.owner_E, self.holders_EW | other.holders_EW)

    def new_pairs(self, target: Placement) -> list[tuple[int, int]]:
        """(expert, rank) pairs that ``target`` has beyond this: what an spAG from here to there must send, by expert.

        Raises:
            PlacementError: they have other owners, or ``target`` lacks a pair of this.
        """
        check_materialises(self, target)
        return [(int(e), int(r)) for e, r in np.argwhere(target.holders_EW & ~self.holders_EW)]

    def gather_bytes_W(self, target: Placement, chunk_bytes: int) -> Ints:
        """(W,) bytes that each rank receives in an spAG from here to ``target``; whatever route they take.

        Raises:
            PlacementError: they have other owners, or ``target`` lacks a pair of this.
        """
        check_materialises(self, target)
        received_W: Ints = (target.holders_EW & ~self.holders_EW).sum(0) * chunk_bytes
        return received_W

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Placement)
            and np.array_equal(self.owner_E, other.owner_E)
            and np.array_equal(self.holders_EW, other.holders_EW)
        )

    def __hash__(self) -> int:
        return hash((self.owner_E.tobytes(), self.holders_EW.tobytes()))

    def __repr__(self) -> str:
        copies = {
            int(e): [r for r in self.holders(int(e)) if r != self.owner_E[e]] for e in np.flatnonzero(self.copies_E)
        }
        return f"Placement(owner_E={self.owner_E.tolist()}, copies={copies}, world_size={self.world_size})"


def _read_only(counts: Ints) -> Ints:
    # Counts are computed once and shared: whoever writes to them would change the placement for all.
    counts.flags.writeable = False
    return counts


def check_materialises(source: Placement, target: Placement) -> None:
    """Raise :class:`PlacementError` unless ``target`` is ``source`` with copies added, so that spAG and spRS exist."""
    _check_same_owners(source, target)
    lost = np.argwhere(source.holders_EW & ~target.holders_EW)
    if len(lost):
        expert, rank = lost[0]
        raise PlacementError(f"the target placement lacks expert {expert} on rank {rank}, which the source has")


def _check_same_owners(one: Placement, other: Placement) -> None:
    if one.holders_EW.shape != other.holders_EW.shape:
        raise PlacementError(
            f"one placement has {one.num_experts} experts on {one.world_size} ranks,"
            f" the other {other.num_experts} on {other.world_size}"
        )
    for expert in np.flatnonzero(one.owner_E != other.owner_E)[:1]:
        raise PlacementError(
            f"expert {expert} is owned by rank {one.owner_E[expert]} in one placement"
            f" and by rank {other.owner_E[expert]} in the other"
        )


def even_owners(num_layers: int, num_experts: int, world_size: int) -> Ints:
    """(L, E) owners, the homogeneous sharding that training begins with: blocks of consecutive experts.

    Where W does not divide E, some ranks own one expert more than others in a layer; which ones moves on from layer to
    layer, so that over all layers no rank owns more than one expert more than another.
    """
    owner_LE = np.empty((num_layers, num_experts), dtype=np.int64)
    base, extra = divmod(num_experts, world_size)
    for layer in range(num_layers):
        size_W = np.full(world_size, base)
        size_W[(layer * extra + np.arange(extra)) % world_size] += 1
        owner_LE[layer] = np.repeat(np.arange(world_size), size_W)
    return owner_LE
