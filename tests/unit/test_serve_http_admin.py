"""/admin: closed without a key of its own, closed for ordinary keys, and what it does for the right one."""

from __future__ import annotations

import json

import httpx
import pytest

from serve.client import EngineClient
from serve.http.app import build_app
from serve.http.guard import RequestGuard
from serve.http.keys import route_path
from serve.http.settings import ServerSettings
from tests.parrot_engine import Json, ParrotEngine, call

pytestmark = pytest.mark.unit

ROUTES = [
    ("POST", "/admin/weights"),
    ("POST", "/admin/experts/start"),
    ("POST", "/admin/experts/stop"),
    ("GET", "/admin/experts"),
    ("POST", "/admin/prefix_cache/reset"),
]
ROOT = {"authorization": "Bearer root"}
WITH_KEYS = ServerSettings(api_keys=("sk-user",), admin_key="root")


@pytest.mark.parametrize("api_keys", [(), ("sk-user",)])
def test_without_an_admin_key_everything_under_admin_is_closed(api_keys: tuple[str, ...]) -> None:
    async def work(client: httpx.AsyncClient, engine: ParrotEngine) -> None:
        for method, path in [*ROUTES, ("GET", "/admin"), ("GET", "/admin/"), ("PUT", "/admin/nothing")]:
            for header in ({}, {"authorization": "Bearer sk-user"}, {"authorization": "Bearer None"}):
                answer = await client.request(method, path, headers=header, json={"path": "/models/2"})
                assert answer.status_code == 403, (path, header)
                error = answer.json()["error"]
                assert (error["code"], error["type"]) == ("admin_key_required", "permission_error")
                assert "started without an admin key" in error["message"]
        assert engine.swaps == []

    call(work, ServerSettings(api_keys=api_keys))


def test_only_the_admin_key_opens_admin_and_it_opens_nothing_else() -> None:
    async def work(client: httpx.AsyncClient, engine: ParrotEngine) -> None:
        for method, path in [*ROUTES, ("GET", "/admin/nothing")]:
            for header in ({}, {"authorization": "Bearer sk-user"}, {"authorization": "Bearer roo"}):
                answer = await client.request(method, path, headers=header, json={"path": "/models/2"})
                assert answer.status_code == 401, (path, header)
                assert answer.json()["error"]["code"] == "invalid_api_key"
                assert answer.headers["www-authenticate"] == "Bearer"
        assert engine.swaps == []
        for path in ("/v1/models", "/experts/load", "/metrics", "/version"):
            assert (await client.get(path, headers=ROOT)).status_code == 401, path
            assert (await client.get(path, headers={"authorization": "Bearer sk-user"})).status_code == 200
        assert (await client.get("/admin/nothing", headers=ROOT)).status_code == 404
        assert (await client.get("/admin/weights", headers=ROOT)).status_code == 405
        assert (await client.get("/administer", headers=ROOT)).status_code == 401  # no path of ours

    call(work, WITH_KEYS)


def test_a_key_may_be_both() -> None:
    async def work(client: httpx.AsyncClient, _: ParrotEngine) -> None:
        assert (await client.get("/v1/models", headers=ROOT)).status_code == 200
        assert (await client.get("/admin/experts", headers=ROOT)).status_code == 200

    call(work, ServerSettings(api_keys=("root",), admin_key="root"))


@pytest.mark.parametrize(
    ("path", "prefix", "routed"),
    [
        ("/admin/x", "", "/admin/x"),
        ("/llm/admin/x", "/llm", "/admin/x"),
        ("/llm", "/llm", ""),
        ("/llmadmin/x", "/llm", "/llmadmin/x"),
        ("/admin/x", "/llm", "/admin/x"),
    ],
)
def test_paths_mean_the_same_to_the_gate_as_to_the_router(path: str, prefix: str, routed: str) -> None:
    assert route_path({"path": path, "root_path": prefix}) == routed


def test_behind_a_prefix_ordinary_keys_do_not_open_admin() -> None:
    async def work(client: httpx.AsyncClient, engine: ParrotEngine) -> None:
        transport = httpx.ASGITransport(build_app(engine, WITH_KEYS), root_path="/llm")
        async with httpx.AsyncClient(transport=transport, base_url="http://server/llm") as mounted:
            body = {"path": "/models/2"}
            user = {"authorization": "Bearer sk-user"}
            assert (await mounted.post("/admin/weights", json=body, headers=user)).status_code == 401
            assert engine.swaps == []
            assert (await mounted.post("/admin/weights", json=body, headers=ROOT)).status_code == 200
            assert (await mounted.get("/v1/models", headers=user)).status_code == 200

    call(work)


