"""Sparse collectives beside gloo's own, as shares of the link.

    python -m benchmarks.cluster.run --nodes 4 --ranks-per-node 1 --inter-mbit 200 --cpu 0.45 -- \
        python benchmarks/sparse_collectives.py --link-mbit 200

Each pair moves the same bytes, one after the other in every round, so that both see the same machine. The share is the
time that the busiest link needs for its bytes over the time that it took, the slowest rank counting.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from parallel.collectives import Communicator
from parallel.exchange import LinkModel, Schedule, choose_schedule, gather_schedule
from parallel.link_profile import measure_link
from parallel.placement import Placement
from parallel.token_dispatch import RowExchange
from parallel.topology import Topology, connect


class Case:
    """Two ways to move the same bytes, the bytes that the busiest link must carry, and all bytes by the formula."""

    def __init__(
        self, name: str, ours: Callable[[], None], gloo: Callable[[], None], busiest_bytes: int, all_bytes: int
    ) -> None:
        self.name, self.ours, self.gloo = name, ours, gloo
        self.busiest_bytes, self.all_bytes = busiest_bytes, all_bytes


def density_one(topology: Topology, comm: Communicator, numel: int, schedule: Schedule) -> list[Case]:
    """Every expert to every rank, and back; one expert a rank."""
    world = topology.world_size
    chunks = torch.randn(world, numel)
    whole, own = torch.randn(world * numel), torch.randn(numel)

    def ours() -> None:
        comm.gather(schedule, dict(enumerate(chunks))).wait()

    def gloo() -> None:
        dist.all_gather_into_tensor(whole, own)

    def ours_back() -> None:
        comm.reduce(schedule.reversed(), dict(enumerate(chunks))).wait()

    def gloo_back() -> None:
        dist.reduce_scatter_tensor(own, whole)

    busiest = (world - 1) * numel * 4
    return [
        Case(f"spAG, density 1 ({schedule.algorithm}) | all_gather_into_tensor", ours, gloo, busiest, busiest * world),
        Case(
            f"spRS, density 1 ({schedule.algorithm}) | reduce_scatter_tensor",
            ours_back,
            gloo_back,
            busiest,
            busiest * world,
        ),
    ]


def one_hot(topology: Topology, comm: Communicator, numel: int, schedule: Schedule) -> list[Case]:
    """One expert of rank 0 to all ranks."""
    chunk = torch.randn(numel)

    def ours() -> None:
        comm.gather(schedule, {0: chunk}).wait()

    def gloo() -> None:
        dist.broadcast(chunk, 0)

    name = f"one hot expert to all ({schedule.algorithm}, {schedule.pieces} pieces) | broadcast"
    return [Case(name, ours, gloo, numel * 4, numel * 4 * (topology.world_size - 1))]


def tokens(topology: Topology, exchange: RowExchange, rows: int, width: int) -> list[Case]:
    """Uneven rows: rank 0 is the straggler that gets most."""
    world, rank = topology.world_size, topology.rank
    sent_WW = torch.full((world, world), rows // 4, dtype=torch.int64)
    sent_WW[:, 0] = rows
    sent_WW += torch.arange(world).outer(torch.arange(world)) * (rows // 50)
    outgoing = torch.randn(int(sent_WW[rank].sum()), width)
    sent_W, received_W = sent_WW[rank].tolist(), sent_WW[:, rank].tolist()
    came = torch.empty(sum(received_W), width)

    def ours() -> None:
        exchange.rows(outgoing, sent_W, received_W, "rows")

    def gloo() -> None:
        dist.all_to_all_single(came, outgoing, received_W, sent_W)

    away = sent_WW.clone().fill_diagonal_(0)
    busiest = int(torch.cat([away.sum(0), away.sum(1)]).max()) * width * 4
    return [Case("token exchange, uneven | all_to_all_single", ours, gloo, busiest, int(away.sum()) * width * 4)]


def timed(topology: Topology, run: Callable[[], None]) -> float:
    """Seconds of the slowest rank."""
    topology.barrier()
    begin = time.perf_counter()
    run()
    slowest: float = max(topology.gather_objects(time.perf_counter() - begin))
    return slowest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--link-mbit", type=float, required=True, help="rate of each rank's link")
    parser.add_argument("--mib", type=float, default=4.0, help="size of an expert")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--algorithm", default="auto", help="auto, flat, chain, tree or two_level")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with connect(120) as topology:
        world = topology.world_size
        node_W = [rank // topology.local_world_size for rank in range(world)]
        comm, exchange = Communicator(topology), RowExchange(topology)
        link = measure_link(comm, topology, node_W)
        numel = int(args.mib * 2**18)
        everyone = Placement(list(range(world)), world_size=world)
        hot = Placement([0], world_size=world)

        def schedule(sharding: Placement) -> Schedule:
            if args.algorithm == "auto":
                return choose_schedule(sharding, sharding.everywhere(), numel * 4, link, node_W)
            return gather_schedule(sharding, sharding.everywhere(), args.algorithm, 8, node_W)

        cases = [
            *density_one(topology, comm, numel, schedule(everyone)),
            *one_hot(topology, comm, numel, schedule(hot)),
            *tokens(topology, exchange, 2000, 256),
        ]
        results = [measure(topology, case, args.rounds, args.link_mbit) for case in cases]
        if topology.is_first:
            report(results, link, args.json)
        comm.close()


def interface_bytes() -> int:
    """What this rank's network interface has sent so far, headers included."""
    name = os.environ.get("GLOO_SOCKET_IFNAME", "lo")
    return int(Path(f"/sys/class/net/{name}/statistics/tx_bytes").read_text())


def measure(topology: Topology, case: Case, rounds: int, link_mbit: float) -> dict[str, object]:
    """Shares of the link, how many times as fast, and bytes on the wire, over interleaved rounds."""
    seconds: dict[str, list[float]] = {"ours": [], "gloo": []}
    wire = 0
    for index in range(rounds + 1):
        for name, run in (("ours", case.ours), ("gloo", case.gloo)):
            before = interface_bytes()
            seconds[name].append(timed(topology, run))
            if index and name == "ours":
                wire += interface_bytes() - before
        if index == 0:  # the first round warms connections up
            seconds = {"ours": [], "gloo": []}
    on_the_wire = sum(topology.gather_objects(wire)) / rounds
    ideal_s = case.busiest_bytes * 8 / (link_mbit * 1e6)
    ratios = [gloo / ours for ours, gloo in zip(seconds["ours"], seconds["gloo"], strict=True)]
    return {
        "case": case.name,
        "ours_share": ideal_s / median(seconds["ours"]),
        "gloo_share": ideal_s / median(seconds["gloo"]),
        "wire_over_formula": on_the_wire / case.all_bytes,
        "times_as_fast": median(ratios),
        "spread": [min(ratios), max(ratios)],
    }


def report(results: list[dict[str, object]], link: LinkModel, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"link": link.__dict__, "cases": results}))
        return
    print(f"measured link: {link}")
    print(f"{'case':70} {'ours':>6} {'gloo':>6}  bytes on the wire  times as fast")
    for r in results:
        low, high = r["spread"]  # type: ignore[misc]
        print(
            f"{r['case']:70} {r['ours_share']:6.1%} {r['gloo_share']:6.1%}  {r['wire_over_formula']:17.3f}"
            f"  {r['times_as_fast']:.2f} ({low:.2f} to {high:.2f})"
        )


if __name__ == "__main__":
    main()
