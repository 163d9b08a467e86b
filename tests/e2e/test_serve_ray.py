"""Both Ray layouts against the official openai client: what is promised without Ray is kept with it, and replicas may
die, be updated and be given other weights meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
import yaml

from moe.checkpoint import save_model
from moe.config import ModelConfig, MoEConfig
from moe.tokenizer import Tokenizer
from moe.transformer import Transformer, next_token_loss
from serve.client import (
    EmbeddingRequest,
    EngineClient,
    EngineRequest,
    EngineStats,
    InvalidRequestError,
    QueueFullError,
    RequestAbortedError,
    SamplingOptions,
)
from serve.hosts.ray_client import REPORT_AGE_S, Fleet, RayHandleClient
from serve.hosts.ray_merge import ReplicaReport, merge_stats
from serve.hosts.ray_options import RayOptions
from serve.hosts.sockets import free_port

pytest.importorskip("ray.serve", reason="needs Ray: make test-ray")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import ray
from ray import serve as ray_serve

from serve.hosts import ray_app

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

SENTENCE = "Grüße, 😀 fox! STOP here. "
CONTEXT = 1024
APP = "under-test"
ROOT = Path(__file__).resolve().parents[2]
KEY = {"authorization": "Bearer sk-good"}
Layout = str


def make_run(folder: Path, seed: int) -> Path:
    """A run directory whose exported model repeats one sentence."""
    torch.set_num_threads(1)
    tokenizer = Tokenizer.bytes()
    moe = MoEConfig(num_experts=4, hidden_dim=32)
    model = Transformer(
        ModelConfig(vocab_size=tokenizer.vocab_size, dim=32, num_layers=2, num_heads=2, max_seq_len=CONTEXT, moe=moe)
    )
    model.init_weights(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    ids_BT = torch.tensor([tokenizer.encode(SENTENCE * 4)[:96]])
    for _ in range(60):
        loss, count = next_token_loss(model(ids_BT[:, :-1]).logits_BTV, ids_BT[:, 1:])
        (loss / count).backward()
        optimizer.step()
        optimizer.zero_grad()
    folder.mkdir()
    save_model(folder / "model", model.eval(), tokenizer)
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("runs")
    return make_run(folder / "fox", 0), make_run(folder / "fox-later", 1)


@pytest.fixture(scope="module")
def base_url() -> Iterator[str]:
    """Ray and Serve on this machine, for all tests of the module."""
    port = free_port("127.0.0.1", near=21_000)
    quiet: dict[str, Any] = {"include_dashboard": False, "log_to_driver": False, "logging_level": "ERROR"}
    ray.init(address="local", num_cpus=8, object_store_memory=128 * 2**20, **quiet)
    try:
        ray_serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
        yield f"http://127.0.0.1:{port}"
    finally:
        ray_serve.shutdown()
        ray.shutdown()


@dataclass
class Running:
    """An application on Ray, and its engines to look into."""

    url: str
    options: RayOptions

    @property
    def layout(self) -> str:
        return self.options.layout

    def client(self, **options: Any) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="sk-good", **({"max_retries": 0} | options))

    def reports(self) -> list[ReplicaReport]:
        async def ask() -> list[ReplicaReport]:
            (handle,) = ray_app.engine_handles(self.options, APP).values()
            return await handle.reports(5)

        return asyncio.run(ask())

    def stats(self) -> EngineStats:
        return merge_stats([report.stats for report in self.reports()])

    def until(self, timeout_s: float = 10, **expected: int) -> float:
        """Waits until the engines' gauges have these values; how long that took."""
        began = time.monotonic()
        while time.monotonic() - began < timeout_s:
            stats = self.stats()
            if all(getattr(stats, name) == value for name, value in expected.items()):
                return time.monotonic() - began
            time.sleep(0.005)
        raise AssertionError(f"wanted {expected}, got {stats}")


def options_for(run: Path, layout: Layout, **changes: Any) -> RayOptions:
    # One sequence at a time, so that queues are as the tests say.
    limits = {"max_sequences": 1, "max_queue": 1, "health_check_period_s": 0.5, "drain_s": 5}
    return RayOptions(model=str(run), name="fox", layout=layout, api_keys=("sk-good",), **(limits | changes))


def deploy(url: str, options: RayOptions) -> Running:
    ray_serve.run(ray_app.app(options), name=APP, route_prefix="/")
    return Running(url, options)


@pytest.fixture(scope="module", params=["A", "B"])
def server(request: pytest.FixtureRequest, base_url: str, runs: tuple[Path, Path]) -> Iterator[Running]:
    yield deploy(base_url, options_for(runs[0], request.param))
    ray_serve.delete(APP)


