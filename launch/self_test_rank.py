"""One rank of ``moeyard doctor``'s self test: join a group, add, exchange, compare, say so as one line of JSON.

Runs as a file, with torchrun's environment variables set.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # run as a file: the clone's packages come first, and launch/ itself is no import path
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import json

import torch
import torch.distributed as dist

from parallel.topology import connect

NUMBERS = 100_000


def main() -> int:
    """Exit code 0 when every collective gave what arithmetic says."""
    with connect(timeout_s=float(sys.argv[1])) as topology:
        rank, world = topology.rank, topology.world_size
        total = topology.sum_(torch.full((NUMBERS,), rank + 1, device=topology.device))
        added = bool((total == world * (world + 1) // 2).all())
        got = torch.empty(NUMBERS)
        mine, neighbour = torch.full((NUMBERS,), float(rank)), (rank + 1) % world
        requests = dist.batch_isend_irecv(
            [dist.P2POp(dist.isend, mine, neighbour), dist.P2POp(dist.irecv, got, (rank - 1) % world)]
        )
        for request in requests:
            request.wait()
        exchanged = bool((got == (rank - 1) % world).all())
        everyone = topology.gather_objects(rank) == list(range(world))
    result = {"all_reduce": added, "send_receive": exchanged, "gather": everyone}
    print(json.dumps({"rank": rank, "device": str(topology.device), **result}), flush=True)
    return 0 if all(result.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
