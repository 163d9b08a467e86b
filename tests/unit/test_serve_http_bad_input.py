"""Whatever clients send that cannot be answered is refused with OpenAI's error object, and never with a 500."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator

import httpx
import pytest

from serve.http.settings import ServerSettings
from tests.parrot_engine import Json, ParrotEngine, call

pytestmark = pytest.mark.unit

CHAT = {"messages": [{"role": "user", "content": "x"}]}


BAD_REQUESTS: list[tuple[str, Json, str | None, str, str]] = [
    # route, body, param, code, words of the message
    ("/v1/completions", {}, "prompt", "missing_required_parameter", "Field required"),
    ("/v1/completions", {"prompt": []}, "prompt", "invalid_value", "none of them empty"),
    ("/v1/completions", {"prompt": [["a"]]}, "prompt", "invalid_value", "list of lists of token ids"),
    ("/v1/completions", {"prompt": [1, "a"]}, "prompt", "invalid_value", "list of token ids"),
    ("/v1/completions", {"prompt": [True]}, "prompt", "invalid_value", "list of token ids"),
    ("/v1/completions", {"prompt": ["a"] * 1025}, "prompt", "invalid_value", "at most 1024 prompts"),
    ("/v1/completions", {"prompt": "\ud800"}, "prompt", "invalid_value", "lone surrogate at character 0"),
    ("/v1/completions", {"prompt": "x", "temperature": "1"}, "temperature", "invalid_value", "valid number"),
    ("/v1/completions", {"prompt": "x", "temperature": -0.1}, "temperature", "invalid_value", "greater than"),
    ("/v1/completions", {"prompt": "x", "temperature": 2.1}, "temperature", "invalid_value", "less than"),
    ("/v1/completions", {"prompt": "x", "top_p": 1.1}, "top_p", "invalid_value", "less than"),
    ("/v1/completions", {"prompt": "x", "max_tokens": -1}, "max_tokens", "invalid_value", "greater than"),
    ("/v1/completions", {"prompt": "x", "max_tokens": 0}, "max_tokens", "invalid_value", "unless `echo`"),
    ("/v1/completions", {"prompt": "x", "max_tokens": 1.5}, "max_tokens", "invalid_value", "valid integer"),
    ("/v1/completions", {"prompt": "x", "n": 0}, "n", "invalid_value", "greater than"),
    ("/v1/completions", {"prompt": "x", "n": 129}, "n", "invalid_value", "less than"),
    ("/v1/completions", {"prompt": "x", "logprobs": True}, "logprobs", "invalid_value", "valid integer"),
    ("/v1/completions", {"prompt": "x", "logprobs": 21}, "logprobs", "invalid_value", "less than"),
    ("/v1/completions", {"prompt": "x", "seed": 2**63}, "seed", "invalid_value", "less than"),
    ("/v1/completions", {"prompt": "x", "stop": list("abcde")}, "stop", "invalid_value", "at most 4"),
    ("/v1/completions", {"prompt": "x", "stop": [""]}, "stop", "invalid_value", "not be empty"),
    ("/v1/completions", {"prompt": "x", "stop": 5}, "stop", "invalid_value", "string or a list"),
    ("/v1/completions", {"prompt": "x", "suffix": "y"}, "suffix", "unsupported_parameter", "not supported"),
    ("/v1/completions", {"prompt": "x", "best_of": 3}, "best_of", "unsupported_parameter", "equals `n`"),
    ("/v1/completions", {"prompt": "x", "logit_bias": {"a": 1}}, "logit_bias", "invalid_value", "token ids"),
    ("/v1/completions", {"prompt": "x", "logit_bias": {"1": 101}}, "logit_bias.1", "invalid_value", "less than"),
    ("/v1/completions", {"prompt": "x", "stream_options": {}}, "stream_options", "invalid_value", "`stream` is true"),
    ("/v1/completions", {"prompt": "x", "stop": ["a" * 1025]}, "stop", "invalid_value", "at most 1024 characters"),
    ("/v1/completions", {"prompt": "x", "stop": ["a", 1]}, "stop", "invalid_value", "list of strings"),
    ("/v1/completions", {"prompt": "x", "stop": "\ud800"}, "stop", "invalid_value", "lone surrogate"),
    ("/v1/completions", {"prompt": "x", "stop_token_ids": [-1]}, "stop_token_ids[0]", "invalid_value", "greater"),
    ("/v1/completions", {"prompt": "x", "stop_token_ids": [1] * 65}, "stop_token_ids", "invalid_value", "at most 64"),
    ("/v1/completions", {"prompt": "x", "n": 10**30}, "n", "invalid_value", "less than"),
    ("/v1/completions", {"prompt": "x", "max_tokens": 2**31}, "max_tokens", "invalid_value", "less than"),
    ("/v1/completions", {"prompt": "x", "max_tokens": 10**4000}, "max_tokens", "invalid_value", "less than"),
    ("/v1/completions", {"prompt": "x", "max_tokens": True}, "max_tokens", "invalid_value", "valid integer"),
    ("/v1/completions", {"prompt": "x", "min_tokens": 2**31}, "min_tokens", "invalid_value", "less than"),
    ("/v1/completions", {"prompt": "x", "top_k": 2**63}, "top_k", "invalid_value", "less than"),
    ("/v1/completions", {"prompt": "x", "logprobs": -1}, "logprobs", "invalid_value", "greater than"),
    ("/v1/completions", {"prompt": "x", "priority": 2**31}, "priority", "invalid_value", "less than"),
    ("/v1/completions", {"prompt": "x", "priority": 1.5}, "priority", "invalid_value", "valid integer"),
    ("/v1/completions", {"prompt": "x", "return_routing": 1}, "return_routing", "invalid_value", "valid boolean"),
    ("/v1/completions", {"prompt": "x", "return_token_ids": "y"}, "return_token_ids", "invalid_value", "valid boolean"),
    ("/v1/completions", {"prompt": "x", "add_special_tokens": 1}, "add_special_tokens", "invalid_value", "boolean"),
    ("/v1/completions", {"prompt": "x", "logit_bias": [1]}, "logit_bias", "invalid_value", "valid dictionary"),
    (
        "/v1/completions",
        {"prompt": "x", "logit_bias": {str(i): 0 for i in range(4097)}},
        "logit_bias",
        "invalid_value",
        "at most 4096 biases",
    ),
    ("/v1/completions", {"prompt": "x", "model": "m" * 513}, "model", "invalid_value", "at most 512 characters"),
    ("/v1/completions", {"prompt": "x", "model": 5}, "model", "invalid_value", "valid string"),
    ("/v1/completions", {"prompt": [0x110000]}, "prompt", "invalid_value", "no such token"),
    ("/v1/completions", {"prompt": "x", "max_tokens": 1000}, "max_tokens", "context_length_exceeded", "1001 tokens"),
    ("/v1/completions", {"prompt": "x", "model": "gpt-9"}, "model", "model_not_found", "`gpt-9` does not exist"),
    ("/v1/completions", {"prompt": "x" * 1001}, "prompt", "context_length_exceeded", "maximum context length is 1000"),
    ("/v1/chat/completions", {"messages": []}, "messages", "invalid_value", "at least 1 item"),
    ("/v1/chat/completions", {"messages": "x"}, "messages", "invalid_value", "valid list"),
    ("/v1/chat/completions", {"messages": [{}]}, "messages[0].role", "missing_required_parameter", "required"),
    ("/v1/chat/completions", {"messages": [{"role": "pirate"}]}, "messages[0].role", "invalid_value", "'system'"),
    (
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        "messages[0].content",
        "unsupported_parameter",
        "only text parts are supported, got 'image_url'",
    ),
    ("/v1/chat/completions", CHAT | {"max_tokens": 0}, "max_tokens", "invalid_value", "greater than"),
    (
        "/v1/chat/completions",
        CHAT | {"max_tokens": 1, "max_completion_tokens": 2},
        "max_tokens",
        "invalid_value",
        "differ",
    ),
    ("/v1/chat/completions", CHAT | {"top_logprobs": 2}, "top_logprobs", "invalid_value", "needs `logprobs`"),
    ("/v1/chat/completions", CHAT | {"logprobs": 1}, "logprobs", "invalid_value", "valid boolean"),
    ("/v1/chat/completions", CHAT | {"top_logprobs": 21, "logprobs": True}, "top_logprobs", "invalid_value", "less"),
    ("/v1/chat/completions", CHAT | {"max_completion_tokens": 2**40}, "max_completion_tokens", "invalid_value", "less"),
    (
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": "x"}] * 4097},
        "messages",
        "invalid_value",
        "at most 4096 items",
    ),
    (
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": "\udfff"}]},
        "messages[0].content",
        "invalid_value",
        "lone surrogate at character 0",
    ),
    (
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": [{"type": "text", "text": 5}]}]},
        "messages[0].content",
        "invalid_value",
        "needs a string `text`",
    ),
    (
        "/v1/chat/completions",
        {"messages": [{"role": "assistant", "tool_calls": "f()"}]},
        "messages[0].tool_calls",
        "invalid_value",
        "valid list",
    ),
    ("/v1/chat/completions", CHAT | {"functions": [{"name": "f"}]}, "functions", "unsupported_parameter", "not supp"),
    ("/v1/chat/completions", CHAT | {"model": "gpt-9"}, "model", "model_not_found", "`gpt-9` does not exist"),
    (
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": "x" * 1001}]},
        "messages",
        "context_length_exceeded",
        "maximum context length is 1000",
    ),
    (
        "/v1/chat/completions",
        CHAT | {"max_completion_tokens": 1000},
        "max_completion_tokens",
        "context_length_exceeded",
        "maximum context length is 1000",
    ),
    ("/v1/embeddings", {"input": "x", "model": "gpt-9"}, "model", "model_not_found", "`gpt-9` does not exist"),
    ("/v1/embeddings", {}, "input", "missing_required_parameter", "Field required"),
    ("/v1/embeddings", {"input": []}, "input", "invalid_value", "none of them empty"),
    ("/v1/embeddings", {"input": {"text": "x"}}, "input", "invalid_value", "list of token ids"),
    ("/v1/embeddings", {"input": ["x"] * 2049}, "input", "invalid_value", "at most 2048"),
    ("/v1/embeddings", {"input": "x", "encoding_format": "hex"}, "encoding_format", "invalid_value", "'base64'"),
    ("/v1/embeddings", {"input": "x", "dimensions": 2}, "dimensions", "invalid_value", "have 3 dimensions"),
    ("/v1/embeddings", {"input": "x" * 1001}, "input", "context_length_exceeded", "maximum context length is 1000"),
    ("/tokenize", {}, "prompt", "invalid_value", "either `prompt` or `messages`"),
    ("/tokenize", CHAT | {"prompt": "x"}, "prompt", "invalid_value", "either `prompt` or `messages`"),
    ("/tokenize", {"prompt": ["x"]}, "prompt", "invalid_value", "valid string"),
    ("/tokenize", {"prompt": "\ud800"}, "prompt", "invalid_value", "lone surrogate at character 0"),
    ("/tokenize", {"prompt": "x", "model": "gpt-9"}, "model", "model_not_found", "`gpt-9` does not exist"),
    ("/detokenize", {"tokens": [0x110000]}, "tokens", "invalid_value", "no such token"),
    ("/detokenize", {"tokens": [2**31]}, "tokens[0]", "invalid_value", "less than"),
    ("/detokenize", {"tokens": "ab"}, "tokens", "invalid_value", "valid list"),
    ("/detokenize", {"tokens": [1], "model": "gpt-9"}, "model", "model_not_found", "`gpt-9` does not exist"),
]


def test_bad_requests_name_the_field_in_openai_shape() -> None:
    async def work(client: httpx.AsyncClient, engine: ParrotEngine) -> None:
        for route, body, param, code, words in BAD_REQUESTS:
            answer = await client.post(route, content=json.dumps(body), headers={"content-type": "application/json"})
            status = 404 if code == "model_not_found" else 400
            assert answer.status_code == status, (body, answer.text)
            assert list(answer.json()) == ["error"]
            error = answer.json()["error"]
            assert error["param"] == param, (body, error)
            assert error["code"] == code, (body, error)
            assert error["type"] == "invalid_request_error"
            assert words in error["message"], (words, error)
        assert engine.seen == []
        assert engine.embedded == []

    call(work)


def test_neutral_values_of_unsupported_fields_are_accepted() -> None:
    async def work(client: httpx.AsyncClient, _: ParrotEngine) -> None:
        neutral = {
            "tools": [],
            "tool_choice": "auto",
            "functions": None,
            "response_format": {"type": "text"},
            "modalities": ["text"],
            "use_beam_search": False,
            "audio": None,
        }
        answer = await client.post("/v1/chat/completions", json=CHAT | neutral)
        assert answer.status_code == 200, answer.text

    call(work)


def nested(depth: int, open_: bytes = b"[", close: bytes = b"]", core: bytes = b"0") -> bytes:
    return open_ * depth + core + close * depth


COMPLETION = b'{"prompt": "x"}'
MALFORMED = [
    # body, content type, status, code, words of the message
    (b"{", "application/json", 400, "invalid_json", "at character 1"),
    (b"{'prompt': 'x'}", "application/json", 400, "invalid_json", "Expecting property name"),
    (COMPLETION + b"{}", "application/json", 400, "invalid_json", "Extra data"),
    (b"", "application/json", 400, "missing_required_parameter", "Field required"),
    (b"   ", "application/json", 400, "invalid_json", "Expecting value"),
    (b'"text"', "application/json", 400, "invalid_value", "valid dictionary"),
    (b"[]", "application/json", 400, "invalid_value", "valid dictionary"),
    (b"null", "application/json", 400, "invalid_value", "valid dictionary"),
    (b"\x00", "application/json", 400, "invalid_json", "Expecting value"),
    # Deep enough for Python to give up, and deep enough for whatever walks the values later to give up.
    (b"[" * 100_000, "application/json", 400, "invalid_json", "deeper than 64"),
    (nested(100_000), "application/json", 400, "invalid_json", "deeper than 64"),
    (b'{"prompt": "x", "new": ' + nested(900) + b"}", "application/json", 400, "invalid_json", "deeper than 64"),
    (nested(900, b'{"a": ', b"}"), "application/json", 400, "invalid_json", "deeper than 64"),
    (b'{"prompt": "x", "new": ' + nested(64) + b"}", "application/json", 400, "invalid_json", "deeper than 64"),
    (b'{"prompt": "x", "new": ' + nested(63) + b"}", "application/json", 200, None, ""),
    # Encodings.
    (b'{"prompt": "\xff"}', "application/json", 400, "invalid_json", "not UTF-8: byte 12"),
    ('{"prompt": "é"}'.encode("latin-1"), "application/json", 400, "invalid_json", "not UTF-8"),
    (COMPLETION.decode().encode("utf-16"), "application/json", 400, "invalid_json", "not UTF-8: byte 0"),
    (COMPLETION.decode().encode("utf-16-le"), "application/json", 400, "invalid_json", "not valid JSON"),
    (COMPLETION.decode().encode("utf-32"), "application/json; charset=utf-32", 400, "invalid_json", "not UTF-8"),
    (b"\xef\xbb\xbf" + COMPLETION, "application/json", 200, None, ""),  # a byte order mark
    # Numbers.
    (b'{"prompt": "x", "seed": ' + b"9" * 5000 + b"}", "application/json", 400, "invalid_json", "too long"),
    (b'{"prompt": "x", "temperature": NaN}', "application/json", 400, "invalid_json", "NaN is not a JSON number"),
    (b'{"prompt": "x", "new": [-Infinity]}', "application/json", 400, "invalid_json", "-Infinity is not a JSON"),
    (b'{"prompt": "x", "temperature": 1e999}', "application/json", 400, "invalid_value", "finite number"),
    # Media types.
    (COMPLETION, "text/plain", 415, "unsupported_media_type", "got `text/plain`"),
    (COMPLETION, "", 415, "unsupported_media_type", "application/json"),
    (b"prompt=x", "application/x-www-form-urlencoded", 415, "unsupported_media_type", "urlencoded"),
    (COMPLETION, "application/json; charset=latin-1", 200, None, ""),
    (COMPLETION, "application/vnd.api+json", 200, None, ""),
]


@pytest.mark.parametrize(
    "route", ["/v1/completions", "/v1/chat/completions", "/v1/embeddings", "/tokenize", "/detokenize", "/admin/weights"]
)
def test_malformed_bodies(route: str) -> None:
    async def work(client: httpx.AsyncClient, _: ParrotEngine) -> None:
        for content, content_type, status, code, words in MALFORMED:
            if route != "/v1/completions" and code not in ("invalid_json", "unsupported_media_type"):
                continue  # what is well-formed is judged by each route's own fields
            headers = {"content-type": content_type, "authorization": "Bearer root"}
            answer = await client.post(route, content=content, headers=headers)
            shown = (content[:60], content_type, answer.text[:300])
            assert answer.status_code == status, shown
            error = answer.json().get("error", {})
            assert error.get("code") == code, shown
            assert words in error.get("message", ""), shown

    call(work, ServerSettings(admin_key="root"))


def test_large_but_legal_bodies_are_answered() -> None:
    async def work(client: httpx.AsyncClient, engine: ParrotEngine) -> None:
        body: Json = {"prompt": "x", "metadata": {"blob": "y" * 4_000_000}, "stop": ["a" * 1024] * 4}
        assert (await client.post("/v1/completions", json=body)).status_code == 200
        many = {"messages": [{"role": "user", "content": ""}] * 4096}
        answer = await client.post("/v1/chat/completions", json=many)
        assert answer.json()["error"]["code"] == "context_length_exceeded"
        assert len(engine.seen) == 1

    call(work)


@pytest.mark.parametrize("length", ["9" * 30, "9" * 5000, "\u00b2", "0" * 40])
def test_declared_lengths_that_are_no_sane_numbers(length: str) -> None:
    async def work(client: httpx.AsyncClient, _: ParrotEngine) -> None:
        headers = [(b"content-type", b"application/json"), (b"content-length", length.encode("latin-1"))]
        answer = await client.send(httpx.Request("POST", "http://server/v1/completions", headers=headers, content=b""))
        assert answer.status_code == (413 if length.startswith("9") else 400)

    call(work)


def test_body_limit_is_413_with_and_without_a_declared_length() -> None:
    async def work(client: httpx.AsyncClient, _: ParrotEngine) -> None:
        body = json.dumps({"prompt": "x" * 2000}).encode()

        async def pieces() -> AsyncIterator[bytes]:
            for start in range(0, len(body), 100):
                yield body[start : start + 100]

        for content in (body, pieces()):
            answer = await client.post("/v1/completions", content=content, headers={"content-type": "application/json"})
            assert (answer.status_code, answer.json()["error"]["code"]) == (413, "request_too_large")
            assert "larger than 1000 bytes" in answer.json()["error"]["message"]

    call(work, ServerSettings(max_body_bytes=1000))
