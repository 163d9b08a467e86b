"""What the links between ranks do, measured: latency and rate inside a node and between nodes.

A few short sparse all-gathers while nothing else runs, of growing size, until one takes long enough to be timed. All
ranks take part and come to the same integers.
"""

from __future__ import annotations

import torch

from parallel.collectives import Communicator
from parallel.exchange import MAX_PIECES, LinkModel, Schedule, gather_schedule
from parallel.placement import Placement
from parallel.topology import Topology

LONG_ENOUGH_NS = 30_000_000
SMALL_BYTES = 16 * 1024
MOST_BYTES = 16 * 2**20
REPEATS = 3
SHORTEST_NS = 20_000
"""No message costs less; a measurement that says so saw noise."""
MESSAGE_NS = 100_000
"""What a message is taken to cost where only the rate is known: about what gloo's costs over loopback and Ethernet."""
UNLIMITED = LinkModel(latency_ns=1_000, bytes_per_s=10**12)
"""For a world of one rank, which has no link."""


def measure_link(comm: Communicator, topology: Topology, node_W: list[int]) -> LinkModel:
    """Latency and rate of each rank's link and of each node's, under traffic of all ranks at once.

    Every rank sends to one neighbour and receives from another: inside its node for the rank's link, in the next node
    for the node's. What it sends is not counted.
    """
    counted = comm.sent_bytes.copy()
    try:
        return _measure_all(comm, topology, node_W)
    finally:
        comm.sent_bytes = counted
        comm.take_log()


def _measure_all(comm: Communicator, topology: Topology, node_W: list[int]) -> LinkModel:
    world, nodes = topology.world_size, max(node_W) + 1
    if world == 1:
        return UNLIMITED
    members = [[rank for rank in range(world) if node_W[rank] == node] for node in range(nodes)]
    near = {ranks[i]: ranks[(i + 1) % len(ranks)] for ranks in members for i in range(len(ranks))}
    far = {
        ranks[i]: members[(node + 1) % nodes][i % len(members[(node + 1) % nodes])]
        for node, ranks in enumerate(members)
        for i in range(len(ranks))
    }
    inside = _measure(comm, topology, near, node_W) if any(near[r] != r for r in near) else None
    between = _measure(comm, topology, far, node_W) if nodes > 1 else None
    if inside is None:
        assert between is not None
        return LinkModel(*between)
    if between is None:
        return LinkModel(*inside)
    shared = min(len(ranks) for ranks in members)
    return LinkModel(max(inside[0], between[0]), inside[1], between[1] * shared)


def _measure(comm: Communicator, topology: Topology, peer: dict[int, int], node_W: list[int]) -> tuple[int, int]:
    """(ns of a further message, bytes per second) of every rank sending to ``peer[rank]`` at the same time."""
    world = topology.world_size
    sharding = Placement(list(range(world)), world_size=world)
    target = sharding.with_copies((rank, to) for rank, to in peer.items())
    whole = gather_schedule(sharding, target, "flat", 1, node_W)
    size = SMALL_BYTES
    took_ns = small_ns = _best_ns(comm, topology, whole, target, SMALL_BYTES)
    while took_ns < LONG_ENOUGH_NS and size < MOST_BYTES:
        size *= 4
        took_ns = _best_ns(comm, topology, whole, target, size)
    cut = gather_schedule(sharding, target, "flat", MAX_PIECES, node_W)
    message_ns = (_best_ns(comm, topology, cut, target, size) - took_ns) // (MAX_PIECES - 1)
    if size == SMALL_BYTES:  # a link so slow that even the small chunk takes long
        return max(SHORTEST_NS, message_ns), max(1, SMALL_BYTES * 10**9 // took_ns)
    rate = (size - SMALL_BYTES) * 10**9 // max(1, took_ns - small_ns)
    return max(SHORTEST_NS, message_ns), max(1, rate)


def _best_ns(comm: Communicator, topology: Topology, schedule: Schedule, target: Placement, size: int) -> int:
    """Nanoseconds on the slowest rank, the best of a few tries."""
    held = target.held_by(topology.rank)
    chunks = {expert: torch.zeros(size, dtype=torch.uint8, device=topology.device) for expert in held}
    tries = []
    for _ in range(REPEATS):
        topology.barrier()
        handle = comm.gather(schedule, chunks, "link profile")
        handle.wait()
        tries.append(max(int(ns) for ns in topology.gather_objects(round(handle.duration_s * 1e9))))
    return min(tries)
