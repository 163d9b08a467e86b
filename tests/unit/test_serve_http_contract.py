"""The HTTP contract over a second, model-free implementation of EngineClient: shapes, order, errors."""

from __future__ import annotations

import json
import re

import httpx
import openai.types
import openai.types.chat
import pytest

from tests.parrot_engine import Json, ParrotEngine, call, frames

pytestmark = pytest.mark.unit

CHAT = {"messages": [{"role": "user", "content": "x"}]}


def test_chat_whole_body_is_what_the_openai_client_types_say() -> None:
    async def work(client: httpx.AsyncClient, engine: ParrotEngine) -> None:
        body = {"model": "parrot", "messages": [{"role": "user", "content": "hé"}], "n": 2, "max_tokens": 3}
        answer = await client.post("/v1/chat/completions", json=body)
        assert answer.status_code == 200, answer.text
        parsed = openai.types.chat.ChatCompletion.model_validate(answer.json(), strict=True)
        assert parsed.id.startswith("chatcmpl-")
        assert [choice.message.content for choice in parsed.choices] == ["Use", "Use"]  # of "User: hé\nAssistant:"
        assert [choice.finish_reason for choice in parsed.choices] == ["length", "length"]
        assert [choice.index for choice in parsed.choices] == [0, 1]
        assert answer.json()["choices"][0]["message"]["refusal"] is None
        assert answer.json()["choices"][0]["logprobs"] is None
        prompt = "User: hé\nAssistant:"
        assert answer.json()["usage"] == {
            "prompt_tokens": len(prompt),
            "completion_tokens": 6,
            "total_tokens": len(prompt) + 6,
            "prompt_tokens_details": {"cached_tokens": 0},
        }
        assert parsed.system_fingerprint == "fp_abc123def456"
        assert answer.headers["content-type"] == "application/json"
        assert engine.seen[0].prompts == (prompt,)
        assert engine.seen[0].sampling.stop == ("\nUser:", "\nSystem:")

    call(work)


def test_chat_stream_order_role_content_finish_usage_done() -> None:
    async def work(client: httpx.AsyncClient, _: ParrotEngine) -> None:
        body = {
            "messages": [{"role": "user", "content": "x"}],
            "stream": True,
            "n": 2,
            "max_tokens": 2,
            "stream_options": {"include_usage": True},
        }
        answer = await client.post("/v1/chat/completions", json=body)
        assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
        assert answer.headers["cache-control"] == "no-cache"
        assert answer.headers["x-accel-buffering"] == "no"
        events = frames(answer.text)
        for event in events:
            openai.types.chat.ChatCompletionChunk.model_validate(event, strict=True)
        assert len({(e["id"], e["created"], e["model"], e["object"]) for e in events}) == 1
        deltas = [(c["index"], c["delta"], c["finish_reason"]) for e in events for c in e["choices"]]
        assert deltas == [
            (0, {"role": "assistant", "content": ""}, None),
            (1, {"role": "assistant", "content": ""}, None),
            (0, {"content": "U"}, None),
            (0, {"content": "s"}, None),
            (0, {}, "length"),
            (1, {"content": "U"}, None),
            (1, {"content": "s"}, None),
            (1, {}, "length"),
        ]
        assert all(event["usage"] is None for event in events[:-1])
        assert events[-1]["choices"] == []
        assert events[-1]["usage"]["completion_tokens"] == 4

    call(work)


def test_stream_without_include_usage_never_mentions_usage_and_continuous_usage_is_in_every_event() -> None:
    async def work(client: httpx.AsyncClient, _: ParrotEngine) -> None:
        body: Json = {"prompt": "abc", "stream": True}
        plain = frames((await client.post("/v1/completions", json=body)).text)
        assert all("usage" not in event for event in plain)
        body["stream_options"] = {"include_usage": True, "continuous_usage_stats": True}
        running = frames((await client.post("/v1/completions", json=body)).text)
        assert [event["usage"]["completion_tokens"] for event in running] == [1, 2, 3, 3, 3]

    call(work)


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        ("ab", ["ab"]),
        (["ab", "c"], ["ab", "c"]),
        ([97, 98], ["ab"]),
        ([[97], [98, 99]], ["a", "bc"]),
    ],
)
def test_completion_takes_the_four_prompt_forms_whole_and_streamed(prompt: object, texts: list[str]) -> None:
    async def work(client: httpx.AsyncClient, _: ParrotEngine) -> None:
        whole = await client.post("/v1/completions", json={"prompt": prompt, "echo": True})
        parsed = openai.types.Completion.model_validate(whole.json(), strict=True)
        assert [choice.text for choice in parsed.choices] == [text * 2 for text in texts]  # echo, then the parrot
        assert [choice.index for choice in parsed.choices] == list(range(len(texts)))
        streamed = await client.post("/v1/completions", json={"prompt": prompt, "echo": True, "stream": True})
        joined = dict.fromkeys(range(len(texts)), "")
        finish = []
        for event in frames(streamed.text):
            openai.types.Completion.model_validate(event | {"choices": []}, strict=True)
            for choice in event["choices"]:
                joined[choice["index"]] += choice["text"]
                finish += [choice["finish_reason"]] if choice["finish_reason"] else []
        assert list(joined.values()) == [text * 2 for text in texts]
        assert finish == ["stop"] * len(texts)

    call(work)


