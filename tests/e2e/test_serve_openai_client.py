"""The official openai client and raw sockets against a real server over a real, tiny exported model."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch

from moe.checkpoint import load_model, save_model
from moe.config import ModelConfig, MoEConfig
from moe.errors import CheckpointError
from moe.generate import SamplingParams, generate
from moe.tokenizer import Tokenizer
from moe.transformer import Transformer, next_token_loss
from serve.engine.engine import AsyncEngine
from serve.engine.load import load_engine
from serve.engine.settings import EngineSettings
from serve.hosts.embedded import serve_model
from serve.hosts.server import EmbeddedServer
from serve.hosts.sockets import ListenError, free_port, open_listener, url_of
from serve.http.app import build_app
from serve.http.settings import ServerSettings

pytestmark = pytest.mark.e2e

SENTENCE = "Grüße, 😀 fox! STOP here. "
CONTEXT = 512
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory whose exported model repeats one sentence."""
    torch.set_num_threads(1)
    tokenizer = Tokenizer.bytes()
    moe = MoEConfig(num_experts=4, hidden_dim=32)
    model = Transformer(
        ModelConfig(vocab_size=tokenizer.vocab_size, dim=32, num_layers=2, num_heads=2, max_seq_len=CONTEXT, moe=moe)
    )
    model.init_weights(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    ids_BT = torch.tensor([tokenizer.encode(SENTENCE * 4)[:96]])
    for _ in range(60):
        loss, count = next_token_loss(model(ids_BT[:, :-1]).logits_BTV, ids_BT[:, 1:])
        (loss / count).backward()
        optimizer.step()
        optimizer.zero_grad()
    folder = tmp_path_factory.mktemp("runs") / "fox-1"
    folder.mkdir()
    save_model(folder / "model", model.eval(), tokenizer)
    return folder


@dataclass
class Running:
    """A server in a thread of this process, and its engine to look into."""

    url: str
    engine: AsyncEngine

    def stats(self) -> Any:
        return asyncio.run(self.engine.stats())

    def until(self, **expected: int) -> None:
        """Waits until the engine's gauges have these values."""
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            stats = self.stats()
            if all(getattr(stats, name) == value for name, value in expected.items()):
                return
            time.sleep(0.005)
        raise AssertionError(f"wanted {expected}, got {stats}")


@pytest.fixture(scope="module")
def server(run_dir: Path) -> Iterator[Running]:
    settings = EngineSettings(max_sequences=1, max_queue=2, threads=1)
    engine = load_engine(run_dir / "model", model_id="fox", settings=settings)
    app = build_app(engine, ServerSettings(api_keys=("sk-good",)))
    ready = threading.Event()
    host = EmbeddedServer(app, engine, drain_s=5, on_ready=ready.set, on_drain=lambda _: None)
    with open_listener("127.0.0.1", 0) as listener:
        url = url_of(listener)
        thread = threading.Thread(target=lambda: asyncio.run(host.serve(sockets=[listener])))
        thread.start()
        assert ready.wait(20)
        yield Running(url, engine)
        host.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


@pytest.fixture
def client(server: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="sk-good", max_retries=0) as client:
        yield client


def test_models_completions_and_chat(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["fox"]
    assert client.models.retrieve("fox").owned_by == "moeyard"
    answer = client.completions.create(model="fox", prompt="Gr", max_tokens=30, temperature=0, stop="STOP")
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("üße, 😀 fox! ", "stop")
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.total_tokens) == (2, 2 + answer.usage.completion_tokens)
    chat = client.chat.completions.create(model="fox", messages=[{"role": "user", "content": "Hi"}], max_tokens=8)
    assert chat.choices[0].message.role == "assistant"
    assert chat.choices[0].finish_reason in ("stop", "length")
    assert chat._request_id is not None


def test_greedy_answer_is_moe_generate_on_the_exported_model(client: openai.OpenAI, run_dir: Path) -> None:
    answer = client.completions.create(model="fox", prompt="Once", max_tokens=60, temperature=0, logprobs=2)
    tokenizer = Tokenizer.bytes()
    model = load_model(run_dir / "model").model
    params = SamplingParams(max_tokens=60, temperature=0)
    steps = list(generate(model, tokenizer.encode("Once"), params, eos_id=tokenizer.eos_id))
    assert answer.choices[0].text == tokenizer.decode([step.token for step in steps])
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.token_logprobs == pytest.approx([step.logprob for step in steps], abs=1e-4)


def test_streams_equal_whole_answers_with_usage_and_logprobs(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"model": "fox", "temperature": 1.5, "seed": 11, "max_tokens": 40, "n": 2}
    messages: Any = [{"role": "user", "content": "Grüße"}]
    whole = client.chat.completions.create(messages=messages, logprobs=True, top_logprobs=2, **options)
    texts, roles, finish, usage = ["", ""], [], [], None
    for chunk in client.chat.completions.create(
        messages=messages, stream=True, stream_options={"include_usage": True}, **options
    ):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            roles += [choice.delta.role] if choice.delta.role else []
            finish += [choice.finish_reason] if choice.finish_reason else []
    assert texts == [choice.message.content for choice in whole.choices]
    assert roles == ["assistant"] * 2
    assert finish == [choice.finish_reason for choice in whole.choices]
    assert usage is not None
    assert whole.usage is not None
    assert usage.model_dump(exclude={"prompt_tokens_details"}) == whole.usage.model_dump(
        exclude={"prompt_tokens_details"}
    )
    assert usage.prompt_tokens_details is not None
    assert usage.prompt_tokens_details.cached_tokens  # the same prompt came before
    for choice in whole.choices:
        assert choice.logprobs is not None
        assert choice.logprobs.content is not None
        raw = bytes(byte for entry in choice.logprobs.content for byte in entry.bytes or [])
        assert raw.decode("utf-8", "replace").startswith((choice.message.content or "")[:5])
        assert all(len(entry.top_logprobs) == 2 for entry in choice.logprobs.content)
    pieces = [c.choices[0].text for c in client.completions.create(prompt="Gr", stream=True, **options | {"n": 1})]
    assert "".join(pieces) == client.completions.create(prompt="Gr", **options | {"n": 1}).choices[0].text


def test_errors_become_the_clients_exceptions(client: openai.OpenAI, server: Running) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="gpt-9", prompt="x")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model="fox", prompt="x" * 600)
    assert long.value.code == "context_length_exceeded"
    assert "your prompt has 600 tokens" in str(long.value)
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model="fox", messages=[], temperature=9)
    assert bad.value.param in ("messages", "temperature")
    assert bad.value.request_id
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="sk-bad").models.list()
    with pytest.raises(openai.BadRequestError) as tools:
        client.chat.completions.create(
            model="fox",
            messages=[{"role": "user", "content": "x"}],
            tools=[{"type": "function", "function": {"name": "f"}}],
        )
    assert tools.value.code == "unsupported_parameter"


