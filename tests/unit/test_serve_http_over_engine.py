"""The HTTP layer over the real engine and a tiny random model, lest the parrot of the other tests flatter it."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import math
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest
import torch

from moe import ModelConfig, MoEConfig, Transformer
from moe.checkpoint import save_model
from moe.tokenizer import Tokenizer
from serve.engine.engine import AsyncEngine
from serve.engine.load import load_engine
from serve.engine.settings import EngineSettings
from serve.http.app import build_app
from serve.http.settings import ServerSettings
from tests.parrot_engine import Json, frames

pytestmark = pytest.mark.unit

TOKENIZER = Tokenizer.bytes()
TEMPLATE = "{{ tools | length if tools }}{% for message in messages %}{{ message.content }}{% endfor %}"
ROOT = {"authorization": "Bearer root"}


def save(folder: Path, seed: int) -> None:
    config = ModelConfig(
        vocab_size=TOKENIZER.vocab_size,
        dim=16,
        num_layers=2,
        num_heads=2,
        max_seq_len=512,
        moe=MoEConfig(num_experts=4, hidden_dim=16),
    )
    model = Transformer(config)
    model.init_weights(seed)
    save_model(folder, model.eval(), TOKENIZER)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("models")
    save(folder / "one", 0)
    save(folder / "two", 1)
    return folder


def over_engine(models: Path, work: Callable[[httpx.AsyncClient, AsyncEngine], Awaitable[None]]) -> None:
    """Runs ``work`` with a client of an application over a fresh engine."""

    @asynccontextmanager
    async def running() -> AsyncIterator[AsyncEngine]:
        engine = load_engine(models / "one", model_id="tiny", settings=EngineSettings(max_sequences=4, threads=1))
        engine.info = dataclasses.replace(engine.info, chat_template=TEMPLATE)
        await engine.start()
        try:
            yield engine
        finally:
            await engine.stop()

    async def run() -> None:
        async with running() as engine:
            transport = httpx.ASGITransport(build_app(engine, ServerSettings(admin_key="root")))
            async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
                await asyncio.wait_for(work(client, engine), 60)

    asyncio.run(run())


async def post(client: httpx.AsyncClient, path: str, body: Json) -> Json:
    answer = await client.post(path, json=body, headers=ROOT)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def test_vectors_and_tokens(models: Path) -> None:
    async def work(client: httpx.AsyncClient, engine: AsyncEngine) -> None:
        dim = engine.info.embedding_dim
        same = await post(client, "/v1/embeddings", {"input": ["ab", "ab", "c"], "dimensions": dim})
        vectors = [item["embedding"] for item in same["data"]]
        assert [len(vector) for vector in vectors] == [dim] * 3
        assert math.isclose(sum(x * x for x in vectors[0]), 1.0, rel_tol=1e-5)
        assert vectors[0] == pytest.approx(vectors[1], abs=1e-6)
        assert vectors[0] != pytest.approx(vectors[2], abs=1e-3)
        assert same["usage"]["prompt_tokens"] == 5
        tokens = await post(client, "/tokenize", {"prompt": "aé", "return_token_strs": True})
        assert tokens["tokens"] == TOKENIZER.encode("aé")
        assert tokens["token_strs"] == ["a", "\ufffd", "\ufffd"]
        assert (await post(client, "/detokenize", {"tokens": tokens["tokens"]}))["prompt"] == "aé"
        unknown = await client.post("/detokenize", json={"tokens": [10**6]})
        assert (unknown.status_code, unknown.json()["error"]["param"]) == (400, "tokens")

    over_engine(models, work)


def test_routing_and_token_ids_line_up_with_usage(models: Path) -> None:
    async def work(client: httpx.AsyncClient, engine: AsyncEngine) -> None:
        body: Json = {
            "prompt": ["Gr", "x"],
            "n": 2,
            "max_tokens": 6,
            "seed": 3,
            "ignore_eos": True,
            "return_routing": True,
            "return_token_ids": True,
        }
        whole = (await post(client, "/v1/completions", body))["choices"]
        layers = len(engine.info.moe_layers)
        for choice in whole:
            assert len(choice["routing"]) == len(choice["token_ids"]) == 6
            for token in choice["routing"]:
                assert len(token["experts"]) == len(token["weights"]) == layers
                assert all(0 <= expert < 4 for layer in token["experts"] for expert in layer)
        streamed = frames((await client.post("/v1/completions", json=body | {"stream": True})).text)
        for field in ("token_ids", "routing"):
            parts: list[list[object]] = [[] for _ in whole]
            for event in streamed:
                for choice in event["choices"]:
                    parts[choice["index"]] += choice[field]
            assert parts == [choice[field] for choice in whole]
        loads = (await client.get("/experts/load")).json()
        assert loads["layers"] == list(engine.info.moe_layers)
        assert [len(row) for row in loads["tokens"]] == [loads["num_experts"]] * layers
        assert loads["generation_tokens"] == 48

    over_engine(models, work)


def test_structures_and_forced_calls(models: Path) -> None:
    pytest.importorskip("llguidance", reason="structured output needs the serve extra: pip install 'moeyard[serve]'")

    async def work(client: httpx.AsyncClient, _: AsyncEngine) -> None:
        schema = {
            "type": "object",
            "properties": {"city": {"enum": ["Rome", "Oslo"]}},
            "required": ["city"],
            "additionalProperties": False,
        }
        wanted = {"type": "json_schema", "json_schema": {"name": "place", "schema": schema, "strict": True}}
        free: Json = {"prompt": "x", "max_tokens": 60, "temperature": 1.0, "seed": 1}
        text = (await post(client, "/v1/completions", free | {"response_format": wanted}))["choices"][0]["text"]
        assert json.loads(text)["city"] in ("Rome", "Oslo")
        text = (await post(client, "/v1/completions", free | {"guided_choice": ["ja", "nö"]}))["choices"][0]["text"]
        assert text in ("ja", "nö")
        text = (await post(client, "/v1/completions", free | {"structured_outputs": {"regex": "[ab]{4}!"}}))["choices"]
        assert set(text[0]["text"][:4]) <= {"a", "b"}

        tool: Json = {"type": "function", "function": {"name": "weather", "parameters": schema}}
        chat: Json = {
            "messages": [{"role": "user", "content": "x"}],
            "tools": [tool],
            "tool_choice": {"type": "function", "function": {"name": "weather"}},
            "seed": 1,
        }
        choice = (await post(client, "/v1/chat/completions", chat))["choices"][0]
        assert choice["finish_reason"] == "tool_calls"
        (made,) = choice["message"]["tool_calls"]
        assert made["function"]["name"] == "weather"
        assert json.loads(made["function"]["arguments"])["city"] in ("Rome", "Oslo")
        streamed = frames((await client.post("/v1/chat/completions", json=chat | {"stream": True})).text)
        calls = [c for e in streamed for c in e["choices"][0]["delta"].get("tool_calls", [])]
        assert [call["function"] for call in calls] == [made["function"]]
        broken = await client.post("/v1/completions", json=free | {"guided_regex": "("})
        assert (broken.status_code, broken.json()["error"]["param"]) == (400, "guided_regex")
        tool["function"]["parameters"] = {"type": "object", "properties": {"x": {"$ref": "#/nowhere"}}}
        refused = await client.post("/v1/chat/completions", json=chat)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "tools"), refused.text

    over_engine(models, work)


def test_orders_of_the_administrator(models: Path) -> None:
    async def work(client: httpx.AsyncClient, engine: AsyncEngine) -> None:
        body: Json = {"prompt": "Gr" * 40, "max_tokens": 8, "temperature": 0, "ignore_eos": True}
        before = await post(client, "/v1/completions", body)
        assert (await post(client, "/admin/experts/start", {}))["recording"] is True
        again = await post(client, "/v1/completions", body)
        assert again["choices"][0]["text"] == before["choices"][0]["text"]
        assert again["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
        record = await post(client, "/admin/experts/stop", {})
        assert record["recording"] is False
        # Each position that was computed chose as many experts as the gate does.
        assert record["tokens"] > 0
        assert all(sum(row) % record["tokens"] == 0 for row in record["load"])
        assert len(record["imbalance"]) == len(record["peak_imbalance"]) == len(engine.info.moe_layers)
        assert (await post(client, "/admin/prefix_cache/reset", {}))["blocks_freed"] > 0
        swapped = await post(client, "/admin/weights", {"path": str(models / "two")})
        assert swapped["weights_version"] == engine.info.weights_version
        after = await post(client, "/v1/completions", body)
        assert after["system_fingerprint"] != before["system_fingerprint"]
        assert after["choices"][0]["text"] != before["choices"][0]["text"]
        for path in (str(models), str(models / "missing"), "/etc/passwd"):
            refused = await client.post("/admin/weights", json={"path": path}, headers=ROOT)
            assert (refused.status_code, refused.json()["error"]["param"]) == (400, "path"), refused.text
        assert (await post(client, "/v1/completions", body))["choices"][0]["text"] == after["choices"][0]["text"]

    over_engine(models, work)
