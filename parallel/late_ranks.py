"""Who is late or gone: asked when a collective has failed, so that it costs nothing before.

gloo says only that some message did not come or that some connection broke. Every rank that has noticed leaves a mark
in the store in which the ranks met; those without a mark after a while are the ones that everybody waits for.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from contextlib import suppress

from torch.distributed import Store

PATIENCE_S = 5.0
"""How much later than this one other ranks may notice; ranks that wait for the same one enter at about one time."""


def late_ranks(store: Store, rank: int, world_size: int, patience_s: float = PATIENCE_S) -> list[int] | None:
    """Ranks that have not noticed that a collective failed; None if the store, kept on the first rank's node, is gone.

    Args:
        store: that all ranks share.
        rank: this one, which has noticed.
    """
    missing = [other for other in range(world_size) if other != rank]
    answered = threading.Event()

    def ask() -> None:
        deadline = time.monotonic() + patience_s
        with suppress(RuntimeError):  # the store's host is gone
            store.set(_mark(rank), "waiting")
            while missing:
                missing[:] = [other for other in missing if not store.check([_mark(other)])]
                answered.set()
                if time.monotonic() > deadline:
                    return
                time.sleep(0.1)

    # A store whose host hangs blocks whoever asks it, without a time limit.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(patience_s + 1)
    return sorted(missing) if answered.is_set() else None


def in_words(late: Sequence[int] | None) -> str:
    """One line on what :func:`late_ranks` found."""
    if late is None:
        return "the process that the ranks met at, on the node of rank 0, does not answer"
    if not late:
        return "all ranks answer now; one came later than parallel.timeout_s allows, or a link broke"
    names = ", ".join(map(str, late))
    return f"rank {names} does not answer" if len(late) == 1 else f"ranks {names} do not answer"


def _mark(rank: int) -> str:
    return f"moeyard/waiting/{rank}"
