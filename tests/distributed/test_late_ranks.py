"""A collective that fails names who is late or gone, whatever collective it is."""

from __future__ import annotations

import os
import signal
import time
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist
from torch import nn

from moe import Transformer
from moe.config import ModelConfig
from parallel.dense import GradientReducer
from parallel.dense_fsdp import ShardedDense
from parallel.late_ranks import in_words
from parallel.topology import Topology, connect
from tests.harness import RANKS, free_port

pytestmark = pytest.mark.distributed


Late = dict[int, float | Literal["stops", "dies"]]
Collective = Literal["sum", "buckets", "slices"]


def _train(topology: Topology, collective: Collective) -> None:
    if collective == "sum":
        dist.all_reduce(torch.ones(1))
    elif collective == "buckets":
        model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        reducer = GradientReducer(model.parameters(), topology, bucket_bytes=100)
        reducer.zero()
        reducer.expect(last=True)
        model(torch.ones(2, 8)).sum().backward()
        reducer.finish()
    else:
        dense = ModelConfig(vocab_size=16, dim=16, num_layers=2, num_heads=2, max_seq_len=8, num_dense_layers=2)
        transformer = Transformer(dense)
        transformer.init_weights(0)
        ShardedDense(transformer, topology)
        transformer(torch.ones(1, 8, dtype=torch.int64)).logits_BTV.sum().backward()


def _late_rank(rank: int, world: int, port: int, late: Late, collective: Collective, said: Any) -> None:
    """All ranks do ``collective``; those in ``late`` come that many seconds after the others, or never."""
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
            match late.get(rank):
                case "stops":
                    os.kill(os.getpid(), signal.SIGSTOP)
                case "dies":
                    os.kill(os.getpid(), signal.SIGKILL)
                case float(seconds):
                    time.sleep(seconds)
            _train(topology, collective)
    except RuntimeError as error:
        said.put((rank, getattr(error, "__notes__", []), time.monotonic() - begin))
        said.close()
        said.join_thread()


def words(world: int, late: Late, collective: Collective = "sum") -> dict[int, list[str]]:
    """What the ranks that are not late said."""
    said, port = RANKS.Queue(), free_port()
    processes = [
        RANKS.Process(target=_late_rank, args=(rank, world, port, late, collective, said)) for rank in range(world)
    ]
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


@pytest.mark.parametrize("late", [{1: 30.0}, {1: "stops", 2: "dies"}, {1: 30.0, 2: "stops"}, {3: "dies"}])
def test_those_who_wait_name_those_who_do_not_come(late: Late) -> None:
    told = words(4, late)
    assert set(told) == {0, 1, 2, 3} - set(late)
    assert all(notes == [in_words(sorted(late))] for notes in told.values()), told


@pytest.mark.parametrize("collective", ["buckets", "slices"])
def test_dense_parameters_name_the_late_rank_too(collective: Collective) -> None:
    assert words(3, {2: "stops"}, collective) == {0: [in_words([2])], 1: [in_words([2])]}


@pytest.mark.parametrize("end", ["stops", "dies"])
def test_the_host_of_the_meeting_point_may_be_the_one_that_is_gone(end: Literal["stops", "dies"]) -> None:
    told = words(3, {0: end})
    assert len(told) == 2
    assert all(notes == [in_words(None)] for notes in told.values()), told


def test_words() -> None:
    assert in_words([3]) == "rank 3 does not answer"
    assert in_words([1, 3]) == "ranks 1, 3 do not answer"
    assert "does not answer" in in_words(None)
    assert "parallel.timeout_s" in in_words([])
