"""The program of an expert worker: ``python -m launch.expert_worker --rank 1 --port P --parent PID``.

Started by :mod:`launch.serve_gang`, never by people. It meets rank 0 in a store on loopback, reads the experts that
it owns, and computes until it is told to stop. It outlives nobody: when its parent is gone or a connection is lost,
it ends.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import threading
import time
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from moe.errors import UserError
from parallel.gang_link import GangError, GangLink
from parallel.gang_member import GangMember
from parallel.gang_weights import read_held_experts
from parallel.gang_worker import ExpertWorker
from parallel.placement import Placement

PARENT_S = 0.5
"""How often a worker looks whether its parent lives."""
LOST_EXIT_CODE = 3


@dataclass(frozen=True)
class GangSpec:
    """What rank 0 tells all workers once, as JSON through the store.

    Attributes:
        model_dir, fingerprint: where the weights are, and which ones rank 0 has read.
        blocks, dim, hidden_dim, dtype, packed, native, batch_invariant: of the model as rank 0 holds and computes it.
        device: "cpu" or "cuda".
        threads: compute threads of each worker.
        owner_LE: (L, E) rank that owns each expert.
        world_size: W.
        connect_s: how long connecting may take.
    """

    model_dir: str
    fingerprint: str
    blocks: list[int]
    dim: int
    hidden_dim: int
    dtype: str
    packed: bool
    native: bool
    batch_invariant: bool
    device: str
    threads: int
    owner_LE: list[list[int]]
    world_size: int
    connect_s: float

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: bytes) -> GangSpec:
        return GangSpec(**json.loads(text))


SPEC_KEY = "gang/spec"


def ready_key(rank: int) -> str:
    """Set in the store when the rank has its weights and is about to connect."""
    return f"gang/ready/{rank}"


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code; whatever goes wrong is one line on stderr."""
    parser = argparse.ArgumentParser(prog="python -m launch.expert_worker")
    for name in ("rank", "port", "parent"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--wait-s", type=float, default=600.0, help="for rank 0 to have loaded the model")
    options = parser.parse_args(arguments)
    # Ctrl-C goes to the whole terminal; rank 0 decides when its workers end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, args=(options.parent,), daemon=True).start()
    try:
        _work(options.rank, options.port, options.wait_s)
    except GangError as error:
        print(f"error: {error}", file=sys.stderr)
        return LOST_EXIT_CODE
    except (UserError, OSError, RuntimeError, MemoryError) as error:
        print(f"error: {' '.join(str(error).split()) or type(error).__name__}", file=sys.stderr)
        return 1
    return 0


def _work(rank: int, port: int, wait_s: float) -> None:
    store = dist.TCPStore("127.0.0.1", port, None, False, timedelta(seconds=wait_s), wait_for_workers=False)
    spec = GangSpec.from_json(store.get(SPEC_KEY))
    torch.set_num_threads(spec.threads)
    device = torch.device(spec.device) if spec.device == "cpu" else torch.device("cuda", rank)
    placements = [Placement(owner_E, world_size=spec.world_size) for owner_E in spec.owner_LE]
    dtype: torch.dtype = getattr(torch, spec.dtype)
    banks = read_held_experts(
        Path(spec.model_dir),
        spec.blocks,
        [placement.owned_by(rank) for placement in placements],
        spec.dim,
        spec.hidden_dim,
        dtype=dtype,
        device=device,
        packed=spec.packed,
        native=spec.native,
        batch_invariant=spec.batch_invariant,
    )
    _check_same_weights(spec)
    store.set(ready_key(rank), "ready")
    link = GangLink(store, rank, spec.world_size, device, timeout_s=None, connect_s=spec.connect_s)
    member = GangMember(link, banks, placements)
    ExpertWorker(member, link, dtype, spec.dim, batch_invariant=spec.batch_invariant).run()


def _check_same_weights(spec: GangSpec) -> None:
    from serve.engine.model_files import weights_fingerprint

    if weights_fingerprint(Path(spec.model_dir)) != spec.fingerprint:
        raise UserError(f"{spec.model_dir}: the files have changed while the model was being loaded")


def _end_with_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(PARENT_S)
    os._exit(LOST_EXIT_CODE)


if __name__ == "__main__":
    code = main()
    # Without the interpreter's shutdown: background threads of connections that are lost may hang in it.
    sys.stderr.flush()
    os._exit(code)