def test_async_client_streams_two_requests_at_once(server: Running) -> None:
    async def run() -> None:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="sk-good", max_retries=0) as client:

            async def one(prompt: str) -> str:
                text = ""
                stream = await client.completions.create(
                    model="fox", prompt=prompt, temperature=0, max_tokens=50, stream=True
                )
                async for chunk in stream:
                    text += chunk.choices[0].text
                return text

            alone = [await one("Gr"), await one("fo")]
            assert await asyncio.gather(one("Gr"), one("fo")) == alone

    asyncio.run(run())


def endless(server: Running, stream: bool) -> httpx.Request:
    body = {"prompt": "Gr", "max_tokens": 500, "n": 100, "ignore_eos": True, "stream": stream}
    return httpx.Request("POST", f"{server.url}/v1/completions", json=body, headers={"authorization": "Bearer sk-good"})


@pytest.mark.parametrize("stream", [False, True])
def test_pain_7_closing_the_connection_ends_running_and_waiting_requests(server: Running, stream: bool) -> None:
    before = server.stats().finished.get("abort", 0)
    connections = []
    for _ in range(2):
        request = endless(server, stream)
        request.read()
        host, port = server.url.removeprefix("http://").split(":")
        connection = socket.create_connection((host, int(port)))
        head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(request.content)}\r\n"
        head += "content-type: application/json\r\nauthorization: Bearer sk-good\r\n\r\n"
        connection.sendall(head.encode() + request.content)
        connections.append(connection)
    server.until(num_running=1, num_waiting=1)
    for connection in reversed(connections):
        connection.close()
    server.until(num_running=0, num_waiting=0)
    assert server.stats().finished["abort"] == before + 2


def test_pain_5_a_full_queue_is_429_that_the_client_can_retry(client: openai.OpenAI, server: Running) -> None:
    long: dict[str, Any] = {"max_tokens": 500, "n": 100, "extra_body": {"ignore_eos": True}}
    streams = [client.completions.create(model="fox", prompt="x", stream=True, **long) for _ in range(3)]
    server.until(num_running=1, num_waiting=2)
    began = time.monotonic()
    with pytest.raises(openai.RateLimitError) as full:
        client.completions.create(model="fox", prompt="x")
    assert time.monotonic() - began < 1
    assert int(full.value.response.headers["retry-after"]) >= 1
    assert full.value.code == "queue_full_requests"
    with ThreadPoolExecutor(1) as pool:
        retried = pool.submit(
            client.with_options(max_retries=4).completions.create, model="fox", prompt="fo", max_tokens=2, temperature=0
        )
        time.sleep(0.2)
        for stream in streams:
            stream.close()
        assert retried.result(30).choices[0].text == "x!"


def test_health_needs_no_key_and_metrics_count(client: openai.OpenAI, server: Running) -> None:
    assert httpx.get(f"{server.url}/health").json()["status"] == "ready"
    assert httpx.get(f"{server.url}/ready").status_code == 200
    assert httpx.get(f"{server.url}/metrics").status_code == 401
    text = httpx.get(f"{server.url}/metrics", headers={"authorization": "Bearer sk-good"}).text
    assert 'moeyard:expert_load_imbalance{layer="1",model_name="fox"}' in text
    assert 'moeyard:e2e_request_latency_seconds_count{model_name="fox"}' in text