@pytest.fixture
def client(server: Running) -> Iterator[openai.OpenAI]:
    with server.client() as client:
        yield client


def test_models_completions_and_chat(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["fox"]
    answer = client.completions.create(model="fox", prompt="Gr", max_tokens=30, temperature=0, stop="STOP")
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("üße, 😀 fox! ", "stop")
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.total_tokens) == (2, 2 + answer.usage.completion_tokens)
    chat = client.chat.completions.create(model="fox", messages=[{"role": "user", "content": "Hi"}], max_tokens=8)
    assert chat.choices[0].message.role == "assistant"
    assert chat._request_id is not None
    assert "," not in chat._request_id  # Ray stamps answers as well


def test_streams_equal_whole_answers_with_usage_and_logprobs(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"model": "fox", "temperature": 1.5, "seed": 11, "max_tokens": 60, "n": 2}
    messages: Any = [{"role": "user", "content": "Grüße"}]
    whole = client.chat.completions.create(messages=messages, logprobs=True, top_logprobs=2, **options)
    texts, logprobs, finish, usage = ["", ""], [[], []], [], None  # type: ignore[var-annotated]
    for chunk in client.chat.completions.create(
        messages=messages,
        stream=True,
        stream_options={"include_usage": True},
        logprobs=True,
        top_logprobs=2,
        **options,
    ):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            logprobs[choice.index] += choice.logprobs.content or [] if choice.logprobs else []
            finish += [choice.finish_reason] if choice.finish_reason else []
    assert texts == [choice.message.content for choice in whole.choices]
    assert len(finish) == 2
    assert usage is not None
    assert whole.usage is not None
    assert usage.total_tokens == whole.usage.total_tokens
    for choice, streamed in zip(whole.choices, logprobs, strict=True):
        assert choice.logprobs is not None
        assert choice.logprobs.content is not None
        assert [entry.token for entry in choice.logprobs.content] == [entry.token for entry in streamed]
        assert all(len(entry.top_logprobs) == 2 for entry in streamed)


def test_async_clients_share_an_engine(server: Running) -> None:
    async def run() -> None:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="sk-good", max_retries=0) as client:

            async def one(prompt: str) -> str:
                stream = await client.completions.create(
                    model="fox", prompt=prompt, temperature=0, max_tokens=50, stream=True
                )
                return "".join([chunk.choices[0].text async for chunk in stream])

            alone = [await one("Gr"), await one("fo")]
            assert await asyncio.gather(one("Gr"), one("fo")) == alone

    asyncio.run(run())


def test_errors_have_their_status_and_shape(client: openai.OpenAI, server: Running) -> None:
    with pytest.raises(openai.NotFoundError) as unknown:
        client.completions.create(model="wolf", prompt="x", stream=True)
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model="fox", prompt="x" * (CONTEXT + 5), stream=True)
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model="fox", prompt="x", temperature=-1)
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="sk-bad").models.list()
    assert httpx.get(f"{server.url}/nowhere", headers=KEY).json()["error"]["code"] == "not_found"


def test_pain_5_a_full_queue_is_429_that_the_client_can_retry(client: openai.OpenAI, server: Running) -> None:
    long: dict[str, Any] = {"model": "fox", "prompt": "x", "max_tokens": 1000, "extra_body": {"ignore_eos": True}}
    streams = [client.completions.create(stream=True, **long) for _ in range(2)]
    server.until(num_running=1, num_waiting=1)
    for stream in (False, True):
        with pytest.raises(openai.RateLimitError) as full:
            client.completions.create(model="fox", prompt="x", stream=stream)
        assert int(full.value.response.headers["retry-after"]) >= 1
        assert full.value.code == "queue_full_requests"
        assert full.value.type == "rate_limit_error"
    with ThreadPoolExecutor(1) as pool:
        patient = server.client(max_retries=4)
        retried = pool.submit(patient.completions.create, model="fox", prompt="fo", max_tokens=2, temperature=0)
        time.sleep(0.2)
        for stream in streams:
            stream.close()
        assert retried.result(30).choices[0].text == "x!"
    server.until(num_running=0, num_waiting=0)


