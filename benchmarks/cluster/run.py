"""Run a program on an emulated cluster and take the cluster down, whatever happens.

    python -m benchmarks.cluster.run --nodes 4 --inter-mbit 200 --cpu 0.45 -- python benchmarks/expert_step.py
    python -m benchmarks.cluster.run --nodes 4 --like paper-b -- python benchmarks/expert_step.py
    python -m benchmarks.cluster.run --nodes 2 --ranks-per-node 2 --torchrun -- launch/train.py --config tiny

Needs root. Nodes are network namespaces, links are shaped by ``tc tbf``, each rank has its own CPU quota: slow links
and stragglers are then real, on one machine. gloo is bound by the CPU: keep links below about 1 Gbit/s.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
from dataclasses import replace
from types import FrameType

from benchmarks.cluster.cluster import Cluster
from benchmarks.cluster.cpu_share import controller
from benchmarks.cluster.network import missing_tools
from benchmarks.cluster.spec import REFERENCES, ClusterSpec, SpecError, rates_like

MEASURE = "from benchmarks.cluster.spec import measure_flops; print(measure_flops())"


def flops_of_a_rank(cpu: float) -> float:
    """FLOP/s of one rank under its quota, all ranks' cores being free."""
    with Cluster(ClusterSpec(nodes=1, cpu=cpu)) as one:
        process = one.start(0, [sys.executable, "-c", MEASURE], output=subprocess.PIPE)
        output, _ = process.communicate(timeout=60)
    if process.returncode != 0:
        raise RuntimeError(f"measuring matrix products failed: {output}")
    return float(output.split()[-1])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, required=True)
    parser.add_argument("--ranks-per-node", type=int, default=1)
    parser.add_argument("--inter-mbit", type=float, default=200.0, help="rate of each node's link, each way")
    parser.add_argument("--intra-mbit", type=float, default=1000.0, help="rate of each rank's link inside its node")
    parser.add_argument("--like", choices=sorted(REFERENCES), help="set the rates to this cluster's FLOP per byte")
    parser.add_argument("--cpu", type=float, default=0.45, help="share of a core that each rank gets")
    parser.add_argument("--limit-s", type=float, help="end everything after this time, with exit code 124")
    parser.add_argument("--only-first", action="store_true", help="show the output of rank 0 alone")
    parser.add_argument("--prefix", action="store_true", help="show which rank a line is from")
    parser.add_argument("--torchrun", action="store_true", help="one torchrun a node; the command is its program")
    parser.add_argument("command", nargs="+", help="after --")
    args = parser.parse_args(argv)
    problem = missing_tools() or (None if controller() else "no control group for CPU quotas is mounted here")
    if problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2

    def end(_signal: int, _frame: FrameType | None) -> None:
        raise SystemExit(143)

    signal.signal(signal.SIGTERM, end)  # by an exception, so that the cluster is taken down
    try:
        spec = ClusterSpec(
            args.nodes, args.ranks_per_node, args.inter_mbit, args.intra_mbit, args.cpu, shared_node=args.torchrun
        )
        if args.like:
            flops = flops_of_a_rank(args.cpu)
            inter, intra = rates_like(REFERENCES[args.like], flops, args.ranks_per_node)
            spec = replace(spec, inter_mbit=inter, intra_mbit=intra)
            print(
                f"a rank computes {flops / 1e9:.1f} GFLOP/s; links like {args.like}: {inter:.2f} Mbit/s between nodes"
            )
            if args.ranks_per_node > 1:
                print(f"and {intra:.1f} Mbit/s inside")
        with Cluster(spec) as cluster:
            if args.torchrun:
                return cluster.torchrun(args.command, limit_s=args.limit_s, prefix=args.prefix)
            return cluster.run(args.command, limit_s=args.limit_s, quiet_ranks=args.only_first, prefix=args.prefix)
    except SpecError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
