"""The emulated cluster: shaped links, CPU quotas, exit codes, and nothing left behind. Needs root and iproute2."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.cluster.cluster import Cluster
from benchmarks.cluster.cpu_share import controller
from benchmarks.cluster.network import missing_tools, sh
from benchmarks.cluster.spec import ClusterSpec
from tests.training_program import ROOT, losses, only_run, options, run, run_forked, wait_for_step

_problem = missing_tools() or (None if controller() else "no control group for CPU quotas is mounted here")
pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.skipif(_problem is not None, reason=str(_problem))]

SEND = """
import os, socket, sys, time
rank, size = int(os.environ["RANK"]), int(sys.argv[1])
if rank == 0:
    with socket.create_server((os.environ["MASTER_ADDR"], 5001)) as server:
        peer, _ = server.accept()
        begin, got = None, 0
        while block := peer.recv(1 << 16):
            begin = begin or time.perf_counter()
            got += len(block)
        print("MBIT", got * 8e-6 / (time.perf_counter() - begin))
else:
    while True:
        try:
            peer = socket.create_connection((os.environ["MASTER_ADDR"], 5001))
            break
        except OSError:
            time.sleep(0.05)
    with peer:
        peer.sendall(bytes(size))
"""
SPIN = """
import time
begin, used = time.perf_counter(), time.process_time()
while time.perf_counter() - begin < 1.5:
    pass
print("SHARE", (time.process_time() - used) / (time.perf_counter() - begin))
"""


def launched(*args: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.cluster.run", *args]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout, check=False)


def left_behind(launcher: int) -> list[str]:
    found = controller()
    assert found is not None
    names = [line for line in sh("ip", "netns", "list").splitlines() if f"moeyard-{launcher}-" in line]
    return names + [str(path) for path in found[0].glob(f"moeyard-{launcher}")]


@pytest.mark.parametrize("mbit", [20.0, 200.0])
def test_a_link_carries_its_rate_and_no_more(mbit: float) -> None:
    size = str(int(mbit * 125_000))  # a second's worth
    result = launched("--nodes", "2", "--inter-mbit", str(mbit), "--", sys.executable, "-c", SEND, size)
    assert result.returncode == 0, result.stdout + result.stderr
    reached = float(result.stdout.split("MBIT")[1])
    assert 0.90 * mbit < reached < 1.05 * mbit


def test_a_rank_gets_its_share_of_a_core() -> None:
    result = launched("--nodes", "2", "--cpu", "0.3", "--", sys.executable, "-c", SPIN)
    shares = [float(line.split()[1]) for line in result.stdout.splitlines() if line.startswith("SHARE")]
    assert len(shares) == 2
    assert all(0.24 < share < 0.33 for share in shares), shares  # below it only when the machine is busy


def test_counters_see_what_was_sent() -> None:
    with Cluster(ClusterSpec(nodes=2)) as cluster:
        before = cluster.sent_bytes()
        assert cluster.run([sys.executable, "-c", SEND, "1000000"], limit_s=30) == 0
        sent = [after - b for after, b in zip(cluster.sent_bytes(), before, strict=True)]
    assert 1_000_000 < sent[1] < 1_100_000
    assert sent[0] < 100_000


def test_the_first_failure_is_the_exit_code_and_ends_the_others() -> None:
    begin = time.monotonic()
    result = launched(
        "--nodes", "2", "--prefix", "--", "sh", "-c", "test $RANK = 0 && exec sleep 100; echo bad; exit 7"
    )
    assert result.returncode == 7
    assert "[1] bad" in result.stdout
    assert time.monotonic() - begin < 40


def test_a_time_limit_ends_everything() -> None:
    result = launched("--nodes", "1", "--limit-s", "1", "--", "sleep", "100")
    assert result.returncode == 124


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_left_after_a_signal(sign: signal.Signals) -> None:
    command = [sys.executable, "-m", "benchmarks.cluster.run", "--nodes", "2", "--", "sh", "-c", "echo up; sleep 100"]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    assert left_behind(process.pid)
    os.kill(process.pid, sign)
    process.wait(timeout=30)
    if sign is signal.SIGKILL:  # the next launcher cleans up after one that could not
        assert left_behind(process.pid)
        assert launched("--nodes", "1", "--", "true").returncode == 0
    assert left_behind(process.pid) == []


def test_an_impossible_cluster_is_refused_in_one_line() -> None:
    result = launched("--nodes", "0", "--", "true")
    assert (result.returncode, result.stderr) == (2, "error: nodes is 0; it must be at least 1\n")


def test_torchrun_on_two_nodes_of_two_ranks_trains_as_one_process(corpus: Path, tmp_path: Path) -> None:
    """Each node its own network namespace and address; copies, tokens and gradients cross a real link."""
    more = ("train.steps=4", "train.global_batch=12", "model.moe.num_experts=6", "parallel.mode=fssdp-rm")
    more += ("parallel.overlap_degree=2", "train.micro_batch=3")
    alone = run(1, *options(corpus, tmp_path / "one", *more, "parallel.mode=local"))
    assert alone.returncode == 0, alone.stderr
    program = ["launch/train.py", *options(corpus, tmp_path / "four", *more)]
    result = launched("--nodes", "2", "--ranks-per-node", "2", "--torchrun", "--cpu", "1", "--", *program, timeout=240)
    assert result.returncode == 0, result.stdout + result.stderr
    assert losses(only_run(tmp_path / "four")) == pytest.approx(losses(only_run(tmp_path / "one")), rel=1e-5)


def test_a_link_that_drops_ends_both_ranks_with_words_and_loses_nothing(corpus: Path, tmp_path: Path) -> None:
    args = ("train.steps=100000", "parallel.mode=fssdp-rm", "parallel.timeout_s=5", "checkpoint.interval=2")
    program = [sys.executable, "launch/train.py", *options(corpus, tmp_path, *args)]
    with Cluster(ClusterSpec(nodes=2, inter_mbit=200, cpu=1)) as cluster:
        ranks = [cluster.start(rank, program, output=subprocess.PIPE) for rank in range(2)]
        folder = wait_for_step(ranks[0], tmp_path, 5)
        sh("ip", "-n", cluster.network.namespace(1), "link", "set", "eth0", "down")
        outputs = [process.communicate(timeout=60)[0] for process in ranks]
    for rank, output in enumerate(outputs):
        assert ranks[rank].returncode == 1, output
        assert f"rank {rank}: error: another rank is late: " in output, output
        assert f"rank {1 - rank}" in output.split("another rank is late: ")[1], output
    saved = max(int(path.name.removeprefix("step_")) for path in (folder / "checkpoints").glob("step_??????"))
    resumed = run_forked(2, "--resume", str(folder), f"train.stop_after={saved + 2}")
    assert resumed.returncode == 0, resumed.stderr
    assert max(losses(folder)) == saved + 2