def test_completion_logprobs_have_the_legacy_shape_with_echo() -> None:
    async def work(client: httpx.AsyncClient, _: ParrotEngine) -> None:
        body = {"prompt": "aé", "echo": True, "logprobs": 1, "max_tokens": 1}
        answer = await client.post("/v1/completions", json=body)
        # The first prompt token has nothing before it: OpenAI sends null there, though its client's types do not say.
        assert answer.json()["choices"][0]["logprobs"] == {
            "tokens": ["a", "é", "a"],
            "token_logprobs": [None, -1.0, -0.5],
            "top_logprobs": [None, {"bytes:\\xe2": -9999.0, "é": -1.0}, {"bytes:\\xe2": -9999.0, "a": -0.5}],
            "text_offset": [0, 1, 2],
        }
        streamed = frames((await client.post("/v1/completions", json=body | {"stream": True})).text)
        assert streamed[0]["choices"][0]["logprobs"] == answer.json()["choices"][0]["logprobs"]
        plain = await client.post("/v1/completions", json=body | {"echo": False})
        parsed = openai.types.Completion.model_validate(plain.json(), strict=True)
        assert parsed.choices[0].logprobs is not None
        assert parsed.choices[0].logprobs.text_offset == [0]

    call(work)


def test_chat_logprobs_have_tokens_bytes_and_alternatives() -> None:
    async def work(client: httpx.AsyncClient, engine: ParrotEngine) -> None:
        body: Json = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1, "logprobs": True}
        answer = await client.post("/v1/chat/completions", json=body | {"top_logprobs": 1})
        expected = {
            "content": [
                {
                    "token": "U",
                    "logprob": -0.5,
                    "bytes": [85],
                    "top_logprobs": [{"token": "\ufffd", "logprob": -9999.0, "bytes": [0xE2]}],
                }
            ],
            "refusal": None,
        }
        assert answer.json()["choices"][0]["logprobs"] == expected
        assert engine.seen[-1].sampling.logprobs == 1
        streamed = frames((await client.post("/v1/chat/completions", json=body | {"stream": True})).text)
        assert streamed[1]["choices"][0]["logprobs"] == expected
        assert engine.seen[-1].sampling.logprobs == 0

    call(work)


def test_sampling_fields_reach_the_engine_and_unknown_ones_are_ignored() -> None:
    async def work(client: httpx.AsyncClient, engine: ParrotEngine) -> None:
        body = {
            "model": "parrot",
            "prompt": "x",
            "temperature": 0,
            "top_p": 0,
            "top_k": -1,
            "min_p": 0.1,
            "presence_penalty": 1,
            "frequency_penalty": -1,
            "repetition_penalty": 1.5,
            "logit_bias": {"5": -100},
            "seed": -1,
            "n": 2,
            "best_of": 2,
            "stop": "x",
            "stop_token_ids": [3],
            "min_tokens": 1,
            "ignore_eos": True,
            "skip_special_tokens": False,
            "max_tokens": 7,
            "suffix": "",
            "user": "u",
            "field_of_next_year": {"a": 1},
            "structured_outputs": None,
        }
        answer = await client.post("/v1/completions", json=body)
        assert answer.status_code == 200, answer.text
        options = engine.seen[0].sampling
        assert (options.temperature, options.top_p, options.top_k, options.min_p) == (0.0, 1.0, 1, 0.1)
        assert (options.presence_penalty, options.frequency_penalty, options.repetition_penalty) == (1.0, -1.0, 1.5)
        assert (options.logit_bias, options.seed, options.n, options.stop) == (((5, -100.0),), -1, 2, ("x",))
        assert (options.stop_token_ids, options.min_tokens, options.ignore_eos) == ((3,), 1, True)
        assert (options.skip_special_tokens, options.max_tokens, options.logprobs) == (False, 7, None)
        nulls = dict.fromkeys(["stop", "n", "seed", "logprobs", "stream", "temperature", "max_tokens", "model"])
        assert (await client.post("/v1/completions", json={"prompt": "x", **nulls})).status_code == 200
        assert engine.seen[1].sampling.max_tokens == 16

    call(work)


def test_framework_errors_have_the_shape_too() -> None:
    async def work(client: httpx.AsyncClient, _: ParrotEngine) -> None:
        for method, path, status, code in [
            ("GET", "/v1/nothing", 404, "not_found"),
            ("GET", "/v1/completions", 405, "method_not_allowed"),
            ("POST", "/health", 405, "method_not_allowed"),
            ("GET", "/v1/models/gpt-9", 404, "model_not_found"),
            ("GET", "/v1/models/", 404, "model_not_found"),
            ("GET", "/docs", 404, "not_found"),
        ]:
            answer = await client.request(method, path)
            assert (answer.status_code, answer.json()["error"]["code"]) == (status, code), path
            assert set(answer.json()["error"]) == {"message", "type", "param", "code"}

    call(work)


