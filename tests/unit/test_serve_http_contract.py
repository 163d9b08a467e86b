"""The HTTP contract over a second, model-free implementation of EngineClient: shapes, order, errors, disconnects."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

import httpx
import openai.types
import openai.types.chat
import pytest

from serve.client import (
    ContextLengthError,
    EmbeddingRequest,
    Embeddings,
    EngineClient,
    EngineDeadError,
    EngineHealth,
    EngineRequest,
    EngineStats,
    ExpertRecord,
    ModelInfo,
    PromptEcho,
    QueueFullError,
    Timings,
    TokenChunk,
    TokenLogprobs,
    TokenScore,
    TokenStream,
    UnknownModelError,
    Usage,
)
from serve.http.app import build_app
from serve.http.settings import ServerSettings

pytestmark = pytest.mark.unit

Json = dict[str, Any]


class ParrotEngine:
    """Says the prompt again, one character per token (its code point), ``n`` times.

    Prompts that begin with a keyword do something else: "wait" never ends, "fail" dies after one token as an engine
    does, "bug" as a program does.
    """

    def __init__(self, context_length: int = 1000) -> None:
        self.info = ModelInfo("parrot", 1_700_000_000, context_length, 0x110000, weights_version="abc123def456789")
        self.state = EngineHealth("ready")
        self.load_LE: tuple[tuple[int, ...], ...] = ((3, 1), (0, 0))
        self.full = False
        self.seen: list[EngineRequest] = []
        self.closed: list[str] = []
        self.reading = asyncio.Event()

    async def start(self) -> None: ...

    async def stop(self, *, drain_s: float = 0.0) -> None:
        self.state = EngineHealth("stopped")

    async def models(self) -> tuple[ModelInfo, ...]:
        return (self.info,)

    async def abort(self, request_id: str) -> bool:
        return False

    async def health(self) -> EngineHealth:
        return self.state

    async def stats(self) -> EngineStats:
        return EngineStats(
            num_running=1,
            num_waiting=2,
            waiting_prompt_tokens=30,
            prompt_tokens=40,
            generation_tokens=50,
            finished={"stop": 5},
            rejected={"requests": 6},
            expert_load=self.load_LE,
            uptime_s=7.0,
        )

    async def embed(self, request: EmbeddingRequest) -> Embeddings:
        return Embeddings(tuple((1.0, 0.0) for _ in request.inputs), sum(map(len, request.inputs)))

    async def tokenize(self, model: str, text: str, *, special: bool = True) -> tuple[int, ...]:
        return tuple(map(ord, text))

    async def detokenize(self, model: str, token_ids: Sequence[int]) -> str:
        return "".join(map(chr, token_ids))

    async def swap_weights(self, model: str, path: str, *, running: str = "drain") -> str:
        return path

    async def reset_prefix_cache(self, model: str) -> int:
        return 3

    async def record_experts(self, model: str, *, start: bool) -> ExpertRecord:
        return ExpertRecord(recording=start)

    async def expert_record(self, model: str) -> ExpertRecord:
        return ExpertRecord()

    async def generate(self, request: EngineRequest) -> TokenStream:
        if request.model != self.info.model_id:
            raise UnknownModelError(request.model)
        if self.full:
            raise QueueFullError("requests", 64, 2.2)
        prompt_tokens = sum(map(len, request.prompts))
        if prompt_tokens > self.info.context_length:
            raise ContextLengthError(self.info.context_length, prompt_tokens, None)
        self.seen.append(request)
        return ParrotStream(self, request)


class ParrotStream:
    def __init__(self, engine: ParrotEngine, request: EngineRequest) -> None:
        self._engine, self._request = engine, request
        self._chunks = self._run()
        self._over = False

    def __aiter__(self) -> ParrotStream:
        return self

    async def __anext__(self) -> TokenChunk:
        return await anext(self._chunks)

    async def aclose(self) -> None:
        if not self._over:
            self._engine.closed.append(self._request.request_id)
        self._over = True

    async def _run(self) -> AsyncIterator[TokenChunk]:
        request, options = self._request, self._request.sampling
        total = sum(map(len, request.prompts))
        done = 0
        for index in range(len(request.prompts) * options.n):
            prompt = request.prompts[index // options.n]
            text = prompt if isinstance(prompt, str) else "".join(map(chr, prompt))
            echo = None
            if request.return_prompt:
                scores = tuple(token(c, None if i == 0 else -1.0, i) for i, c in enumerate(text))
                wanted = options.prompt_logprobs is not None
                echo = PromptEcho(text, tuple(map(ord, text)), scores if wanted else ())
            if text.startswith("wait"):
                yield TokenChunk(index, "w", (ord("w"),), Usage(total, 1))
                self._engine.reading.set()
                await asyncio.Event().wait()
            budget = len(text) if options.max_tokens is None else min(options.max_tokens, len(text))
            for position, char in enumerate(text[:budget]):
                done += 1
                scored = (token(char, -0.5, position),) if options.logprobs is not None else ()
                yield TokenChunk(index, char, (ord(char),), Usage(total, done), scored, prompt=echo)
                echo = None
                if text.startswith("fail"):
                    raise EngineDeadError("The engine failed (OSError) and must be restarted.")
                if text.startswith("bug"):
                    raise RuntimeError("secret /path")
            reason = "length" if budget < len(text) else "stop"
            yield TokenChunk(index, "", (), Usage(total, done), (), reason, None, echo, Timings(0.1, 0.2, 0.3))
        self._over = True


def token(char: str, logprob: float | None, offset: int) -> TokenLogprobs:
    raw = char.encode()
    other = TokenScore(0, "\ufffd", b"\xe2", -float("inf"))
    return TokenLogprobs(TokenScore(ord(char), char, raw, logprob), (other,), offset)


def call(
    work: Callable[[httpx.AsyncClient, ParrotEngine], Awaitable[None]], settings: ServerSettings | None = None
) -> None:
    """Runs ``work`` with a client of a fresh application."""

    async def run() -> None:
        engine = ParrotEngine()
        assert isinstance(engine, EngineClient)
        transport = httpx.ASGITransport(build_app(engine, settings), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            await work(client, engine)

    asyncio.run(run())


def frames(text: str) -> list[Json]:
    """The JSON events of a complete stream."""
    lines = text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""], lines[-3:]
    assert all(line.startswith("data: ") for line in lines[:-1])
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]


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
    ("/v1/completions", {"prompt": "x", "guided_json": {}}, "guided_json", "unsupported_parameter", "not supported"),
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
    ("/v1/chat/completions", CHAT | {"tools": [{}]}, "tools", "unsupported_parameter", "not supported"),
    ("/v1/chat/completions", CHAT | {"tool_choice": "required"}, "tool_choice", "unsupported_parameter", "not supp"),
    (
        "/v1/chat/completions",
        CHAT | {"response_format": {"type": "json_object"}},
        "response_format",
        "unsupported_parameter",
        "only {'type': 'text'}",
    ),
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


@pytest.mark.parametrize(
    ("content", "content_type", "status", "code"),
    [
        (b"{", "application/json", 400, "invalid_json"),
        (b"", "application/json", 400, "missing_required_parameter"),
        (b'"text"', "application/json", 400, "invalid_value"),
        (b"[" * 100_000, "application/json", 400, "invalid_json"),
        (b'{"prompt": "\xff"}', "application/json", 400, "invalid_json"),
        (b'{"prompt": "x", "seed": ' + b"9" * 5000 + b"}", "application/json", 400, "invalid_json"),
        (b'{"prompt": "x", "temperature": NaN}', "application/json", 400, "invalid_value"),
        (b'{"prompt": "x"}', "text/plain", 415, "unsupported_media_type"),
        (b'{"prompt": "x"}', "application/vnd.api+json", 200, None),
    ],
)
def test_malformed_bodies(content: bytes, content_type: str, status: int, code: str | None) -> None:
    async def work(client: httpx.AsyncClient, _: ParrotEngine) -> None:
        answer = await client.post("/v1/completions", content=content, headers={"content-type": content_type})
        assert answer.status_code == status, answer.text
        assert answer.json().get("error", {}).get("code") == code

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


def test_api_keys_deny_by_default_except_health() -> None:
    async def work(client: httpx.AsyncClient, _: ParrotEngine) -> None:
        for path in ("/v1/models", "/metrics", "/openapi.json", "/", "/v1/nothing", "/tokenize"):
            for header in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Basic one"}):
                answer = await client.get(path, headers=header)
                assert answer.status_code == 401, path
                assert answer.json()["error"]["code"] == "invalid_api_key"
                assert answer.headers["www-authenticate"] == "Bearer"
        # The key is looked at before the body, so that strangers cannot make the server parse.
        assert (await client.post("/v1/completions", content=b"{")).status_code == 401
        for path in ("/health", "/ready"):
            assert (await client.get(path)).status_code == 200
        for key in ("one", "zwei-ü"):
            answer = await client.get("/v1/models", headers={"authorization": f"bearer {key}".encode()})
            assert answer.status_code == 200

    call(work, ServerSettings(api_keys=("one", "zwei-ü")))


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
        assert f'moeyard:expert_load_imbalance{{layer="0",{model}}} 1.5' in lines
        assert f'moeyard:expert_load_imbalance{{layer="1",{model}}} 1.0' in lines
        assert f'moeyard:expert_tokens_total{{expert="0",layer="0",{model}}} 3.0' in lines
        engine.load_LE = ((1,) * 513,)
        assert "expert_tokens_total{" not in (await client.get("/metrics")).text

    call(work)


def test_two_applications_in_one_process_do_not_share_metrics() -> None:
    async def work(client: httpx.AsyncClient, _: ParrotEngine) -> None:
        await client.post("/v1/completions", json={"prompt": "abc"})
        assert 'time_to_first_token_seconds_count{model_name="parrot"} 1.0' in (await client.get("/metrics")).text

    call(work)
    call(work)


def test_front_page_shows_the_model_and_escapes_its_name() -> None:
    async def work(client: httpx.AsyncClient, engine: ParrotEngine) -> None:
        engine.info = ModelInfo("<b>x</b>", 0, 10, 10)
        page = await client.get("/")
        assert page.status_code == 200
        assert "<b>x" not in page.text
        assert "curl http://server/v1/completions" in page.text

    call(work)


def test_openapi_document_lists_routes_and_error_shapes() -> None:
    async def work(client: httpx.AsyncClient, _: ParrotEngine) -> None:
        document = (await client.get("/openapi.json")).json()
        post = document["paths"]["/v1/chat/completions"]["post"]
        assert {"200", "400", "429", "503"} <= set(post["responses"])
        assert "422" not in post["responses"]
        assert "messages" in document["components"]["schemas"]["ChatRequest"]["properties"]

    call(work)


@contextlib.asynccontextmanager
async def raw_request(engine: ParrotEngine, body: Json, sent: list[Json], leave: asyncio.Event) -> AsyncIterator[Any]:
    """One request over bare ASGI, whose client leaves when ``leave`` is set."""
    content = [json.dumps(body).encode()]

    async def receive() -> Json:
        if content:
            return {"type": "http.request", "body": content.pop(), "more_body": False}
        await leave.wait()
        return {"type": "http.disconnect"}

    async def send(message: Json) -> None:
        sent.append(dict(message))

    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": "POST",
        "path": "/v1/completions",
        "raw_path": b"/v1/completions",
        "root_path": "",
        "query_string": b"",
        "headers": [(b"content-type", b"application/json")],
        "scheme": "http",
        "server": ("server", 80),
        "client": ("client", 1),
    }
    task = asyncio.ensure_future(build_app(engine, ServerSettings(keep_alive_s=0.05))(scope, receive, send))
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@pytest.mark.parametrize("stream", [False, True])
def test_pain_7_a_client_that_leaves_ends_its_request_at_once(stream: bool) -> None:
    async def run() -> None:
        engine, leave, sent = ParrotEngine(), asyncio.Event(), list[Json]()
        async with raw_request(engine, {"prompt": "wait", "stream": stream}, sent, leave) as task:
            await asyncio.wait_for(engine.reading.wait(), 2)
            assert engine.closed == []
            leave.set()
            await asyncio.wait_for(task, 1)
            assert engine.closed == [engine.seen[0].request_id]
            if not stream:
                assert sent[0]["status"] == 499

    asyncio.run(run())


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_before_the_first_token_is_not_forgotten(stream: bool) -> None:
    async def run() -> None:
        engine, leave, sent = ParrotEngine(), asyncio.Event(), list[Json]()
        leave.set()
        async with raw_request(engine, {"prompt": "wait", "stream": stream}, sent, leave) as task:
            await asyncio.wait_for(task, 1)
            assert engine.closed == [engine.seen[0].request_id]

    asyncio.run(run())


def test_a_cancelled_handler_ends_its_request() -> None:
    async def run() -> None:
        engine, sent = ParrotEngine(), list[Json]()
        async with raw_request(engine, {"prompt": "wait", "stream": True}, sent, asyncio.Event()) as task:
            await asyncio.wait_for(engine.reading.wait(), 2)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            assert engine.closed == [engine.seen[0].request_id]

    asyncio.run(run())


def test_silent_streams_get_keep_alive_comments() -> None:
    async def run() -> None:
        engine, leave, sent = ParrotEngine(), asyncio.Event(), list[Json]()
        async with raw_request(engine, {"prompt": "wait", "stream": True}, sent, leave) as task:
            await asyncio.wait_for(engine.reading.wait(), 2)
            await asyncio.sleep(0.2)
            leave.set()
            await task
        bodies = [message["body"] for message in sent if message["type"] == "http.response.body"]
        assert bodies[0].startswith(b"data: ")
        assert b": keep-alive\n\n" in bodies
        assert 2 <= bodies.count(b": keep-alive\n\n") <= 4

    asyncio.run(run())


def test_engine_request_ids_are_ours_even_when_clients_repeat_theirs() -> None:
    """Pain 8: one client's disconnect cancelled another's request."""

    async def work(client: httpx.AsyncClient, engine: ParrotEngine) -> None:
        for _ in range(2):
            await client.post("/v1/completions", json={"prompt": "x"}, headers={"x-request-id": "same"})
        assert engine.seen[0].request_id != engine.seen[1].request_id

    call(work)
