"""Real multi-process runs for tests: gloo ranks as separate processes on loopback."""

from __future__ import annotations

import io
import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from typing import Any

import torch

from parallel.topology import Topology, connect

# Ranks are forked from one process that has imported what they need but has computed nothing: no rank spends
# seconds on imports, and none inherits threads.
RANKS = multiprocessing.get_context("forkserver")
RANKS.set_forkserver_preload(
    [
        "torch._dynamo",
        "torch.distributed.checkpoint",
        "torch.distributed.fsdp",
        "launch.assemble",
        "parallel.model",
        "tests.harness",
    ]
)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _child(
    rank: int, world_size: int, port: int, function: Callable[..., Any], args: tuple[Any, ...], queue: Any
) -> None:
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_RANK=str(rank),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    torch.set_num_threads(1)
    try:
        with connect(timeout_s=60) as topology:
            result = function(topology, *args)
            topology.barrier()
        # As bytes: a tensor handed over by file descriptor dies with the process that made it.
        buffer = io.BytesIO()
        torch.save(result, buffer)
        queue.put((rank, True, buffer.getvalue()))
    except BaseException:
        queue.put((rank, False, traceback.format_exc()))


def run_distributed(function: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 120.0) -> list[Any]:
    """Run ``function(topology, *args)`` on ``world_size`` gloo ranks; their return values in rank order.

    ``function`` must be importable (top level of its module). Fails with the traceback of the first rank that failed.
    """
    queue = RANKS.Queue()
    port = free_port()
    processes = [
        RANKS.Process(target=_child, args=(rank, world_size, port, function, args, queue), daemon=True)
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    results: dict[int, Any] = {}
    try:
        for _ in processes:
            rank, ok, value = queue.get(timeout=timeout_s)
            if not ok:
                raise AssertionError(f"rank {rank} of {world_size} failed:\n{value}")
            results[rank] = torch.load(io.BytesIO(value), weights_only=False)
    finally:
        for process in processes:
            process.join(timeout=10 if len(results) == world_size else 0.5)
            if process.is_alive():
                process.kill()
    return [results[rank] for rank in range(world_size)]


def run_single(function: Callable[..., Any], *args: Any) -> Any:
    """``function(topology, *args)`` in this process as a world of one."""
    topology = Topology(0, 1, 0, 1, torch.device("cpu"), "test", None)
    return function(topology, *args)