def test_handlers_do_not_rely_on_the_gate_alone() -> None:
    async def work(_: httpx.AsyncClient, engine: ParrotEngine) -> None:
        class Asleep(RequestGuard):
            def _refusal(self, *_: object) -> None:
                return None

        app = build_app(engine, WITH_KEYS)
        app.user_middleware.clear()
        app.add_middleware(Asleep, settings=WITH_KEYS)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server") as client:
            for method, path in ROUTES:
                answer = await client.request(method, path, headers=ROOT, json={"path": "/models/2"})
                assert (answer.status_code, answer.json()["error"]["code"]) == (403, "admin_key_required"), path
        assert engine.swaps == []

    call(work)


def test_weights_are_swapped_and_answers_say_so() -> None:
    async def work(client: httpx.AsyncClient, engine: ParrotEngine) -> None:
        for body, order in (
            ({"path": "/models/two"}, ("parrot", "/models/two", "drain")),
            ({"path": "/models/three", "model": "parrot", "running": "keep"}, ("parrot", "/models/three", "keep")),
        ):
            answer = await client.post("/admin/weights", json=body, headers=ROOT)
            assert answer.status_code == 200, answer.text
            assert answer.json() == {"weights_version": body["path"].removeprefix("/models/")}
            assert engine.swaps[-1] == order
        completion = await client.post("/v1/completions", json={"prompt": "x"})
        assert completion.json()["system_fingerprint"] == "fp_three"

    call(work, ServerSettings(admin_key="root"))


def test_bad_orders_name_the_field_and_change_nothing() -> None:
    async def work(client: httpx.AsyncClient, engine: ParrotEngine) -> None:
        cases: list[tuple[str, Json, int, str, str]] = [
            ("/admin/weights", {}, 400, "path", "Field required"),
            ("/admin/weights", {"path": ""}, 400, "path", "at least 1 character"),
            ("/admin/weights", {"path": 5}, 400, "path", "valid string"),
            ("/admin/weights", {"path": "x" * 4097}, 400, "path", "at most 4096"),
            ("/admin/weights", {"path": "\ud800"}, 400, "path", "unicode string"),
            ("/admin/weights", {"path": "/models/\x00"}, 400, "path", "null character"),
            ("/admin/weights", {"path": "/tmp"}, 400, "path", "/tmp: not a model directory"),
            ("/admin/weights", {"path": "/models/2", "running": "kill"}, 400, "running", "'drain' or 'keep'"),
            ("/admin/weights", {"path": "/models/2", "model": "gpt-9"}, 404, "model", "`gpt-9` does not exist"),
            ("/admin/experts/start?model=gpt-9", {}, 404, "model", "`gpt-9` does not exist"),
            ("/admin/prefix_cache/reset?model=" + "m" * 513, {}, 400, "model", "at most 512"),
        ]
        for path, body, status, param, words in cases:
            headers = ROOT | {"content-type": "application/json"}
            answer = await client.post(path, content=json.dumps(body), headers=headers)
            assert answer.status_code == status, (path, body, answer.text)
            assert answer.json()["error"]["param"] == param
            assert words in answer.json()["error"]["message"]
        assert engine.swaps == []

    call(work, ServerSettings(admin_key="root"))


def test_expert_loads_are_recorded_between_start_and_stop() -> None:
    async def work(client: httpx.AsyncClient, _: ParrotEngine) -> None:
        head = {"model": "parrot", "gate": "topk", "weights_version": "abc123def456789", "num_experts": 2}
        nothing = head | {"recording": False, "seconds": 0.0, "steps": 0, "tokens": 0}
        empty = nothing | {"layers": [], "load": [], "imbalance": [], "peak_imbalance": []}
        assert (await client.get("/admin/experts", headers=ROOT)).json() == empty
        zero = {"layers": [1, 3], "load": [[0, 0], [0, 0]], "imbalance": [1.0, 1.0], "peak_imbalance": [1.0, 1.0]}
        started = await client.post("/admin/experts/start", headers=ROOT)
        assert started.json() == nothing | zero | {"recording": True}
        counted = head | {
            "recording": False,
            "seconds": 2.5,
            "steps": 4,
            "tokens": 9,
            "layers": [1, 3],
            "load": [[6, 3], [9, 0]],
            "imbalance": [1.3333, 2.0],
            "peak_imbalance": [1.5, 2.0],
        }
        assert (await client.post("/admin/experts/stop?model=parrot", headers=ROOT)).json() == counted
        assert (await client.get("/admin/experts", headers=ROOT)).json() == counted

    call(work, ServerSettings(admin_key="root"))


def test_the_prefix_cache_is_reset() -> None:
    async def work(client: httpx.AsyncClient, engine: ParrotEngine) -> None:
        assert isinstance(engine, EngineClient)
        answer = await client.post("/admin/prefix_cache/reset", headers=ROOT)
        assert (answer.status_code, answer.json()) == (200, {"blocks_freed": 3})

    call(work, ServerSettings(admin_key="root"))