@pytest.mark.parametrize("stream", [False, True])
def test_pain_7_closing_the_connection_ends_running_and_waiting_requests(server: Running, stream: bool) -> None:
    before = server.stats().finished.get("abort", 0)
    body = {"prompt": "Gr", "max_tokens": 1000, "n": 2, "ignore_eos": True, "stream": stream}
    request = httpx.Request("POST", f"{server.url}/v1/completions", json=body)
    host, port = server.url.removeprefix("http://").split(":")
    connections = []
    for _ in range(2):
        connection = socket.create_connection((host, int(port)))
        head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(request.read())}\r\n"
        head += f"content-type: application/json\r\nauthorization: {KEY['authorization']}\r\n\r\n"
        connection.sendall(head.encode() + request.read())
        connections.append(connection)
    server.until(num_running=1, num_waiting=1)
    for connection in reversed(connections):
        connection.close()
    assert server.until(num_running=0, num_waiting=0) < 1
    assert server.stats().finished["abort"] == before + 2


def test_health_readiness_and_metrics(server: Running) -> None:
    assert httpx.get(f"{server.url}/health").json()["status"] == "ready"
    assert httpx.get(f"{server.url}/ready").status_code == 200
    assert httpx.get(f"{server.url}/metrics").status_code == 401
    text = httpx.get(f"{server.url}/metrics", headers=KEY).text
    (line,) = (line for line in text.splitlines() if line.startswith("moeyard:generation_tokens_total"))
    assert float(line.split()[-1]) == server.stats().generation_tokens


def test_a_killed_replica_ends_its_stream_with_an_error_and_is_replaced(server: Running) -> None:
    with server.client() as client:
        stream = client.completions.create(
            model="fox", prompt="Gr", max_tokens=1000, n=2, stream=True, extra_body={"ignore_eos": True}
        )
        chunks = iter(stream)
        next(chunks)
        (report,) = server.reports()
        os.kill(report.pid, signal.SIGKILL)
        # In A the process that answers is the one that dies: its connection breaks, which no client takes for an end.
        with pytest.raises((openai.APIError, httpx.RemoteProtocolError)) as broken:
            for _ in chunks:
                pass
        if server.layout == "B":
            assert isinstance(broken.value, openai.APIError)
            assert broken.value.code == "unavailable"
            assert "has died" in broken.value.message
    with server.client(max_retries=10) as patient:
        answer = patient.completions.create(model="fox", prompt="Gr", max_tokens=3, temperature=0, timeout=60)
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 3
    (replaced,) = server.reports()
    assert replaced.pid != report.pid


