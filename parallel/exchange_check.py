"""Proof of a schedule on one process: every send meets its receive, every byte travels once, nothing deadlocks.

Works on what each rank would do by itself, so that a rank deriving another schedule than its peers is found too.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np

from parallel.exchange import Transfer
from parallel.placement import Placement


class ScheduleError(AssertionError):
    """A schedule that would hang, lose data or send something twice."""


def check_schedule(
    of_rank: Mapping[int, Sequence[Transfer]], source: Placement, target: Placement, pieces: int, *, reduces: bool
) -> None:
    """Run a schedule in the mind, in the strictest way that any backend runs it, and compare with what it is for.

    Strictest: a rank begins a round only when its earlier ones are over; and messages between two ranks have no
    names, so that the n-th send of a round from a to b is what b's n-th receive of that round from a gets (NCCL).

    Args:
        of_rank: each rank's own list of transfers.
        source, target: for spAG the placements before and after; for spRS too, ``source`` being the wider one.
        pieces: parts of a chunk.
        reduces: False for spAG, True for spRS.

    Raises:
        ScheduleError: with the rank, round, expert and piece.
    """
    narrow, wide = (target, source) if reduces else (source, target)
    moves = narrow.new_pairs(wide)
    gets = set(moves)
    adds_up = {expert: [int(wide.owner_E[expert])] for expert, _ in moves}  # spRS: whose values the owner ends with
    for expert, rank in moves:
        adds_up[expert].append(rank)
    begins = [(e, r) for e, ranks in adds_up.items() for r in ranks] if reduces else np.argwhere(narrow.holders_EW)
    # (rank, expert, piece) -> ranks whose value is in it. A copy that an spRS leaves where it is has no part in it.
    has = {(int(rank), int(expert), piece): [int(rank)] for expert, rank in begins for piece in range(pieces)}
    rounds: dict[int, dict[int, list[Transfer]]] = defaultdict(dict)
    for rank, transfers in of_rank.items():
        if list(transfers) != sorted(transfers):
            raise ScheduleError(f"rank {rank} does not keep the canonical order")
        for transfer in transfers:
            if rank not in (transfer.src, transfer.dst):
                raise ScheduleError(f"rank {rank} lists {transfer}, which is not its own")
            rounds[transfer.round].setdefault(rank, []).append(transfer)
    left: set[tuple[int, int, int]] = set()  # reduction: values that were sent on
    for _, ranks in sorted(rounds.items()):
        arrivals: list[tuple[Transfer, list[int]]] = []
        _check_matched(ranks)
        for rank, transfers in ranks.items():
            for t in transfers:
                if t.src != rank:
                    continue
                key = (rank, t.expert, t.piece)
                if key not in has:
                    raise ScheduleError(f"{t}: rank {rank} has no such piece to send before this round")
                if reduces and key in left:
                    raise ScheduleError(f"{t}: rank {rank} has given that piece away")
                if reduces:
                    left.add(key)
                arrivals.append((t, list(has[key])))
        for t, value in arrivals:
            key = (t.dst, t.expert, t.piece)
            if not reduces and key in has:
                raise ScheduleError(f"{t}: rank {t.dst} has that piece already")
            if not reduces and (t.expert, t.dst) not in gets:
                raise ScheduleError(f"{t}: rank {t.dst} is not to get that expert")
            if reduces and (key not in has or key in left):
                raise ScheduleError(f"{t}: rank {t.dst} cannot add to that piece any more")
            has[key] = has.get(key, []) + value
    for expert, rank in [(e, int(wide.owner_E[e])) for e in adds_up] if reduces else moves:
        for piece in range(pieces):
            got = sorted(has.get((rank, expert, piece), []))
            if not got or (reduces and got != sorted(adds_up[expert])):
                raise ScheduleError(f"expert {expert} piece {piece}: rank {rank} ends with the values of ranks {got}")


def _check_matched(ranks: Mapping[int, Sequence[Transfer]]) -> None:
    sends: dict[tuple[int, int], list[Transfer]] = defaultdict(list)
    receives: dict[tuple[int, int], list[Transfer]] = defaultdict(list)
    for rank, transfers in ranks.items():
        for t in transfers:
            if t.src == rank:
                sends[t.src, t.dst].append(t)
            if t.dst == rank:
                receives[t.src, t.dst].append(t)
    for src, dst in sorted(sends.keys() | receives.keys()):
        if sends[src, dst] != receives[src, dst]:
            raise ScheduleError(f"rank {src} sends {sends[src, dst]} to rank {dst}, which expects {receives[src, dst]}")
