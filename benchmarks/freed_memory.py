"""What keeping freed memory is worth: steps of ``tiny`` with launch/train.py as it is, and with glibc left alone.

    python benchmarks/freed_memory.py --ranks 2 --rounds 5 --json freed_memory.json

Runs alternate, in an order that turns, because the machine's speed drifts; ratios are taken within a round. A variable
of glibc's malloc in the environment, whatever it says, keeps launch/train.py from touching it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LEFT_ALONE = {"MALLOC_PERTURB_": "0"}  # the default


def median_step_s(ranks: int, steps: int, variables: dict[str, str]) -> float:
    """Seconds of a training step, median over log intervals without the first."""
    with tempfile.TemporaryDirectory() as work:
        command = [sys.executable]
        if ranks > 1:
            command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        command += ["launch/train.py", "--config", "tiny", "--quiet", f"run.root={work}", f"train.steps={steps}"]
        command += ["eval.interval=0", "eval.sample_interval=0", "eval.final_sequences=1", "track.heatmap_interval=0"]
        known = {key: value for key, value in os.environ.items() if not key.startswith("MALLOC_")}
        threads = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        subprocess.run(command, cwd=ROOT, env={**known, **threads, **variables}, check=True, capture_output=True)
        (metrics,) = Path(work).glob("*/metrics.jsonl")
        rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    tokens = next(row["tokens_per_step"] for row in rows if row["kind"] == "start")
    rates = [row["tokens_per_s"] for row in rows if row["kind"] == "train"]
    return tokens / statistics.median(rates[1:])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--json", type=Path, help="write the result here as one JSON object")
    args = parser.parse_args()
    if args.rounds < 1 or args.steps < 30:
        parser.error("--rounds must be at least 1, --steps at least 30")
    kinds = {"kept": {}, "left alone": LEFT_ALONE}
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    for number in range(args.rounds):
        for kind in list(kinds)[:: -1 if number % 2 else 1]:
            seconds[kind].append(median_step_s(args.ranks, args.steps, dict(kinds[kind])))
        print(f"round {number + 1}: " + ", ".join(f"{kind} {1e3 * own[-1]:.0f} ms" for kind, own in seconds.items()))
    ratios = [left / kept for left, kept in zip(seconds["left alone"], seconds["kept"], strict=True)]
    print(
        f"{args.ranks} rank(s): left alone takes {statistics.median(ratios):.3f} times as long a step"
        f" ({min(ratios):.3f} to {max(ratios):.3f})"
    )
    if args.json:
        args.json.write_text(json.dumps({**vars(args), "json": None, "seconds": seconds, "ratios": ratios}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