def stream_and_signal(url: str, process: int, signal_number: int, n: int) -> list[str]:
    """The lines of a long stream during which the server gets a signal."""
    body = {"prompt": "Gr", "max_tokens": 150, "n": n, "ignore_eos": True, "stream": True, "temperature": 0}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=30) as answer:
        lines = answer.iter_lines()
        first = next(lines)
        os.kill(process, signal_number)
        return [first, *(line for line in lines if line)]


def test_sigterm_lets_a_stream_finish_and_exits_with_0(run_dir: Path) -> None:
    code = (
        "import sys; from serve.hosts.embedded import serve_model; from serve.engine.settings import EngineSettings;"
        "from serve.http.settings import ServerSettings;"
        f"sys.exit(serve_model({str(run_dir)!r}, port=0, engine=EngineSettings(threads=1),"
        " settings=ServerSettings(drain_s=20)))"
    )
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    pipe = subprocess.PIPE
    process = subprocess.Popen([sys.executable, "-c", code], stdout=pipe, stderr=pipe, text=True, env=environment)
    assert process.stdout is not None
    printed = list(itertools.islice(process.stdout, 10))
    assert len(printed) == 10, process.communicate()[1]
    url = printed[0].split()[-1]
    assert printed[0].startswith("ready in ")
    assert "fox-1 (weights " in printed[1]
    assert "4 experts in each of 2 MoE layers" in printed[2]
    assert printed[3] == "  context  512 tokens\n"
    assert "positions in blocks of 16" in printed[4]
    assert printed[5] == "  gate     topk\n"
    assert printed[8] == f"  page     {url}/\n"
    words = shlex.split(printed[9])
    assert words[:2] == ["try", "curl"]
    header, data = (words[words.index(flag) + 1] for flag in ("-H", "-d"))
    shown = httpx.post(words[2], content=data, headers=[tuple(header.split(": "))])
    assert shown.json()["object"] == "text_completion"
    assert stream_and_signal(url, process.pid, signal.SIGTERM, 1)[-1] == "data: [DONE]"
    out, err = process.communicate(timeout=30)
    assert process.returncode == 0
    assert "waiting up to 20 s for 1 unfinished request(s)" in out
    assert out.endswith("stopped\n")
    assert "POST /v1/completions 200" in err  # the access log
    assert "Traceback" not in err


def serve_here(path: Path, **options: Any) -> int:
    """``serve_model`` in this thread, with a signal in the end should nothing else stop it."""
    alarm = threading.Timer(30, os.kill, (os.getpid(), signal.SIGINT))
    alarm.start()
    try:
        return serve_model(path, engine=EngineSettings(threads=1), **options)
    finally:
        alarm.cancel()


def test_ctrl_c_past_the_deadline_ends_a_stream_with_an_error_event_and_exits_with_130(run_dir: Path) -> None:
    port = free_port("127.0.0.1", near=20_000)
    before = signal.getsignal(signal.SIGINT)

    def visit() -> list[str]:
        url = f"http://127.0.0.1:{port}"
        for _ in range(500):
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"{url}/ready").status_code == 200:
                    break
            time.sleep(0.01)
        return stream_and_signal(url, os.getpid(), signal.SIGINT, 100)

    with ThreadPoolExecutor(1) as pool:
        visitor = pool.submit(visit)
        code = serve_here(run_dir, port=port, settings=ServerSettings(drain_s=0.2))
        lines = visitor.result(10)
    assert code == 130
    assert json.loads(lines[-1].removeprefix("data: "))["error"]["code"] == "aborted"
    assert signal.getsignal(signal.SIGINT) == before


def test_a_port_in_use_is_one_line_with_a_free_port_before_anything_is_loaded(run_dir: Path) -> None:
    with open_listener("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ListenError) as caught:
            serve_model(run_dir, port=port)
        message = str(caught.value)
        assert message.startswith(f"port {port} on 127.0.0.1 is already in use; port ")
        assert caught.value.exit_code == 1
        assert "\n" not in message
        suggested = int(message.split("--port ")[1])
        assert suggested != port
        with open_listener("127.0.0.1", suggested):
            assert free_port("127.0.0.1", near=suggested) != suggested


def test_a_model_that_loads_but_cannot_run_is_one_line(run_dir: Path, tmp_path: Path) -> None:
    loaded = load_model(run_dir / "model")
    with torch.no_grad():
        loaded.model.embed.weight.fill_(float("nan"))
    save_model(tmp_path / "model", loaded.model, loaded.tokenizer)
    with pytest.raises(CheckpointError, match=r"the model was loaded but does not run: .*NaN"):
        serve_here(tmp_path / "model", port=0)


def test_addresses_that_cannot_be_listened_on_are_explained() -> None:
    with pytest.raises(ListenError, match=r"192\.0\.2\.1 is not an address of this machine"):
        open_listener("192.0.2.1", 0)
    with pytest.raises(ListenError, match="port must be between 0 and 65535, got 70000"):
        open_listener("127.0.0.1", 70_000)
