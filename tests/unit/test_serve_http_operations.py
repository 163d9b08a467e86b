"""What whoever runs a server needs: keys, health, metrics, the access log, the version, the experts' loads."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime
from importlib import metadata

import httpx
import pytest

from moe.errors import UserError
from serve.client import EngineHealth, EngineStats, ModelInfo
from serve.http.settings import ServerSettings
from tests.parrot_engine import Json, ParrotEngine, call

pytestmark = pytest.mark.unit


KEYED_PATHS = (
    "/v1/models",
    "/v1/completions",
    "/v1/embeddings",
    "/tokenize",
    "/detokenize",
    "/experts/load",
    "/version",
    "/metrics",
    "/openapi.json",
    "/v1/nothing",
    "/nothing",
    "/index.html",
)


def test_pain_10_api_keys_deny_by_default_except_health() -> None:
    async def work(client: httpx.AsyncClient, _: ParrotEngine) -> None:
        for path in KEYED_PATHS:
            for header in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Basic one"}):
                answer = await client.get(path, headers=header)
                assert answer.status_code == 401, path
                assert answer.json()["error"]["code"] == "invalid_api_key"
                assert answer.headers["www-authenticate"] == "Bearer"
        # The key is looked at before the body, so that strangers cannot make the server parse.
        assert (await client.post("/v1/completions", content=b"{")).status_code == 401
        for path in ("/health", "/ready", "/"):  # the page asks its reader for the key
            assert (await client.get(path)).status_code == 200
        for key in ("one", "zwei-ü"):
            answer = await client.get("/v1/models", headers={b"authorization": f"bearer {key}".encode()})
            assert answer.status_code == 200

    call(work, ServerSettings(api_keys=("one", "zwei-ü")))


def test_health_is_the_heartbeat_and_ready_is_stricter() -> None:
    async def work(client: httpx.AsyncClient, engine: ParrotEngine) -> None:
        for health, alive, ready in [
            (EngineHealth("ready", 0.1), 200, 200),
            (EngineHealth("starting", 0.1), 200, 503),
            (EngineHealth("draining", 0.1), 200, 503),
            (EngineHealth("ready", 61.0), 503, 503),  # wedged, though nobody said so
            (EngineHealth("dead", 0.1, "boom"), 503, 503),
            (EngineHealth("stopped", 0.1), 503, 503),
        ]:
            engine.state = health
            answers = [await client.get(path) for path in ("/health", "/ready")]
            assert [answer.status_code for answer in answers] == [alive, ready], health
            assert all(answer.json()["status"] == health.status for answer in answers)
            assert ("error" in answers[0].json()) is (alive == 503)

    call(work)


def test_metrics_are_prometheus_text_with_vllm_stems_and_expert_load() -> None:
    async def work(client: httpx.AsyncClient, engine: ParrotEngine) -> None:
        await client.post("/v1/completions", json={"prompt": "abc"})
        answer = await client.get("/metrics")
        assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
        lines = set(answer.text.splitlines())
        model = 'model_name="parrot"'
        assert f"moeyard:num_requests_running{{{model}}} 1.0" in lines
        assert f"moeyard:num_requests_waiting{{{model}}} 2.0" in lines
        assert f"moeyard:generation_tokens_total{{{model}}} 50.0" in lines
        assert f'moeyard:request_success_total{{finished_reason="stop",{model}}} 5.0' in lines
        assert f'moeyard:admission_rejections_total{{{model},reason="requests"}} 6.0' in lines
        assert f"moeyard:time_to_first_token_seconds_count{{{model}}} 1.0" in lines
        assert f"moeyard:inter_token_latency_seconds_count{{{model}}} 2.0" in lines
        assert f"moeyard:request_generation_tokens_sum{{{model}}} 3.0" in lines
        assert f'moeyard:expert_load_imbalance{{layer="1",{model}}} 1.5' in lines  # names are block indices
        assert f'moeyard:expert_load_imbalance{{layer="3",{model}}} 1.0' in lines
        assert f'moeyard:expert_tokens_total{{expert="0",layer="1",{model}}} 3.0' in lines
        engine.load_LE = ((1,) * 513,)
        assert "expert_tokens_total{" not in (await client.get("/metrics")).text

    call(work)


class TwoParrots(ParrotEngine):
    """Two models behind one server; the second has done twice as much, with other experts."""

    async def models(self) -> tuple[ModelInfo, ...]:
        return (self.info, replace(self.info, model_id="macaw", moe_layers=(2,), num_experts=3))

    async def stats(self, model: str | None = None) -> EngineStats:
        first = await super().stats()
        assert model is not None, "sums of different models are of no use"
        if model == "parrot":
            return first
        return replace(first, generation_tokens=2 * first.generation_tokens, expert_load=((5, 0, 1),), finished={})


def test_every_model_has_its_own_numbers() -> None:
    async def work(client: httpx.AsyncClient, _: ParrotEngine) -> None:
        text = (await client.get("/metrics")).text
        lines = text.splitlines()
        assert 'moeyard:generation_tokens_total{model_name="parrot"} 50.0' in lines
        assert 'moeyard:generation_tokens_total{model_name="macaw"} 100.0' in lines
        assert 'moeyard:expert_tokens_total{expert="0",layer="2",model_name="macaw"} 5.0' in lines
        assert 'moeyard:expert_load_imbalance{layer="2",model_name="macaw"} 2.5' in lines
        assert 'moeyard:request_success_total{finished_reason="stop",model_name="parrot"} 5.0' in lines
        assert sum(line.startswith("moeyard:request_success_total{") for line in lines) == 1
        assert text.count("# TYPE moeyard:generation_tokens_total counter") == 1  # a family is there once
        macaw = (await client.get("/experts/load", params={"model": "macaw"})).json()
        assert (macaw["model"], macaw["layers"], macaw["tokens"]) == ("macaw", [2], [[5, 0, 1]])
        assert (await client.get("/experts/load")).json()["model"] == "parrot"
        missing = await client.get("/experts/load", params={"model": "owl"})
        assert (missing.status_code, missing.json()["error"]["code"]) == (404, "model_not_found")

    call(work, make=TwoParrots)


def test_metrics_of_the_cache_the_passes_and_what_they_read() -> None:
    async def work(client: httpx.AsyncClient, _: ParrotEngine) -> None:
        lines = set((await client.get("/metrics")).text.splitlines())
        for name, value in {
            "kv_cache_usage_perc": 0.25,
            "prefix_cache_queries_total": 100.0,
            "prefix_cache_hits_total": 60.0,
            "prompt_tokens_cached_total": 60.0,
            "num_preemptions_total": 7.0,
            "iteration_tokens_total_count": 8.0,
            "iteration_tokens_total_sum": 90.0,
            "read_bytes_total": 1000.0,
            "read_gb_per_s": 1.5,
        }.items():
            assert f'moeyard:{name}{{model_name="parrot"}} {value}' in lines, name
        for state, count in {"free": 20.0, "cached": 10.0, "used": 10.0}.items():
            assert f'moeyard:kv_cache_blocks{{model_name="parrot",state="{state}"}} {count}' in lines

    call(work)


def test_what_clients_send_makes_no_new_series() -> None:
    """A label that clients choose would let them fill the memory of whoever scrapes."""

    async def work(client: httpx.AsyncClient, _: ParrotEngine) -> None:
        async def series() -> set[str]:
            lines = (await client.get("/metrics")).text.splitlines()
            return {line.rpartition(" ")[0] for line in lines if not line.startswith("#")}

        await client.post("/v1/completions", json={"prompt": "xyz", "user": "first"})
        before = await series()
        for number in range(5):
            body: Json = {"prompt": "x" * number, "user": f"user-{number}", "priority": number, "model": "parrot"}
            await client.post("/v1/completions", json=body, headers={"x-request-id": f"id-{number}"})
            await client.post("/v1/completions", json=body | {"model": f"model-{number}"})
            await client.get(f"/path-{number}")
        assert await series() == before

    call(work)


def test_two_applications_in_one_process_do_not_share_metrics() -> None:
    async def work(client: httpx.AsyncClient, _: ParrotEngine) -> None:
        await client.post("/v1/completions", json={"prompt": "abc"})
        assert 'time_to_first_token_seconds_count{model_name="parrot"} 1.0' in (await client.get("/metrics")).text

    call(work)
    call(work)


class Lines(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@pytest.fixture
def access_log() -> Iterator[list[str]]:
    logger, handler = logging.getLogger("moeyard.serve.access"), Lines()
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield handler.lines
    logger.removeHandler(handler)
    logger.setLevel(before)


def test_access_log_as_text_is_one_line_whatever_the_path(access_log: list[str]) -> None:
    async def work(client: httpx.AsyncClient, _: ParrotEngine) -> None:
        await client.post("/v1/completions", json={"prompt": "abc"}, headers={"x-request-id": "a-1"})
        await client.get("/no%0Asuch", headers={"x-request-id": "a-2"})

    call(work)
    assert re.fullmatch(r"a-1 POST /v1/completions 200 \d+\.\d ms", access_log[0])
    assert re.fullmatch(r"a-2 GET /no\\nsuch 404 \d+\.\d ms", access_log[1])


def test_access_log_as_json_says_what_an_answer_was_made_of(access_log: list[str]) -> None:
    async def work(client: httpx.AsyncClient, _: ParrotEngine) -> None:
        chat: Json = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 2, "n": 2, "stream": True}
        await client.post("/v1/chat/completions", json=chat, headers={"x-request-id": "a-1"})
        await client.post("/v1/completions", json={"prompt": ["ab", "abcd"], "max_tokens": 3})
        await client.post("/v1/completions", json={"prompt": "abort", "stream": True})
        await client.post("/v1/completions", json={"prompt": "bug"})
        await client.post("/v1/embeddings", json={"input": "xy"})
        await client.get("/no%0Asuch")
        await client.post("/v1/completions", json={})

    call(work, ServerSettings(access_log_format="json"))
    entries = [json.loads(line) for line in access_log]
    first = entries[0]
    assert first["ms"] >= 0
    assert datetime.fromisoformat(first["time"]).tzinfo is not None
    assert {key: first[key] for key in first if key not in ("ms", "time")} == {
        "request_id": "a-1",
        "method": "POST",
        "path": "/v1/chat/completions",
        "status": 200,
        "model": "parrot",
        "prompt_tokens": len("User: x\nAssistant:"),
        "completion_tokens": 4,
        "finish": "length",
    }
    made_of = [(e["status"], e.get("prompt_tokens"), e.get("completion_tokens"), e.get("finish")) for e in entries[1:]]
    assert made_of == [
        (200, 6, 5, "length,stop"),
        (200, 5, 1, "abort"),
        (500, 3, 1, "error"),
        (200, 2, 0, "stop"),
        (404, None, None, None),
        (400, None, None, None),
    ]
    assert entries[5]["path"] == "/no\nsuch"
    assert not any("\n" in line for line in access_log)


def test_version_is_that_of_the_installed_package(monkeypatch: pytest.MonkeyPatch) -> None:
    async def work(client: httpx.AsyncClient, _: ParrotEngine) -> None:
        assert (await client.get("/version")).json() == {"version": metadata.version("moeyard")}

        def not_installed(name: str) -> str:
            raise metadata.PackageNotFoundError(name)

        monkeypatch.setattr("serve.http.system.metadata.version", not_installed)
        assert (await client.get("/version")).json() == {"version": "unknown"}

    call(work)


def test_expert_loads_for_live_pictures() -> None:
    async def work(client: httpx.AsyncClient, engine: ParrotEngine) -> None:
        assert (await client.get("/experts/load")).json() == {
            "model": "parrot",
            "gate": "topk",
            "weights_version": "abc123def456789",
            "layers": [1, 3],
            "num_experts": 2,
            "tokens": [[3, 1], [0, 0]],
            "imbalance": [1.5, 1.0],
            "requests_running": 1,
            "requests_waiting": 2,
            "kv_cache_usage": 0.25,
            "generation_tokens": 50,
        }
        engine.load_LE = ()  # a dense model, or an engine that has not counted yet
        empty = (await client.get("/experts/load")).json()
        assert (empty["layers"], empty["tokens"], empty["imbalance"]) == ([], [], [])

    call(work)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"admin_key": " "}, "admin key must not be empty"),
        ({"request_timeout_s": 0}, "must be positive, got 0"),
        ({"request_timeout_s": float("nan")}, "must be positive, got nan"),
        ({"access_log_format": "xml"}, "must be text or json, got 'xml'"),
    ],
)
def test_settings_that_make_no_sense(values: Json, words: str) -> None:
    with pytest.raises(UserError, match=words):
        ServerSettings(**values)
