"""Fields that ask for more than text: a structure, the experts' choices, token ids, a priority."""

from __future__ import annotations

import json
from typing import Any

import httpx
import openai.types
import openai.types.chat
import pytest

from serve.client import Structure
from tests.parrot_engine import Json, ParrotEngine, call, frames

pytestmark = pytest.mark.unit

SCHEMA = {"type": "object", "properties": {"städte": {"type": "array", "items": {"type": "string"}}}}
SCHEMA_TEXT = json.dumps(SCHEMA, ensure_ascii=False)
BODIES: dict[str, Json] = {
    "/v1/completions": {"prompt": "x"},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "x"}]},
}


def nested(depth: int) -> Json:
    value: Json = {}
    for _ in range(depth - 1):
        value = {"items": value}
    return value


@pytest.mark.parametrize("route", BODIES)
@pytest.mark.parametrize(
    ("fields", "structure"),
    [
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": None}, None),
        ({"response_format": {"type": "json_object"}}, Structure("json_object")),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "n", "schema": SCHEMA, "strict": True},
                }
            },
            Structure("json_schema", SCHEMA_TEXT),
        ),
        ({"structured_outputs": {"json": SCHEMA}}, Structure("json_schema", SCHEMA_TEXT)),
        ({"structured_outputs": {"json": SCHEMA_TEXT}}, Structure("json_schema", SCHEMA_TEXT)),
        ({"structured_outputs": {"regex": "[0-9]+", "json": None}}, Structure("regex", "[0-9]+")),
        ({"structured_outputs": {"choice": ["ja", "nö"]}}, Structure("choice", '["ja", "nö"]')),
        ({"structured_outputs": {"grammar": 'start: "a"'}}, Structure("grammar", 'start: "a"')),
        ({"structured_outputs": {"json_object": True}}, Structure("json_object")),
        ({"structured_outputs": {"json_object": False, "whitespace_pattern": None}}, None),
        ({"structured_outputs": {}}, None),
        ({"guided_json": SCHEMA}, Structure("json_schema", SCHEMA_TEXT)),
        ({"guided_json": {}}, Structure("json_schema", "{}")),
        ({"guided_json": SCHEMA_TEXT}, Structure("json_schema", SCHEMA_TEXT)),
        ({"guided_regex": "a|b"}, Structure("regex", "a|b")),
        ({"guided_choice": ["a"]}, Structure("choice", '["a"]')),
        ({"guided_grammar": 'start: "a"'}, Structure("grammar", 'start: "a"')),
        ({"guided_regex": "a", "guided_json": None, "response_format": {"type": "text"}}, Structure("regex", "a")),
        ({"guided_json": nested(32)}, Structure("json_schema", json.dumps(nested(32)))),
    ],
)
def test_every_way_to_ask_for_a_structure(route: str, fields: Json, structure: Structure | None) -> None:
    async def work(client: httpx.AsyncClient, engine: ParrotEngine) -> None:
        answer = await client.post(route, json=BODIES[route] | fields)
        assert answer.status_code == 200, answer.text
        assert engine.seen[0].sampling.structure == structure

    call(work)


LARGE = {"enum": ["x" * 70_000]}
BAD: list[tuple[Json, str, str, str]] = [
    # fields, param, code, words of the message
    ({"response_format": "json_object"}, "response_format", "invalid_value", "object with a `type`"),
    ({"response_format": {}}, "response_format", "invalid_value", "object with a `type`"),
    ({"response_format": {"type": "xml"}}, "response_format", "unsupported_parameter", "got 'xml'"),
    ({"response_format": {"type": "json_schema"}}, "response_format", "invalid_value", "with a `schema`"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "n"}}},
        "response_format",
        "invalid_value",
        "with a `schema`",
    ),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"schema": "{}"}}},
        "response_format",
        "invalid_value",
        "with a `schema`",
    ),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"schema": LARGE}}},
        "response_format",
        "invalid_value",
        "at most 65536",
    ),
    ({"guided_json": True}, "guided_json", "invalid_value", "must be an object"),
    ({"guided_json": "{"}, "guided_json", "invalid_value", "valid JSON"),
    ({"guided_json": "[1]"}, "guided_json", "invalid_value", "must be an object"),
    ({"guided_json": "[" * 50_000}, "guided_json", "invalid_value", "valid JSON"),
    ({"guided_json": nested(33)}, "guided_json", "invalid_value", "at most 32 levels"),
    ({"guided_json": {"const": "\ud800"}}, "guided_json", "invalid_value", "lone surrogate"),
    ({"guided_json": LARGE}, "guided_json", "invalid_value", "at most 65536"),
    ({"guided_regex": ""}, "guided_regex", "invalid_value", "not empty"),
    ({"guided_regex": ["a"]}, "guided_regex", "invalid_value", "must be a string"),
    ({"guided_regex": "(" * 70_000}, "guided_regex", "invalid_value", "at most 65536"),
    ({"guided_regex": "\ud800"}, "guided_regex", "invalid_value", "lone surrogate"),
    ({"guided_regex": "("}, "guided_regex", "invalid_value", "unclosed group"),  # the engine's own words
    ({"structured_outputs": {"regex": "("}}, "structured_outputs", "invalid_value", "unclosed group"),
    ({"guided_grammar": 5}, "guided_grammar", "invalid_value", "Lark grammar must be a string"),
    ({"guided_choice": []}, "guided_choice", "invalid_value", "none of them empty"),
    ({"guided_choice": "ab"}, "guided_choice", "invalid_value", "list of strings"),
    ({"guided_choice": ["a", 1]}, "guided_choice", "invalid_value", "list of strings"),
    ({"guided_choice": ["a", ""]}, "guided_choice", "invalid_value", "none of them empty"),
    ({"guided_choice": ["a"] * 1025}, "guided_choice", "invalid_value", "at most 1024"),
    ({"structured_outputs": "json"}, "structured_outputs", "invalid_value", "one of json, regex"),
    ({"structured_outputs": {"json_object": 1}}, "structured_outputs", "invalid_value", "true or false"),
    (
        {"structured_outputs": {"structural_tag": "{}"}},
        "structured_outputs",
        "unsupported_parameter",
        "`structural_tag` is not supported",
    ),
    (
        {"structured_outputs": {"regex": "a", "choice": ["a"]}},
        "structured_outputs",
        "invalid_value",
        "only one of json, regex, choice, grammar, json_object",
    ),
    (
        {"guided_regex": "a", "response_format": {"type": "json_object"}},
        "guided_regex",
        "invalid_value",
        "`response_format` and `guided_regex` both ask",
    ),
    ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_choice", "invalid_value", "both ask for a structure"),
]


