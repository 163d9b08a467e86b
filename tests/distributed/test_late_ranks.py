"""A collective that times out names who is late, whatever collective it is."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist

from parallel.late_ranks import in_words
from parallel.topology import connect
from tests.harness import RANKS, free_port

pytestmark = pytest.mark.distributed


def _sum_with_a_late_rank(rank: int, world: int, port: int, late: dict[int, float], said: Any) -> None:
    """All ranks add up; those in ``late`` come that many seconds after the others, or stop for good."""
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(world),
        LOCAL_RANK=str(rank),
        LOCAL_WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    torch.set_num_threads(1)
    begin = time.monotonic()
    try:
        with connect(timeout_s=2.0) as topology:
            topology.barrier()
            if rank in late:
                if late[rank] == float("inf"):
                    os.kill(os.getpid(), signal.SIGSTOP)
                time.sleep(late[rank])
            dist.all_reduce(torch.ones(1))
    except RuntimeError as error:
        said.put((rank, getattr(error, "__notes__", []), time.monotonic() - begin))
        said.close()
        said.join_thread()


def words(world: int, late: dict[int, float]) -> dict[int, list[str]]:
    """What the ranks that are not late said."""
    said, port = RANKS.Queue(), free_port()
    processes = [RANKS.Process(target=_sum_with_a_late_rank, args=(r, world, port, late, said)) for r in range(world)]
    for process in processes:
        process.start()
    try:
        heard = [said.get(timeout=30) for _ in range(world - len(late))]
    finally:
        for process in processes:
            process.kill()
            process.join()
    assert all(seconds < 2 + 5 + 5 for _, _, seconds in heard), heard
    return {rank: notes for rank, notes, _ in heard}


@pytest.mark.parametrize("late", [{1: 30.0}, {1: float("inf")}, {1: 30.0, 2: float("inf")}])
def test_those_who_wait_name_those_who_do_not_come(late: dict[int, float]) -> None:
    told = words(4, late)
    assert set(told) == {0, 1, 2, 3} - set(late)
    assert all(notes == [in_words(sorted(late))] for notes in told.values()), told


def test_the_host_of_the_meeting_point_may_be_the_one_that_hangs() -> None:
    told = words(3, {0: float("inf")})
    assert all(notes == [in_words(None)] for notes in told.values()), told


def test_words() -> None:
    assert in_words([3]) == "rank 3 does not answer"
    assert in_words([1, 3]) == "ranks 1, 3 do not answer"
    assert "does not answer" in in_words(None)
    assert "parallel.timeout_s" in in_words([])
