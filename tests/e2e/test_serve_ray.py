"""Both Ray layouts beyond what every host promises (test_serve_contract.py): replicas may die, be updated, and be given
other weights meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import yaml

from serve.client import (
    EmbeddingRequest,
    EngineClient,
    EngineRequest,
    InvalidRequestError,
    QueueFullError,
    RequestAbortedError,
    SamplingOptions,
)
from serve.hosts.ray_client import REPORT_AGE_S, Fleet, RayHandleClient
from serve.hosts.ray_merge import ReplicaReport
from serve.hosts.ray_options import RayOptions
from serve.hosts.sockets import free_port
from tests.fox import make_run
from tests.serve_hosts import API_KEY, KEY, ROOT

pytest.importorskip("ray.serve", reason="needs Ray: make test-ray")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import ray
from ray import serve as ray_serve

from serve.hosts import ray_app

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

CONTEXT = 1024
APP = "under-test"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("runs")
    return make_run(folder / "fox", context=CONTEXT), make_run(folder / "fox-later", context=CONTEXT, seed=1)


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
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=API_KEY, **({"max_retries": 0} | options))

    def reports(self) -> list[ReplicaReport]:
        async def ask() -> list[ReplicaReport]:
            (handle,) = ray_app.engine_handles(self.options, APP).values()
            return await handle.reports(5)

        return asyncio.run(ask())


def options_for(run: Path, layout: str, **changes: Any) -> RayOptions:
    # One sequence at a time, so that queues are as the tests say.
    limits = {"max_sequences": 1, "max_queue": 1, "health_check_period_s": 0.5, "drain_s": 5}
    return RayOptions(model=str(run), name="fox", layout=layout, api_keys=(API_KEY,), **(limits | changes))


def deploy(url: str, options: RayOptions) -> Running:
    ray_serve.run(ray_app.app(options), name=APP, route_prefix="/")
    return Running(url, options)


@pytest.fixture(scope="module", params=["A", "B"])
def server(request: pytest.FixtureRequest, base_url: str, runs: tuple[Path, Path]) -> Iterator[Running]:
    yield deploy(base_url, options_for(runs[0], request.param))
    ray_serve.delete(APP)


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


def deploy_file(server: Running, replicas: int, user_config: dict[str, Any], **deployment: Any) -> None:
    """What ``serve deploy docker/ray-serve.yaml`` does, without the dashboard that it posts to."""
    from ray.serve.context import _get_global_client
    from ray.serve.schema import ServeDeploySchema

    config = yaml.safe_load((ROOT / "docker" / "ray-serve.yaml").read_text())
    (application,) = config["applications"]
    application["name"] = APP
    given = {"model", "name", "layout", "max_sequences", "max_queue", "health_check_period_s"}
    application["args"] |= server.options.model_dump(include=given)
    application["args"] |= {"threads": 1, "num_replicas": replicas, "api_keys": API_KEY}
    if server.layout == "B":
        application["deployments"][0]["name"] = RayOptions.engine_name("fox")
    application["deployments"][0]["user_config"] |= user_config
    application["deployments"][0] |= deployment
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
        deploy_file(server, 2, {"weights": str(runs[0])})
        before = server.reports()
        versions = {report.model.weights_version for report in before}
        assert len(versions) == 1
        traffic = Traffic(server)
        with traffic.flowing():
            time.sleep(0.5)
            deploy_file(server, 2, {"weights": str(runs[1])})
            wait_for(lambda: {r.model.weights_version for r in server.reports()}.isdisjoint(versions), 30)
            swapped = server.reports()
            # What cannot be served is not, and nobody notices.
            deploy_file(server, 2, {"weights": str(runs[1] / "nowhere")})
            time.sleep(2)
        assert traffic.failures == []
        assert len({report.model.weights_version for report in swapped}) == 1
        after = server.reports()
        assert {report.pid for report in after} == {report.pid for report in before}
        assert {r.model.weights_version for r in after} == {r.model.weights_version for r in swapped}
    finally:
        ray_serve.delete(APP)


@pytest.mark.parametrize("layout", ["A", "B"])
def test_the_deploy_file_changes_limits_under_load_without_a_restart(
    base_url: str, runs: tuple[Path, Path], layout: str
) -> None:
    server = Running(base_url, options_for(runs[0], layout))
    weights = {"weights": str(runs[0])}
    streams: list[Any] = []

    def asks(prompt: str = "x") -> str:
        """Leaves a request that runs or waits until the end of the test; or says which limit refuses it."""
        options: dict[str, Any] = {"max_tokens": 900, "n": 100, "extra_body": {"ignore_eos": True}}
        try:
            streams.append(client.completions.create(model="fox", prompt=prompt, stream=True, **options))
        except openai.RateLimitError as error:
            return str(error.code)
        return "taken"

    def one_less_is_still_full() -> bool:
        if len(streams) == 4:
            streams.pop().close()
        wait_for(lambda: server.reports()[0].stats.num_waiting == 2, 10)
        return asks() == "queue_full_requests"

    try:
        deploy_file(server, 1, weights)
        (before,) = server.reports()
        with server.client() as client, contextlib.ExitStack() as closing:
            closing.callback(lambda: [stream.close() for stream in streams])
            assert [asks(), asks(), asks()] == ["taken", "taken", "queue_full_requests"]
            # One runs and one waits, as the arguments say; now two more may.
            deploy_file(server, 1, weights | {"max_queue": 3, "max_queue_tokens": 50}, max_ongoing_requests=60)
            wait_for(lambda: asks() == "taken", 30)
            assert [asks("x" * 49), asks()] == ["queue_full_prompt_tokens", "taken"]
            assert asks() == "queue_full_requests"
            # What makes no sense changes nothing, and nobody notices.
            deploy_file(server, 1, weights | {"max_queue": -1}, max_ongoing_requests=60)
            deploy_file(server, 1, weights | {"max_queu": 9}, max_ongoing_requests=60)
            time.sleep(2)
            assert asks() == "queue_full_requests"
            (report,) = server.reports()
            assert (report.stats.num_running, report.stats.num_waiting) == (1, 3)
            # Less than what waits: nobody is sent away, nobody is let in.
            deploy_file(server, 1, weights | {"max_queue": 0})
            wait_for(one_less_is_still_full, 30)
            (after,) = server.reports()
            assert (after.stats.num_running, after.stats.num_waiting) == (1, 2)
            assert after.pid == before.pid
            assert next(iter(streams[0])).choices[0].text
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