@pytest.mark.parametrize("route", BODIES)
def test_structures_that_make_no_sense_are_refused(route: str) -> None:
    async def work(client: httpx.AsyncClient, engine: ParrotEngine) -> None:
        for fields, param, code, words in BAD:
            content = json.dumps(BODIES[route] | fields)
            answer = await client.post(route, content=content, headers={"content-type": "application/json"})
            shown = (content[:200], answer.text[:300])
            assert answer.status_code == 400, shown
            error = answer.json()["error"]
            assert (error["param"], error["code"]) == (param, code), shown
            assert words in error["message"], shown
            assert len(error["message"]) < 500
        assert engine.seen == []

    call(work)


def test_priority_and_the_tokenizer_switch_reach_the_engine_or_nothing() -> None:
    async def work(client: httpx.AsyncClient, engine: ParrotEngine) -> None:
        for body, priority in (({}, 0), ({"priority": None}, 0), ({"priority": -5}, -5), ({"priority": 7}, 7)):
            await client.post("/v1/completions", json={"prompt": "x", "add_special_tokens": False, **body})
            assert engine.seen[-1].priority == priority
            await client.post("/v1/chat/completions", json=BODIES["/v1/chat/completions"] | body)
            assert engine.seen[-1].priority == priority
        assert len({request.prompts for request in engine.seen if request.prompts == ("x",)}) == 1

    call(work)


def merged(events: list[Json], field: str) -> list[list[Any]]:
    """What a stream says about each choice, put together."""
    parts: list[list[Any]] = [[], []]
    for event in events:
        for choice in event["choices"]:
            parts[choice["index"]] += choice.get(field, [])
    return parts


@pytest.mark.parametrize("route", BODIES)
@pytest.mark.parametrize("piece", [1, 3])
def test_routing_and_token_ids_have_one_entry_per_token_whole_and_streamed(route: str, piece: int) -> None:
    async def work(client: httpx.AsyncClient, engine: ParrotEngine) -> None:
        asked = {"return_routing": True, "return_token_ids": True, "n": 2, "max_tokens": 5}
        whole = (await client.post(route, json=BODIES[route] | asked)).json()
        assert engine.seen[0].return_routing
        said = "héllo"
        routing = [
            {"experts": [[ord(char) % 2], [1]], "weights": [[0.1235], [1.0]]}  # four digits
            for char in said
        ]
        for choice in whole["choices"]:
            assert choice["token_ids"] == list(map(ord, said))
            assert choice["routing"] == routing
        streamed = frames((await client.post(route, json=BODIES[route] | asked | {"stream": True})).text)
        assert merged(streamed, "token_ids") == [list(map(ord, said))] * 2
        assert merged(streamed, "routing") == [routing] * 2
        # Fields that OpenAI does not know do not disturb its client's types.
        if route == "/v1/completions":
            openai.types.Completion.model_validate(whole)
        else:
            openai.types.chat.ChatCompletion.model_validate(whole)
            for event in streamed:
                openai.types.chat.ChatCompletionChunk.model_validate(event)
        plain = (await client.post(route, json=BODIES[route])).json()["choices"][0]
        assert not {"routing", "token_ids"} & set(plain)
        assert not engine.seen[-1].return_routing

    call(work, make=lambda: ParrotEngine(says="héllo, world", piece=piece))


def test_token_ids_with_echo_are_those_of_the_answer() -> None:
    async def work(client: httpx.AsyncClient, _: ParrotEngine) -> None:
        body = {"prompt": "abc", "echo": True, "max_tokens": 2, "return_token_ids": True}
        choice = (await client.post("/v1/completions", json=body)).json()["choices"][0]
        assert (choice["text"], choice["token_ids"]) == ("abcab", [97, 98])

    call(work)
