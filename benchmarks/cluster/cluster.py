"""An emulated cluster on one machine: build it, run a program on every rank, take everything down.

with Cluster(ClusterSpec(nodes=4, inter_mbit=200)) as cluster:
    code = cluster.run(["python", "benchmarks/sparse_collectives.py", "--link-mbit", "200"])
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import IO

from benchmarks.cluster import cpu_share, network
from benchmarks.cluster.cpu_share import CpuShares
from benchmarks.cluster.network import INTERFACE, Network
from benchmarks.cluster.spec import ClusterSpec

PORT = 29533
GRACE_S = 10.0
"""How long ranks may go on after the first has failed."""


class Cluster:
    """Namespaces, links and CPU quotas of ``spec``, as long as the ``with`` block lasts."""

    def __init__(self, spec: ClusterSpec) -> None:
        self.spec = spec
        self.network = Network(spec, os.getpid())
        self.shares = CpuShares(os.getpid(), spec.world_size, spec.cpu)
        self._processes: list[subprocess.Popen[str]] = []

    def __enter__(self) -> Cluster:
        for launcher in network.leftovers():  # killed before it could take its cluster down
            cpu_share.remove_leftovers(launcher)
            network.remove_leftovers(launcher)
        try:
            self.shares.build()
            self.network.build()
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._remove()

    def _remove(self) -> None:
        self._end_processes()
        self.shares.remove()
        self.network.remove()

    # --- running --------------------------------------------------------------------------------------------------

    def run(
        self, command: Sequence[str], *, limit_s: float | None = None, quiet_ranks: bool = False, prefix: bool = False
    ) -> int:
        """Run ``command`` on every rank, with the environment that torchrun would give it.

        Args:
            limit_s: end everything after this time; the exit code is 124 then.
            quiet_ranks: show the output of rank 0 alone.
            prefix: show which rank a line is from.

        Returns:
            0, or the exit code of the first rank that failed.
        """
        return self._run([(rank, list(command)) for rank in range(self.spec.world_size)], limit_s, quiet_ranks, prefix)

    def torchrun(self, args: Sequence[str], *, limit_s: float | None = None, prefix: bool = False) -> int:
        """One torchrun on every node, as on a real cluster: ``args`` are the program and its options."""
        spec = self.spec
        starter = [sys.executable, "-m", "torch.distributed.run", "--nnodes", str(spec.nodes)]
        starter += ["--nproc-per-node", str(spec.ranks_per_node), "--master-addr", spec.address(0)]
        starter += ["--master-port", str(PORT)]
        commands = [
            (node * spec.ranks_per_node, [*starter, "--node-rank", str(node), *args]) for node in range(spec.nodes)
        ]
        return self._run(commands, limit_s, False, prefix)

    def start(self, rank: int, command: Sequence[str], *, output: int | None = None) -> subprocess.Popen[str]:
        """Start ``command`` as ``rank``, in its namespace and under its quota."""
        join = f'echo $$ > {self.shares.procs(rank)} && exec ip netns exec {self.network.namespace(rank)} "$@"'
        process = subprocess.Popen(
            ["sh", "-c", join, "sh", *command],
            env={**os.environ, **self.environment(rank)},
            stdout=output,
            stderr=subprocess.STDOUT if output else None,
            text=True,
            start_new_session=True,
        )
        self._processes.append(process)
        return process

    def environment(self, rank: int) -> Mapping[str, str]:
        """What torchrun would set, and what gloo needs to find its link."""
        spec = self.spec
        return {
            "RANK": str(rank),
            "WORLD_SIZE": str(spec.world_size),
            "LOCAL_RANK": str(rank % spec.ranks_per_node),
            "LOCAL_WORLD_SIZE": str(spec.ranks_per_node),
            "MASTER_ADDR": spec.address(0),
            "MASTER_PORT": str(PORT),
            "GLOO_SOCKET_IFNAME": INTERFACE,
            "OMP_NUM_THREADS": "1",
        }

    def sent_bytes(self) -> list[int]:
        """Bytes that each rank's interface has sent, headers included."""
        return [self.network.sent_bytes(rank) for rank in range(self.spec.world_size)]

    def _run(self, commands: list[tuple[int, list[str]]], limit_s: float | None, quiet: bool, prefix: bool) -> int:
        running = {rank: self.start(rank, command, output=subprocess.PIPE) for rank, command in commands}
        printers = []
        for rank, process in running.items():
            assert process.stdout is not None
            shown = rank == 0 or not quiet
            printer = threading.Thread(
                target=_show, args=(process.stdout, rank if prefix else None, shown), daemon=True
            )
            printer.start()
            printers.append(printer)
        code, deadline = 0, time.monotonic() + (limit_s if limit_s is not None else float("inf"))
        while running:
            for rank, process in list(running.items()):
                ended = process.poll()
                if ended is None:
                    continue
                del running[rank]
                if ended != 0 and code == 0:
                    code = ended if ended > 0 else 128 - ended
                    deadline = min(deadline, time.monotonic() + GRACE_S)
            if running and time.monotonic() > deadline:
                code = code or 124
                break
            time.sleep(0.02)
        self._end_processes()
        for printer in printers:
            printer.join(timeout=5)
        return code

    def _end_processes(self) -> None:
        for sign, patience_s in ((signal.SIGTERM, 3.0), (signal.SIGKILL, 3.0)):
            alive = [process for process in self._processes if process.poll() is None]
            for process in alive:
                os.killpg(process.pid, sign)
            deadline = time.monotonic() + patience_s
            while any(process.poll() is None for process in alive) and time.monotonic() < deadline:
                time.sleep(0.02)
        self._processes = [process for process in self._processes if process.poll() is None]


def _show(lines: IO[str], rank: int | None, shown: bool) -> None:
    for line in lines:
        if shown:
            print(line if rank is None else f"[{rank}] {line}", end="", flush=True)
