"""spAG and spRS with real processes, against their definitions."""

from __future__ import annotations

import weakref

import numpy as np
import pytest
import torch

import parallel.collectives
from parallel.collectives import CommunicationError, Communicator
from parallel.exchange import ALGORITHMS, gather_schedule, reduce_schedule
from parallel.placement import Placement
from parallel.topology import Topology
from tests.harness import run_distributed

pytestmark = pytest.mark.distributed

DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.float16)


def chunk(expert: int, rank: int, size: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(100 * expert + rank)).to(dtype)


def random_placements(rng: np.random.Generator, world: int) -> tuple[Placement, Placement]:
    experts = int(rng.integers(1, 9))
    sharding = Placement(rng.integers(0, world, experts), world_size=world)
    more = rng.random((experts, world)) < rng.random()
    return sharding, Placement(sharding.owner_E, sharding.holders_EW | more)


def _both(topology: Topology, rounds: int) -> tuple[int, dict[str, int]]:
    rng, rank, world = np.random.default_rng(3), topology.rank, topology.world_size
    comm, formula = Communicator(topology), 0
    for i in range(rounds):
        sharding, wide = random_placements(rng, world)
        algorithm, pieces, size = ALGORITHMS[i % 4], int(rng.integers(1, 6)), int(rng.integers(1, 1000))
        dtype, node_W = DTYPES[i // 4 % 4], [r // 2 for r in range(world)]
        held = wide.held_by(rank)

        buffers = {e: torch.full((size,), float("nan"), dtype=dtype) for e in held}
        for e in sharding.held_by(rank):
            buffers[e] = chunk(e, int(sharding.owner_E[e]), size, dtype)
        comm.gather(gather_schedule(sharding, wide, algorithm, pieces, node_W), buffers).wait()
        for e in held:
            assert torch.equal(buffers[e], chunk(e, int(sharding.owner_E[e]), size, dtype)), "not a bit-copy"

        grads = {e: chunk(e, rank, size, dtype) for e in held}
        comm.reduce(reduce_schedule(wide, sharding, algorithm, pieces, node_W), grads).wait()
        for e in sharding.owned_by(rank):
            wanted = torch.stack([chunk(e, r, size, dtype).double() for r in wide.holders(e)]).sum(0)
            error = float((grads[e].double() - wanted).abs().max())
            assert error <= 32 * torch.finfo(dtype).eps, (dtype, error)
        formula += len(sharding.new_pairs(wide)) * size * dtype.itemsize
    totals = torch.tensor([comm.sent_bytes["spAG"], comm.sent_bytes["spRS"]])
    assert topology.sum_(totals).tolist() == [formula, formula]
    comm.close()
    return rounds, dict(comm.sent_bytes)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_copies_are_bit_equal_sums_are_right_and_bytes_follow_the_formula(world: int) -> None:
    results = run_distributed(_both, world, 64)
    assert [rounds for rounds, _ in results] == [64] * world


def _narrow_parts(topology: Topology, rounds: int) -> int:
    """Gradients of copies in bf16, sums in fp32 with hardly any memory for what is on the way."""
    parallel.collectives.STAGING_BYTES = 64
    rng, rank, world, widened = np.random.default_rng(5), topology.rank, topology.world_size, 0
    comm = Communicator(topology)
    for i in range(rounds):
        sharding, wide = random_placements(rng, world)
        pieces, size = int(rng.integers(1, 9)), int(rng.integers(1, 1000))
        narrow = {e: chunk(e, rank, size, torch.bfloat16) for e in wide.held_by(rank)}
        owned = set(sharding.owned_by(rank))
        chunks = {e: part.float() if e in owned else part.clone() for e, part in narrow.items()}
        schedule = reduce_schedule(wide, sharding, ALGORITHMS[i % 4], pieces, [r // 2 for r in range(world)])
        comm.reduce(schedule, chunks, dtype=torch.float32).wait()
        for e in owned:
            parts = torch.stack([chunk(e, r, size, torch.bfloat16).double() for r in wide.holders(e)])
            assert float((chunks[e].double() - parts.sum(0)).abs().max()) <= 32 * torch.finfo(torch.float32).eps
        assert all(torch.equal(chunks[e], narrow[e]) for e in chunks if e not in owned), "parts of copies stay"
        widened += len(sharding.new_pairs(wide)) * size * 4
    assert int(topology.sum_(torch.tensor(comm.sent_bytes["spRS"]))) == widened, "sums travel in fp32"
    comm.close()
    return rounds


@pytest.mark.parametrize("world", [2, 4])
def test_narrow_gradients_are_summed_in_fp32(world: int) -> None:
    assert run_distributed(_narrow_parts, world, 64) == [64] * world


def _lets_go(topology: Topology) -> bool:
    """Whoever has waited can count on the memory: the communicator keeps no chunk until its next job."""
    sharding = Placement([0], world_size=2)
    comm = Communicator(topology)
    chunks = {0: torch.ones(1000)}
    memory = weakref.ref(chunks[0].untyped_storage())
    comm.reduce(reduce_schedule(sharding.everywhere(), sharding, "flat", 1, [0, 0]), chunks).wait()
    del chunks
    gone = memory() is None
    comm.close()
    return gone


def test_a_finished_collective_keeps_no_chunk() -> None:
    assert run_distributed(_lets_go, 2) == [True, True]


def _same_bits_again(topology: Topology) -> bool:
    """The order of additions is the schedule's, whoever is late."""
    rank = topology.rank
    sharding = Placement([0, 1, 2], world_size=3)
    comm, first = Communicator(topology), None
    for late in range(6):
        if late % 3 == rank:
            import time

            time.sleep(0.05)
        grads = {e: chunk(e, rank, 4096, torch.float32) for e in range(3)}
        schedule = reduce_schedule(sharding.everywhere(), sharding, "flat", 3, [0, 0, 0])
        comm.reduce(schedule, grads).wait()
        first = grads[rank] if first is None else first
        assert torch.equal(first, grads[rank])
    comm.close()
    return True


def test_a_late_rank_changes_no_bit_of_a_sum() -> None:
    assert run_distributed(_same_bits_again, 3) == [True] * 3


def _many_at_once(topology: Topology) -> int:
    """Handles may be waited for in any order; collectives run in the order of their submission."""
    rank, world = topology.rank, topology.world_size
    sharding = Placement(list(range(world)), world_size=world)
    comm, flights = Communicator(topology), []
    for i in range(20):
        buffers = {e: torch.full((500,), float(i * 10 + e) if e == rank else float("nan")) for e in range(world)}
        schedule = gather_schedule(sharding, sharding.everywhere(), ALGORITHMS[i % 4], 2, [0] * world)
        flights.append((i, buffers, comm.gather(schedule, buffers, f"spAG {i}")))
    for i, buffers, handle in reversed(flights):
        handle.wait()
        assert all(bool((buffers[e] == i * 10 + e).all()) for e in range(world))
    log = comm.take_log()
    assert [handle.label for handle in log] == [f"spAG {i}" for i in range(20)]
    assert all(handle.began_s <= handle.ended_s for handle in log)
    assert all(0 <= handle.hidden_s <= handle.duration_s for handle in log)
    comm.close()
    return len(log)


def test_many_collectives_under_way_keep_their_order() -> None:
    assert run_distributed(_many_at_once, 2) == [20, 20]


def _peer_that_never_sends(topology: Topology) -> str:
    import time
    from datetime import timedelta

    import torch.distributed as dist

    group = dist.new_group(backend="gloo", timeout=timedelta(seconds=2))
    comm = Communicator(topology, group)
    sharding = Placement([0], world_size=2)
    schedule = gather_schedule(sharding, sharding.everywhere(), "flat", 1, [0, 0])
    if topology.rank == 0:
        time.sleep(4)  # alive, but late
        return "late"
    handle = comm.gather(schedule, {0: torch.empty(8)}, "spAG layer 3")
    begin = time.perf_counter()
    with pytest.raises(CommunicationError, match="spAG layer 3: rank 0 did not send expert 0") as caught:
        handle.wait()
    assert time.perf_counter() - begin < 3.5
    with pytest.raises(CommunicationError, match="spAG layer 4: not begun, because spAG layer 3: rank 0"):
        comm.gather(schedule, {0: torch.empty(8)}, "spAG layer 4").wait()
    return str(caught.value)


def test_a_peer_that_does_not_send_is_named_with_layer_and_collective() -> None:
    late, text = run_distributed(_peer_that_never_sends, 2)
    assert late == "late"
    assert "rank 0" in text
