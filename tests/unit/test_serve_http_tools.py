"""Function calls in chat: what the template sees, what becomes of the answer, whole and streamed."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import openai
import openai.types.chat
import pytest

from serve.http.app import build_app
from serve.protocol.chat_template import ChatTemplate
from serve.protocol.tool_calls import CLOSE, OPEN
from tests.parrot_engine import Json, ParrotEngine, call, frames

pytestmark = pytest.mark.unit

# As Qwen's: functions in the system's turn, calls with their arguments as JSON, results as the user's.
TEMPLATE = """\
{%- if tools %}<system>{% for tool in tools %}{{ tool | tojson }}
{% endfor %}{% endif %}
{%- for message in messages %}
{%- if message.role == "tool" %}<result {{ message.tool_call_id }}>{{ message.content }}
{%- else %}<{{ message.role }}>{{ message.content }}
{%- for call in message.tool_calls or [] %}
{%- set call = call.function %}[{{ call.name }}
{{- " " }}{{ call.arguments | tojson if call.arguments is mapping else "raw " + call.arguments }}]
{%- endfor %}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}<assistant>{% endif %}"""
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Wetter für eine Stadt",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
NOW = {"type": "function", "function": {"name": "now"}}
USER = {"role": "user", "content": "Rome?"}
ASK: Json = {"messages": [USER], "tools": [WEATHER]}
ROME = f'{OPEN}\n{{"name": "get_weather", "arguments": {{"city": "Rome"}}}}\n{CLOSE}'
ROUTE = "/v1/chat/completions"


def saying(text: str, piece: int = 1) -> Any:
    return lambda: ParrotEngine(says=text, piece=piece, chat_template=TEMPLATE)


def test_the_template_sees_tools_calls_and_results() -> None:
    async def work(client: httpx.AsyncClient, engine: ParrotEngine) -> None:
        calls = [
            {"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Rome"}'}},
            {"id": "c2", "type": "function", "function": {"name": "now", "arguments": "not JSON"}},
            {"id": "c3", "type": "function", "function": {"name": "now", "arguments": "[1]"}},
            {"id": "c4", "type": "function", "function": {"name": "now", "arguments": {}}},
        ]
        messages = [
            USER,
            {"role": "assistant", "content": None, "tool_calls": calls},
            {"role": "tool", "tool_call_id": "c1", "content": "sunny"},
        ]
        answer = await client.post(ROUTE, json={"messages": messages, "tools": [WEATHER, NOW]})
        assert answer.status_code == 200, answer.text
        assert engine.seen[0].prompts == (
            f"<system>{json.dumps(WEATHER, ensure_ascii=False)}\n{json.dumps(NOW)}\n<user>Rome?"
            '<assistant>[get_weather {"city": "Rome"}][now raw not JSON][now raw [1]][now {}]'
            "<result c1>sunny<assistant>",
        )

    call(work, make=saying("ok"))


@pytest.mark.parametrize("choice", ["none", "auto", None])
def test_without_being_forced_the_answer_is_free(choice: str | None) -> None:
    async def work(client: httpx.AsyncClient, engine: ParrotEngine) -> None:
        answer = await client.post(ROUTE, json=ASK | {"tool_choice": choice})
        assert engine.seen[0].sampling.structure is None
        assert str(engine.seen[0].prompts[0]).startswith("<user>" if choice == "none" else "<system>")
        message = answer.json()["choices"][0]["message"]
        # With "none" nobody has told the model of tools, so what looks like a call is its text.
        assert ("tool_calls" in message) is (choice != "none")
        assert message["content"] == (ROME if choice == "none" else None)

    call(work, make=saying(ROME))


@pytest.mark.parametrize(
    ("text", "content", "calls", "finish"),
    [
        (ROME, None, [("get_weather", {"city": "Rome"})], "tool_calls"),
        (
            f'Both.\n{ROME}\n{OPEN}{{"name": "now", "arguments": {{}}}}{CLOSE}',
            "Both.\n",
            [("get_weather", {"city": "Rome"}), ("now", {})],
            "tool_calls",
        ),
        ("No need.", "No need.", [], "stop"),
        (f"{OPEN}get_weather(Rome){CLOSE}", f"{OPEN}get_weather(Rome){CLOSE}", [], "stop"),
        (ROME[:40], ROME[:40], [], "stop"),
    ],
)
@pytest.mark.parametrize("piece", [1, 7, 1000])
def test_calls_whole_and_streamed(
    text: str, content: str | None, calls: list[tuple[str, Json]], finish: str, piece: int
) -> None:
    async def work(client: httpx.AsyncClient, _: ParrotEngine) -> None:
        body = (await client.post(ROUTE, json=ASK)).json()
        whole = openai.types.chat.ChatCompletion.model_validate(body, strict=True).choices[0]
        assert whole.finish_reason == finish
        assert whole.message.content == content
        made = whole.message.tool_calls or []
        assert [(c.function.name, json.loads(c.function.arguments)) for c in made if c.type == "function"] == calls
        assert ("tool_calls" in body["choices"][0]["message"]) is bool(calls)
        assert len({c.id for c in made}) == len(calls)

        events = frames((await client.post(ROUTE, json=ASK | {"stream": True})).text)
        for event in events:
            openai.types.chat.ChatCompletionChunk.model_validate(event, strict=True)
        deltas = [event["choices"][0] for event in events]
        assert deltas[0]["delta"] == {"role": "assistant", "content": ""}
        assert deltas[-1] | {"index": 0} == {"index": 0, "delta": {}, "logprobs": None, "finish_reason": finish}
        assert "".join(d["delta"].get("content", "") for d in deltas) == (content or "")
        streamed = [c for d in deltas for c in d["delta"].get("tool_calls", [])]
        assert [c["index"] for c in streamed] == list(range(len(calls)))
        assert [(c["function"]["name"], json.loads(c["function"]["arguments"])) for c in streamed] == calls
        assert all(set(c) == {"index", "id", "type", "function"} and c["type"] == "function" for c in streamed)
        assert len({c["id"] for c in streamed}) == len(calls)

    call(work, make=saying(text, piece))


def test_text_before_a_call_is_streamed_at_once_and_the_tag_never() -> None:
    async def work(client: httpx.AsyncClient, _: ParrotEngine) -> None:
        events = frames((await client.post(ROUTE, json=ASK | {"stream": True, "logprobs": True})).text)
        deltas = [event["choices"][0] for event in events]
        assert [d["delta"].get("content") for d in deltas[1:4]] == ["O", "k", " "]
        assert not any("<" in d["delta"].get("content", "") for d in deltas)
        # Tokens whose text is held back are still told when they come.
        tokens = [entry["token"] for d in deltas for entry in (d["logprobs"] or {"content": []})["content"]]
        assert "".join(tokens) == f"Ok {ROME}"

    call(work, make=saying(f"Ok {ROME}"))


def test_an_answer_that_was_cut_says_so() -> None:
    async def work(client: httpx.AsyncClient, _: ParrotEngine) -> None:
        for length, content, calls in ((20, ROME[:20], 0), (len(ROME) + 1, None, 1), (len(ROME) + 3, "\n<t", 1)):
            body = ASK | {"max_tokens": length}
            whole = (await client.post(ROUTE, json=body)).json()["choices"][0]
            assert whole["finish_reason"] == "length"
            assert whole["message"]["content"] == content
            assert len(whole["message"].get("tool_calls", [])) == calls
            last = frames((await client.post(ROUTE, json=body | {"stream": True})).text)[-1]
            assert last["choices"][0]["finish_reason"] == "length"

    call(work, make=saying(f"{ROME}\n{ROME}"))


def test_calls_after_the_first_are_left_out_when_asked_for() -> None:
    async def work(client: httpx.AsyncClient, _: ParrotEngine) -> None:
        body = ASK | {"parallel_tool_calls": False}
        message = (await client.post(ROUTE, json=body)).json()["choices"][0]["message"]
        assert len(message["tool_calls"]) == 1
        events = frames((await client.post(ROUTE, json=body | {"stream": True})).text)
        assert sum(len(e["choices"][0]["delta"].get("tool_calls", [])) for e in events) == 1

    call(work, make=saying(f"{ROME}\n{ROME}"))


def test_each_choice_has_its_own_calls() -> None:
    async def work(client: httpx.AsyncClient, _: ParrotEngine) -> None:
        choices = (await client.post(ROUTE, json=ASK | {"n": 2})).json()["choices"]
        ids = [made["id"] for choice in choices for made in choice["message"]["tool_calls"]]
        assert len(ids) == len(set(ids)) == 2

    call(work, make=saying(ROME))


@pytest.mark.parametrize(
    ("fields", "starts", "functions"),
    [
        ({"tool_choice": "required"}, 'start: call ("\\n" call)*', ["get_weather", "now"]),
        ({"tool_choice": "required", "parallel_tool_calls": False}, "start: call\n", ["get_weather", "now"]),
        ({"tool_choice": {"type": "function", "function": {"name": "now"}}}, "start: call\n", ["now"]),
    ],
)
def test_forced_calls_are_a_grammar(fields: Json, starts: str, functions: list[str]) -> None:
    async def work(client: httpx.AsyncClient, engine: ParrotEngine) -> None:
        answer = await client.post(ROUTE, json=ASK | {"tools": [WEATHER, NOW]} | fields)
        assert answer.json()["choices"][0]["finish_reason"] == "tool_calls"
        structure = engine.seen[0].sampling.structure
        assert structure is not None
        assert structure.kind == "grammar"
        assert structure.source.startswith(starts)
        for name in ("get_weather", "now"):
            assert (f'\\"name\\": \\"{name}\\"' in structure.source) is (name in functions)
        assert "Wetter" not in structure.source

    call(work, make=saying(ROME))


def test_bad_tools_name_the_field() -> None:
    async def work(client: httpx.AsyncClient, engine: ParrotEngine) -> None:
        named = {"type": "function", "function": {"name": "now"}}
        huge = {"type": "function", "function": {"name": "f", "parameters": {"enum": ["x" * 70_000]}}}
        deep: Json = {}
        for _ in range(33):
            deep = {"items": deep}
        cases: list[tuple[Json, str, str, str]] = [
            ({"tools": "f"}, "tools", "invalid_value", "valid list"),
            ({"tools": ["f"]}, "tools[0]", "invalid_value", "valid dictionary"),
            ({"tools": [{}]}, "tools", "unsupported_parameter", "only tools of type 'function'"),
            ({"tools": [{"type": "web_search"}]}, "tools", "unsupported_parameter", "tool 0: only tools"),
            ({"tools": [NOW, {"type": "function"}]}, "tools", "invalid_value", "tool 1 needs a `function`"),
            ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools", "invalid_value", "`name`"),
            ({"tools": [{"type": "function", "function": {"name": "a" * 65}}]}, "tools", "invalid_value", "`name`"),
            (
                {"tools": [{"type": "function", "function": {"name": "f", "description": 5}}]},
                "tools",
                "invalid_value",
                "`description` must be a string",
            ),
            (
                {"tools": [{"type": "function", "function": {"name": "f", "parameters": [1]}}]},
                "tools",
                "invalid_value",
                "JSON schema must be an object",
            ),
            (
                {"tools": [{"type": "function", "function": {"name": "f", "parameters": deep}}]},
                "tools",
                "invalid_value",
                "at most 32 levels",
            ),
            ({"tools": [NOW] * 129}, "tools", "invalid_value", "at most 128 tools"),
            ({"tools": [huge], "tool_choice": "required"}, "tools", "invalid_value", "at most 65536"),
            ({"tool_choice": "required"}, "tool_choice", "invalid_value", "needs `tools`"),
            ({"tool_choice": "sometimes"}, "tool_choice", "invalid_value", "must be 'none', 'auto'"),
            ({"tool_choice": {"type": "function"}}, "tool_choice", "invalid_value", "must be 'none', 'auto'"),
            ({"tool_choice": {"type": "custom"}}, "tool_choice", "unsupported_parameter", "of type 'function'"),
            ({"tools": [WEATHER], "tool_choice": named}, "tool_choice", "invalid_value", "not among `tools`"),
            (
                {"tools": [NOW], "tool_choice": "required", "guided_regex": "a"},
                "tool_choice",
                "invalid_value",
                "of another structure too",
            ),
            ({"tools": [NOW], "parallel_tool_calls": 1}, "parallel_tool_calls", "invalid_value", "valid boolean"),
        ]
        for fields, param, code, words in cases:
            answer = await client.post(ROUTE, json={"messages": [USER]} | fields)
            assert answer.status_code == 400, (str(fields)[:200], answer.text)
            error = answer.json()["error"]
            assert (error["param"], error["code"]) == (param, code), error
            assert words in error["message"], error
        assert engine.seen == []

    call(work, make=saying("ok"))


def test_models_whose_template_has_no_tools_refuse_them_unless_they_are_not_wanted() -> None:
    async def work(client: httpx.AsyncClient, engine: ParrotEngine) -> None:
        refused = await client.post(ROUTE, json=ASK)
        assert refused.status_code == 400
        assert refused.json()["error"]["code"] == "unsupported_parameter"
        assert "template has no tools" in refused.json()["error"]["message"]
        assert engine.seen == []
        neutral: list[Json] = [{"tool_choice": "none"}, {"tools": []}, {"tools": None}]
        for fields in neutral:
            assert (await client.post(ROUTE, json=ASK | fields)).status_code == 200

    call(work)


@pytest.mark.parametrize(
    ("source", "takes"),
    [
        (TEMPLATE, True),
        ("{%- if not tools is defined %}{%- set tools = none %}{%- endif %}{{ tools }}", True),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", False),
        ("No tools here: {{ messages[0].tools }}", False),
    ],
)
def test_templates_that_take_tools_are_told_by_their_variables(source: str, takes: bool) -> None:
    assert ChatTemplate(source).takes_tools is takes


def test_templates_see_none_where_there_are_no_tools() -> None:
    source = "{{ 'none' if tools is none else tools }}{% if documents is none %}.{% endif %}"
    assert ChatTemplate(source).render([]) == "none."


def test_a_template_that_breaks_on_strange_messages_is_a_400() -> None:
    async def work(client: httpx.AsyncClient, _: ParrotEngine) -> None:
        strange: list[Json] = [{}, {"function": {"arguments": "{}"}}, {"function": {"name": 5, "arguments": 1e300}}]
        for made in strange:
            messages = [{"role": "assistant", "content": "", "tool_calls": [made]}]
            answer = await client.post(ROUTE, json={"messages": messages})
            assert answer.status_code == 400, answer.text
            assert answer.json()["error"]["param"] == "messages"
            assert "chat template cannot render" in answer.json()["error"]["message"]

    source = "{{ messages[0].tool_calls[0].function.name + [][1] }}"
    call(work, make=lambda: ParrotEngine(chat_template=source))


def test_openai_client_reads_streamed_calls() -> None:
    async def run() -> None:
        engine = ParrotEngine(says=f"Ok.{ROME}", piece=4, chat_template=TEMPLATE)
        transport = httpx.ASGITransport(build_app(engine))
        async with openai.AsyncOpenAI(
            base_url="http://server/v1", api_key="none", http_client=httpx.AsyncClient(transport=transport)
        ) as client:
            tools: Any = [WEATHER]
            messages: Any = [USER]
            async with client.chat.completions.stream(model="parrot", messages=messages, tools=tools) as stream:
                answer = await stream.get_final_completion()
            choice = answer.choices[0]
            assert choice.finish_reason == "tool_calls"
            assert choice.message.content == "Ok."
            assert choice.message.tool_calls is not None
            made = choice.message.tool_calls[0].function
            assert (made.name, json.loads(made.arguments)) == ("get_weather", {"city": "Rome"})

    asyncio.run(run())
