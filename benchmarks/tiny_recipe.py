"""What a newcomer waits for: a fresh clone, `make demo`, and the numbers that come out of it.

Clones this repository into an empty folder, runs `make demo` there and reports: seconds of installation, seconds from
installed to the first loss line, the whole command, training time and validation bits per byte, and the share of
training wall time that is model forward, backward and optimizer.

    python benchmarks/tiny_recipe.py --json tiny.json            # whole demo, with installation
    python benchmarks/tiny_recipe.py --run runs/tiny-...         # only read a finished run
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MODEL_PHASES = ("forward", "backward", "reduce", "optimizer")


def read_run(run: Path) -> dict[str, float]:
    """Numbers of a finished run from its metrics.jsonl."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    logs = [row for row in rows if row["kind"] == "train"]
    finals = [row for row in rows if row["kind"] == "eval" and row["final"]]
    steps_before = 0
    seconds: dict[str, float] = {}
    for row in logs:
        for phase, per_step in row["phase_s"].items():
            seconds[phase] = seconds.get(phase, 0.0) + per_step * (row["step"] - steps_before)
        steps_before = row["step"]
    wall = logs[-1]["elapsed_s"]
    compute = sum(seconds.get(name, 0.0) for name in ("forward", "backward", "optimizer"))
    return {
        "train_s": round(wall, 1),
        "steps": logs[-1]["step"],
        "tokens": logs[-1]["tokens_seen"],
        "tokens_per_s": round(logs[-1]["tokens_seen"] / wall),
        "bits_per_byte": round(finals[-1]["bits_per_byte"], 4) if finals else float("nan"),
        "model_share": round(compute / wall, 4),
        "exposed_reduce_share": round(seconds.get("reduce", 0.0) / wall, 4),
        "other_share": round(1 - sum(seconds.get(p, 0.0) for p in MODEL_PHASES) / wall, 4),
    }


def run_demo(folder: Path) -> dict[str, float]:
    """Clone, run `make demo`, and read off when installation ended and the first loss line came."""
    clone = folder / "moeyard"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
    start = time.perf_counter()
    installed_s = first_loss_s = float("nan")
    # A pipe would hold lines back: the clock must see each line when it is written.
    env = {**os.environ, "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        ["make", "demo"], cwd=clone, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env
    )
    assert process.stdout is not None
    for line in process.stdout:
        now = time.perf_counter() - start
        print(f"{now:7.1f} s  {line}", end="", flush=True)
        if installed_s != installed_s and (clone / ".venv" / "installed").exists():
            installed_s = (clone / ".venv" / "installed").stat().st_mtime - (time.time() - now)
        if first_loss_s != first_loss_s and " loss " in line and line.startswith("step "):
            first_loss_s = now
    if process.wait() != 0:
        raise SystemExit(f"make demo ended with {process.returncode}")
    total_s = time.perf_counter() - start
    (run,) = (clone / "runs").iterdir()
    return {
        "install_s": round(installed_s, 1),
        "installed_to_first_loss_s": round(first_loss_s - installed_s, 1),
        "make_demo_s": round(total_s, 1),
        **read_run(run),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="read this finished run instead of running the demo")
    parser.add_argument("--json", type=Path, help="write the result here as one JSON object")
    args = parser.parse_args()
    if args.run:
        result: dict[str, object] = dict(read_run(args.run))
    else:
        with tempfile.TemporaryDirectory() as folder:
            result = dict(run_demo(Path(folder)))
    commit = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    result |= {"commit": commit.stdout.strip(), "cpus": os.cpu_count() or 0, "machine": platform.machine()}
    width = max(map(len, result))
    print("\n".join(f"{name:<{width}}  {value}" for name, value in result.items()), file=sys.stdout)
    if args.json:
        args.json.write_text(json.dumps(result) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
