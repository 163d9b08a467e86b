"""Network namespaces with shaped links. Everything has this launcher's name in front and goes when its namespaces go.

One rank a node: each rank has a link to the core switch. Several: each has a link to its node's switch, and each
node's switch one to the core. Both ends of every link are shaped, so a link limits what comes as well as what goes.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

from benchmarks.cluster.spec import ClusterSpec

PREFIX = "moeyard"
INTERFACE = "eth0"
"""Name of a rank's link inside its namespace."""


def missing_tools() -> str | None:
    """Why no cluster can be built here, or None."""
    if os.geteuid() != 0:
        return "the emulated cluster needs root, for network namespaces"
    for tool in ("ip", "tc"):
        if shutil.which(tool) is None:
            return f"the emulated cluster needs the program {tool!r} (package iproute2)"
    return None


def sh(*command: str) -> str:
    """Run a command; its output. RuntimeError with what it printed when it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


class Network:
    """The namespaces of one cluster."""

    def __init__(self, spec: ClusterSpec, launcher: int) -> None:
        self.spec = spec
        self._name = f"{PREFIX}-{launcher}"
        self._made: list[str] = []

    def build(self) -> None:
        """Make all namespaces and links."""
        spec = self.spec
        core = self._switch("core")
        if spec.shared_node or spec.ranks_per_node == 1:
            for node in range(spec.nodes):
                first = node * spec.ranks_per_node
                self._member(self.namespace(first), core, f"n{node}", spec.address(first), spec.inter_mbit)
            return
        for node in range(spec.nodes):
            switch = self._switch(f"node{node}")
            self._link(switch, "uplink", core, f"n{node}", spec.inter_mbit)
            sh("ip", "-n", switch, "link", "set", "uplink", "master", "switch")
            for rank in range(node * spec.ranks_per_node, (node + 1) * spec.ranks_per_node):
                self._member(self.namespace(rank), switch, f"r{rank}", spec.address(rank), spec.intra_mbit)

    def namespace(self, rank: int) -> str:
        """Where ``rank`` lives."""
        if self.spec.shared_node:
            return f"{self._name}-host{rank // self.spec.ranks_per_node}"
        return f"{self._name}-rank{rank}"

    def remove(self) -> None:
        """Delete the namespaces, and with them links and queues; what is gone already is no error."""
        for namespace in reversed(self._made):
            subprocess.run(["ip", "netns", "del", namespace], capture_output=True, check=False)
        self._made.clear()

    def sent_bytes(self, rank: int) -> int:
        """Bytes that have left a rank's interface, headers included."""
        path = f"/sys/class/net/{INTERFACE}/statistics/tx_bytes"
        return int(sh("ip", "netns", "exec", self.namespace(rank), "cat", path))

    def _namespace(self, name: str) -> str:
        sh("ip", "netns", "add", name)
        self._made.append(name)
        sh("ip", "-n", name, "link", "set", "lo", "up")
        return name

    def _switch(self, name: str) -> str:
        switch = self._namespace(f"{self._name}-{name}")
        sh("ip", "-n", switch, "link", "add", "switch", "type", "bridge")
        sh("ip", "-n", switch, "link", "set", "switch", "up")
        return switch

    def _member(self, namespace: str, switch: str, port: str, address: str, mbit: float) -> None:
        self._namespace(namespace)
        self._link(namespace, INTERFACE, switch, port, mbit)
        sh("ip", "-n", namespace, "addr", "add", f"{address}/24", "dev", INTERFACE)

    def _link(self, here: str, name: str, switch: str, port: str, mbit: float) -> None:
        sh("ip", "-n", here, "link", "add", name, "type", "veth", "peer", "name", port, "netns", switch)
        sh("ip", "-n", switch, "link", "set", port, "master", "switch")
        for namespace, device in ((here, name), (switch, port)):
            sh("ip", "-n", namespace, "link", "set", device, "up")
            sh("ip", "netns", "exec", namespace, "tc", *_shape(device, mbit))


def _shape(device: str, mbit: float) -> list[str]:
    """tc's arguments: a bucket of 5 ms, a queue of 50 ms in which TCP finds its window; never below a few packets."""
    bytes_per_s = mbit * 125_000
    burst = max(32 * 1024, round(bytes_per_s * 0.005))
    limit = max(256 * 1024, round(bytes_per_s * 0.05))
    rate = f"{round(mbit * 1000)}kbit"
    return ["qdisc", "add", "dev", device, "root", "tbf", "rate", rate, "burst", str(burst), "limit", str(limit)]


def leftovers() -> list[int]:
    """Launchers that no longer live but whose namespaces do."""
    if missing_tools():
        return []
    names = re.findall(rf"^{PREFIX}-(\d+)-", sh("ip", "netns", "list"), flags=re.MULTILINE)
    return sorted({int(pid) for pid in names if not Path(f"/proc/{pid}").exists()})


def remove_leftovers(launcher: int) -> None:
    """Delete the namespaces of a launcher that was killed."""
    for name in re.findall(rf"^({PREFIX}-{launcher}-\S+)", sh("ip", "netns", "list"), flags=re.MULTILINE):
        subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