class Traffic:
    """Requests one after the other from several threads, until told to stop; every failure is kept."""

    def __init__(self, server: Running, width: int = 2) -> None:
        self._server, self._width = server, width
        self._over = threading.Event()
        self.failures: list[BaseException] = []
        self.answers: list[str] = []

    def _run(self, number: int) -> None:
        with self._server.client(timeout=60) as client:
            while not self._over.is_set():
                try:
                    if number % 2:
                        parts = client.completions.create(
                            model="fox", prompt="Gr", max_tokens=20, temperature=0, stream=True
                        )
                        text = "".join(part.choices[0].text for part in parts)
                    else:
                        whole = client.completions.create(model="fox", prompt="Gr", max_tokens=20, temperature=0)
                        text = whole.choices[0].text
                    self.answers.append(text)
                except Exception as error:
                    self.failures.append(error)

    @contextlib.contextmanager
    def flowing(self) -> Iterator[None]:
        threads = [threading.Thread(target=self._run, args=(number,)) for number in range(self._width)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self._over.set()
            for thread in threads:
                thread.join(60)


@pytest.mark.parametrize("layout", ["A", "B"])
def test_a_rolling_update_of_two_replicas_fails_no_request(base_url: str, runs: tuple[Path, Path], layout: str) -> None:
    options = options_for(runs[0], layout, num_replicas=2, ingress_replicas=2, max_queue=8)
    server = deploy(base_url, options)
    try:
        before = {report.pid for report in server.reports()}
        assert len(before) == 2
        traffic = Traffic(server)
        with traffic.flowing():
            time.sleep(0.5)
            deploy(base_url, options)
            answered = len(traffic.answers)
            time.sleep(1)
        assert traffic.failures == []
        assert len(traffic.answers) > answered > 0
        assert len(set(traffic.answers)) == 1
        after = {report.pid for report in server.reports()}
        assert len(after) == 2
        assert not after & before
        # Whoever is asked counts what all have done.
        time.sleep(REPORT_AGE_S)
        texts = [httpx.get(f"{base_url}/metrics", headers=KEY).text for _ in range(6)]
        lines = [next(line for line in text.splitlines() if line.startswith("moeyard:generation")) for text in texts]
        assert len(set(lines)) == 1
    finally:
        ray_serve.delete(APP)


def deploy_file(server: Running, weights: Path, replicas: int) -> None:
    """What ``serve deploy docker/ray-serve.yaml`` does, without the dashboard that it posts to."""
    from ray.serve.context import _get_global_client
    from ray.serve.schema import ServeDeploySchema

    config = yaml.safe_load((ROOT / "docker" / "ray-serve.yaml").read_text())
    (application,) = config["applications"]
    application["name"] = APP
    application["args"] |= server.options.model_dump(include={"model", "name", "max_queue", "health_check_period_s"})
    application["args"] |= {"threads": 1, "num_replicas": replicas, "api_keys": "sk-good"}
    application["deployments"][0]["user_config"]["weights"] = str(weights)
    del config["http_options"], config["proxy_location"]
    client: Any = _get_global_client()
    client.deploy_apps(ServeDeploySchema.model_validate(config), _blocking=False)
    wait_for(lambda: ray_serve.status().applications[APP].status == "RUNNING", 60)


def wait_for(condition: Callable[[], bool], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, ray_serve.status()
        time.sleep(0.1)


def test_the_deploy_file_swaps_weights_under_load_without_a_restart(base_url: str, runs: tuple[Path, Path]) -> None:
    server = Running(base_url, options_for(runs[0], "A", max_queue=8))
    try:
        deploy_file(server, runs[0], 2)
        before = server.reports()
        versions = {report.model.weights_version for report in before}
        assert len(versions) == 1
        traffic = Traffic(server)
        with traffic.flowing():
            time.sleep(0.5)
            deploy_file(server, runs[1], 2)
            wait_for(lambda: {r.model.weights_version for r in server.reports()}.isdisjoint(versions), 30)
            swapped = server.reports()
            # What cannot be served is not, and nobody notices.
            deploy_file(server, runs[1] / "nowhere", 2)
            time.sleep(2)
        assert traffic.failures == []
        assert len({report.model.weights_version for report in swapped}) == 1
        after = server.reports()
        assert {report.pid for report in after} == {report.pid for report in before}
        assert {r.model.weights_version for r in after} == {r.model.weights_version for r in swapped}
    finally:
        ray_serve.delete(APP)


def test_the_handle_client_keeps_the_whole_protocol(base_url: str, runs: tuple[Path, Path]) -> None:
    server = deploy(base_url, options_for(runs[0], "B", num_replicas=2, max_sequences=2))

    async def run() -> None:
        (handle,) = ray_app.engine_handles(server.options, APP).values()
        client = RayHandleClient({"fox": Fleet("fox", handle, admission_timeout_s=30)})
        assert isinstance(client, EngineClient)
        await client.start()
        assert [model.model_id for model in await client.models()] == ["fox"]
        assert (await client.health()).status == "ready"

        ids = await client.tokenize("fox", "Gr")
        assert await client.detokenize("fox", ids) == "Gr"
        vectors = await client.embed(EmbeddingRequest("e1", "fox", ("Gr", ids)))
        assert vectors.vectors[0] == pytest.approx(vectors.vectors[1], abs=1e-5)

        await client.record_experts("fox", start=True)
        endless = SamplingOptions(max_tokens=900, ignore_eos=True, temperature=0.0)
        streams = [await client.generate(EngineRequest(f"r{i}", "fox", ("Gr",), endless)) for i in range(4)]
        for stream in streams:
            await anext(stream)
        await asyncio.sleep(REPORT_AGE_S)
        assert (await client.stats()).num_running == 4
        # Exactly the one that is named ends, in whichever replica it is.
        assert await client.abort("r2")
        with pytest.raises(RequestAbortedError):
            async for _ in streams[2]:
                pass
        assert not await client.abort("r2")
        for stream in (streams[0], streams[1], streams[3]):
            await anext(stream)
            await stream.aclose()
        began = time.monotonic()
        while (await client.stats()).num_running:
            assert time.monotonic() - began < 2
            await asyncio.sleep(0.05)
        assert (await client.record_experts("fox", start=False)).tokens >= 8
        assert await client.reset_prefix_cache("fox") > 0

        before = (await client.models())[0].weights_version
        with pytest.raises(InvalidRequestError):
            await client.swap_weights("fox", "/nowhere")
        version = await client.swap_weights("fox", str(runs[1]))
        assert version != before
        assert {report.model.weights_version for report in await handle.reports(5)} == {version}
        many = [client.generate(EngineRequest(f"m{i}", "fox", ("Gr",), endless)) for i in range(12)]
        results = await asyncio.gather(*many, return_exceptions=True)
        assert sum(isinstance(result, QueueFullError) for result in results) >= 4
        for result in results:
            if not isinstance(result, BaseException):
                await result.aclose()

    try:
        asyncio.run(run())
    finally:
        ray_serve.delete(APP)
