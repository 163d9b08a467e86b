"""Vectors and tokens over HTTP: /v1/embeddings as OpenAI's client asks for it, /tokenize and /detokenize as vLLM's."""

from __future__ import annotations

import asyncio
import base64
import struct

import httpx
import openai
import openai.types
import pytest

from serve.http.app import build_app
from tests.parrot_engine import VECTORS, Json, ParrotEngine, call

pytestmark = pytest.mark.unit

TEMPLATE = """\
{%- for tool in tools or [] %}[{{ tool.function.name }}]{% endfor %}
{%- for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}
{%- if add_generation_prompt %}<assistant>{% endif %}"""


@pytest.mark.parametrize(
    ("given", "inputs"),
    [
        ("ab", ("ab",)),
        (["ab", "c"], ("ab", "c")),
        ([97, 98], ((97, 98),)),
        ([[97], [98, 99]], ((97,), (98, 99))),
    ],
)
def test_embeddings_take_four_forms_and_answer_in_openai_shape(given: object, inputs: tuple[object, ...]) -> None:
    async def work(client: httpx.AsyncClient, engine: ParrotEngine) -> None:
        body = {"input": given, "model": "parrot", "encoding_format": "float", "user": "u", "dimensions": 3}
        answer = await client.post("/v1/embeddings", json=body)
        assert answer.status_code == 200, answer.text
        parsed = openai.types.CreateEmbeddingResponse.model_validate(answer.json(), strict=True)
        assert [item.embedding for item in parsed.data] == [list(vector) for vector in VECTORS[: len(inputs)]]
        assert [item.index for item in parsed.data] == list(range(len(inputs)))
        assert (parsed.object, parsed.model) == ("list", "parrot")
        total = sum(map(len, inputs))  # type: ignore[arg-type]
        assert answer.json()["usage"] == {"prompt_tokens": total, "total_tokens": total}
        assert engine.embedded[0].inputs == inputs
        assert engine.embedded[0].request_id.startswith("embd-")

    call(work)


def test_embeddings_in_base64_are_float32_in_little_endian() -> None:
    async def work(client: httpx.AsyncClient, engine: ParrotEngine) -> None:
        answer = await client.post("/v1/embeddings", json={"input": ["a", "b"], "encoding_format": "base64"})
        for item, vector in zip(answer.json()["data"], VECTORS, strict=True):
            assert base64.b64decode(item["embedding"], validate=True) == struct.pack("<3f", *vector)
        plain = await client.post("/v1/embeddings", json={"input": "a", "encoding_format": None, "priority": -3})
        assert plain.json()["data"][0]["embedding"] == [0.6, 0.8, 0.0]
        assert [request.priority for request in engine.embedded] == [0, -3]

    call(work)


def test_openai_client_which_asks_for_base64_by_itself_gets_floats() -> None:
    async def run() -> None:
        transport = httpx.ASGITransport(build_app(ParrotEngine()))
        async with openai.AsyncOpenAI(
            base_url="http://server/v1", api_key="none", http_client=httpx.AsyncClient(transport=transport)
        ) as client:
            answer = await client.embeddings.create(model="parrot", input=["a", "bc"])
            for item, vector in zip(answer.data, VECTORS, strict=True):
                assert item.embedding == pytest.approx(vector, abs=1e-7)
            assert answer.usage.prompt_tokens == 3
            with pytest.raises(openai.BadRequestError) as shorter:
                await client.embeddings.create(model="parrot", input="a", dimensions=2)
            assert shorter.value.param == "dimensions"

    asyncio.run(run())


def test_a_full_queue_refuses_embeddings_too() -> None:
    async def work(client: httpx.AsyncClient, engine: ParrotEngine) -> None:
        engine.full = True
        answer = await client.post("/v1/embeddings", json={"input": "a"})
        assert (answer.status_code, answer.headers["retry-after"]) == (429, "3")

    call(work)


def test_tokenize_a_text_and_back() -> None:
    async def work(client: httpx.AsyncClient, _: ParrotEngine) -> None:
        body: Json = {"model": "parrot", "prompt": "aé", "add_special_tokens": True}
        assert (await client.post("/tokenize", json=body)).json() == {
            "count": 2,
            "max_model_len": 1000,
            "tokens": [97, 233],
            "token_strs": None,
        }
        named = (await client.post("/tokenize", json={"prompt": "abab", "return_token_strs": True})).json()
        assert named["token_strs"] == ["a", "b", "a", "b"]
        back = await client.post("/detokenize", json={"model": "parrot", "tokens": [97, 233]})
        assert back.json() == {"prompt": "aé"}
        assert (await client.post("/detokenize", json={"tokens": []})).json() == {"prompt": ""}
        assert (await client.post("/tokenize", json={"prompt": ""})).json()["count"] == 0

    call(work)


def test_tokenize_renders_messages_as_the_chat_route_does() -> None:
    async def work(client: httpx.AsyncClient, engine: ParrotEngine) -> None:
        messages = [{"role": "user", "content": "hi"}]
        tools = [{"type": "function", "function": {"name": "f"}}]
        for extra, text in (
            ({}, "<user>hi<assistant>"),
            ({"add_generation_prompt": False}, "<user>hi"),
            ({"tools": tools}, "[f]<user>hi<assistant>"),
        ):
            body = {"messages": messages, **extra}
            tokens = (await client.post("/tokenize", json=body)).json()["tokens"]
            assert "".join(map(chr, tokens)) == text
            await client.post("/v1/chat/completions", json=body)
            assert engine.seen[-1].prompts == (text,)

    call(work, make=lambda: ParrotEngine(chat_template=TEMPLATE))


def test_tokenize_refuses_what_the_chat_route_refuses() -> None:
    async def work(client: httpx.AsyncClient, _: ParrotEngine) -> None:
        tools = [{"type": "function", "function": {"name": "f"}}]
        body = {"messages": [{"role": "user", "content": "hi"}], "tools": tools}
        for route in ("/tokenize", "/v1/chat/completions"):
            answer = await client.post(route, json=body)
            assert answer.status_code == 400
            assert answer.json()["error"]["param"] == "tools"
            assert "template has no tools" in answer.json()["error"]["message"]

    call(work)