def test_models_list_and_one() -> None:
    async def work(client: httpx.AsyncClient, _: ParrotEngine) -> None:
        listed = (await client.get("/v1/models")).json()
        assert listed["object"] == "list"
        assert openai.types.Model.model_validate(listed["data"][0], strict=True).id == "parrot"
        assert (await client.get("/v1/models/parrot")).json() == listed["data"][0]
        assert listed["data"][0]["max_model_len"] == 1000

    call(work)


@pytest.mark.parametrize("route", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize("stream", [False, True])
def test_queue_full_is_429_with_retry_after_before_the_first_byte(route: str, stream: bool) -> None:
    async def work(client: httpx.AsyncClient, engine: ParrotEngine) -> None:
        engine.full = True
        answer = await client.post(route, json=CHAT | {"prompt": "x", "stream": stream})
        assert answer.status_code == 429
        assert answer.headers["retry-after"] == "3"
        assert answer.json()["error"]["type"] == "rate_limit_error"
        assert answer.json()["error"]["code"] == "queue_full_requests"
        assert "64 requests are already waiting" in answer.json()["error"]["message"]

    call(work)


def test_error_before_the_first_byte_is_a_status_and_after_it_an_event_without_done() -> None:
    async def work(client: httpx.AsyncClient, _: ParrotEngine) -> None:
        whole = await client.post("/v1/completions", json={"prompt": "fail"})
        assert (whole.status_code, whole.json()["error"]["code"]) == (503, "engine_dead")
        stream = await client.post("/v1/completions", json={"prompt": "fail", "stream": True})
        assert stream.status_code == 200
        events = stream.text.split("\n\n")
        assert "[DONE]" not in stream.text
        assert json.loads(events[0].removeprefix("data: "))["choices"][0]["text"] == "f"
        assert json.loads(events[1].removeprefix("data: "))["error"]["code"] == "engine_dead"

    call(work)


@pytest.mark.parametrize("stream", [False, True])
def test_bugs_are_500_without_their_text_and_logged(stream: bool, caplog: pytest.LogCaptureFixture) -> None:
    async def work(client: httpx.AsyncClient, _: ParrotEngine) -> None:
        answer = await client.post(
            "/v1/completions", json={"prompt": "bug", "stream": stream}, headers={"x-request-id": "mine-1"}
        )
        assert answer.status_code == (200 if stream else 500)
        assert "secret" not in answer.text
        assert "mine-1" in answer.text
        assert "internal_error" in answer.text
        assert answer.headers["x-request-id"] == "mine-1"

    call(work)
    assert "secret /path" in caplog.text


def test_request_ids_are_echoed_when_sane_and_made_otherwise() -> None:
    async def work(client: httpx.AsyncClient, _: ParrotEngine) -> None:
        for given, kept in [("abc-1", True), ("a" * 129, False), ("tab\there", False), (None, False)]:
            answer = await client.get("/health", headers={"x-request-id": given} if given else {})
            assert (answer.headers["x-request-id"] == given) is kept
            assert kept or answer.headers["x-request-id"].startswith("req-")

    call(work)


def test_the_page_is_html_that_runs_nothing_but_itself() -> None:
    async def work(client: httpx.AsyncClient, _: ParrotEngine) -> None:
        page = await client.get("/")
        assert page.status_code == 200
        assert page.headers["content-type"] == "text/html; charset=utf-8"
        assert page.headers["content-security-policy"].startswith("default-src 'none'")
        assert page.text.startswith("<!doctype html>")

    call(work)


def test_openapi_document_lists_routes_and_error_shapes() -> None:
    async def work(client: httpx.AsyncClient, _: ParrotEngine) -> None:
        document = (await client.get("/openapi.json")).json()
        post = document["paths"]["/v1/chat/completions"]["post"]
        assert {"200", "400", "429", "503"} <= set(post["responses"])
        assert "422" not in post["responses"]
        schemas = document["components"]["schemas"]
        assert "messages" in schemas["ChatRequest"]["properties"]
        assert set(schemas["ErrorObject"]["required"]) == {"message", "type", "param", "code"}
        assert "HTTPValidationError" not in schemas
        assert set(post["responses"]["200"]["content"]) == {"application/json", "text/event-stream"}
        text = json.dumps(document)
        for reference in set(re.findall(r"#/components/schemas/(\w+)", text)):
            assert reference in schemas

    call(work)


def test_engine_request_ids_are_ours_even_when_clients_repeat_theirs() -> None:
    """Pain 8: one client's disconnect cancelled another's request."""

    async def work(client: httpx.AsyncClient, engine: ParrotEngine) -> None:
        for _ in range(2):
            await client.post("/v1/completions", json={"prompt": "x"}, headers={"x-request-id": "same"})
        assert engine.seen[0].request_id != engine.seen[1].request_id

    call(work)
