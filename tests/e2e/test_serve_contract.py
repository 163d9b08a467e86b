"""What every host promises, over real HTTP to real processes: in one process, with experts on two, and on Ray in both
layouts.

What only one host does is in test_serve_embedded.py, test_serve_ray.py and test_serve_ray_local.py; the shapes of all
answers, without a model, in tests/unit/test_serve_http_*.py.
"""

from __future__ import annotations

import asyncio
import base64
import json
import math
import signal
import struct
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from moe.checkpoint import load_model
from moe.generate import SamplingParams, generate
from tests.fox import TOKENIZER, make_run
from tests.serve_hosts import EMBEDDED, GANG, KEY, RAY_A, RAY_B, HostKeeper, HostOptions, ServerProcess

pytestmark = pytest.mark.e2e

CONTEXT, MAX_BODY = 512, 100_000
TEMPLATE = """\
{%- for tool in tools or [] %}{{ tool | tojson }}{% endfor -%}
{%- for message in messages %}{{ message.role }}: {{ message.content }}
{% endfor %}"""
# One sequence at a time, so that queues are as the tests say.
OPTIONS = HostOptions(
    engine={"max_sequences": 1, "max_queue": 2},
    settings={"api_keys": ["sk-good"], "max_body_bytes": MAX_BODY, "drain_s": 0.2},
    host={"name": "fox"},
)
# Takes far longer than any test waits.
ENDLESS: dict[str, Any] = {"prompt": "Gr", "max_tokens": 500, "n": 100, "ignore_eos": True}
JSON = {"content-type": "application/json"}
IDLE = {"num_requests_running": 0.0, "num_requests_waiting": 0.0}
HI: Any = [{"role": "user", "content": "Grüße! How are you?"}]  # more than a block, so that it can be found again
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Rome"]}, "now": {"const": True}},
            "required": ["city", "now"],
            "additionalProperties": False,
        },
    },
}


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "fox-1", context=CONTEXT, template=TEMPLATE)


@pytest.fixture(scope="module", params=[EMBEDDED, GANG, RAY_A, RAY_B])
def host(request: pytest.FixtureRequest, run_dir: Path) -> Iterator[HostKeeper]:
    keeper = HostKeeper(request.param, run_dir, OPTIONS)
    yield keeper
    keeper.close()


@pytest.fixture
def server(host: HostKeeper) -> ServerProcess:
    return host.running()


@pytest.fixture
def client(server: ServerProcess) -> Iterator[openai.OpenAI]:
    with server.client() as client:
        yield client


def test_models_completions_and_chat(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["fox"]
    assert client.models.retrieve("fox").owned_by == "moeyard"
    answer = client.completions.create(model="fox", prompt="Gr", max_tokens=30, temperature=0, stop=["STOP", "here"])
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("üße, 😀 fox! ", "stop")
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.total_tokens) == (2, 2 + answer.usage.completion_tokens)
    chat = client.chat.completions.create(model="fox", messages=HI, max_tokens=8)
    assert chat.choices[0].message.role == "assistant"
    assert chat.choices[0].finish_reason in ("stop", "length")
    assert chat._request_id is not None
    assert "," not in chat._request_id  # hosts stamp answers as well


def test_a_stop_string_is_held_back_while_it_may_still_come(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"model": "fox", "prompt": "Gr", "temperature": 0, "stop": "STOP"}
    pieces = [chunk.choices[0].text for chunk in client.completions.create(stream=True, max_tokens=60, **options)]
    assert len(pieces) > 1
    assert "".join(pieces) == "üße, 😀 fox! "
    # "S" alone is not the stop string, so it is text after all.
    to_s = len("üße, 😀 fox! S".encode())
    cut = client.completions.create(stream=True, max_tokens=to_s, **options)
    assert "".join(chunk.choices[0].text for chunk in cut) == "üße, 😀 fox! S"


def test_greedy_answer_is_moe_generate_on_the_exported_model(client: openai.OpenAI, run_dir: Path) -> None:
    answer = client.completions.create(model="fox", prompt="Once", max_tokens=60, temperature=0, logprobs=2)
    model = load_model(run_dir / "model").model
    params = SamplingParams(max_tokens=60, temperature=0)
    steps = list(generate(model, TOKENIZER.encode("Once"), params, eos_id=TOKENIZER.eos_id))
    assert answer.choices[0].text == TOKENIZER.decode([step.token for step in steps])
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.token_logprobs == pytest.approx([step.logprob for step in steps], abs=1e-4)


def test_a_prompt_is_scored_by_its_echo(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="fox", prompt="fox! STOP", max_tokens=0, echo=True, logprobs=1)
    (choice,) = answer.choices
    assert choice.text == "fox! STOP"
    assert choice.logprobs is not None
    first, *scores = choice.logprobs.token_logprobs or []
    assert first is None  # nothing came before it
    assert len(scores) == len("fox! STOP") - 1
    assert all(score is not None and score <= 0 for score in scores)
    assert choice.logprobs.tokens == list("fox! STOP")


def test_streams_equal_whole_answers_with_usage_and_logprobs(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"model": "fox", "temperature": 1.5, "seed": 11, "max_tokens": 40, "n": 2}
    options |= {"messages": HI, "logprobs": True, "top_logprobs": 2}
    whole = client.chat.completions.create(**options)
    texts, roles, finish, usage = ["", ""], [], {}, None
    logprobs: list[list[Any]] = [[], []]
    for chunk in client.chat.completions.create(stream=True, stream_options={"include_usage": True}, **options):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            roles += [choice.delta.role] if choice.delta.role else []
            finish |= {choice.index: choice.finish_reason} if choice.finish_reason else {}
            logprobs[choice.index] += choice.logprobs.content or [] if choice.logprobs else []
    assert texts == [choice.message.content for choice in whole.choices]
    assert roles == ["assistant"] * 2
    assert finish == {choice.index: choice.finish_reason for choice in whole.choices}
    assert usage is not None
    assert whole.usage is not None
    details = {"prompt_tokens_details"}
    assert usage.model_dump(exclude=details) == whole.usage.model_dump(exclude=details)
    assert usage.prompt_tokens_details is not None
    assert usage.prompt_tokens_details.cached_tokens  # the same prompt came before
    for one, streamed in zip(whole.choices, logprobs, strict=True):
        assert one.logprobs is not None
        assert one.logprobs.content is not None
        assert [entry.token for entry in one.logprobs.content] == [entry.token for entry in streamed]
        assert all(len(entry.top_logprobs) == 2 for entry in streamed)
        raw = bytes(byte for entry in one.logprobs.content for byte in entry.bytes or [])
        assert raw.decode("utf-8", "replace").startswith((one.message.content or "")[:5])


@pytest.mark.parametrize(("path", "ask"), [("completions", {"prompt": "Gr"}), ("chat/completions", {"messages": HI})])
def test_a_stream_is_events_of_one_answer_with_usage_and_done_last(
    server: ServerProcess, path: str, ask: dict[str, Any]
) -> None:
    body = ask | {"max_tokens": 9, "ignore_eos": True, "stream": True, "stream_options": {"include_usage": True}}
    answer = server.http("POST", f"/v1/{path}", json=body)
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert answer.headers["cache-control"] == "no-cache"
    assert answer.headers["x-accel-buffering"] == "no"
    *events, done, nothing = answer.text.split("\n\n")
    assert (done, nothing) == ("data: [DONE]", "")
    values = [json.loads(event.removeprefix("data: ")) for event in events]
    assert len({(value["id"], value["object"], value["model"]) for value in values}) == 1
    assert values[-2]["choices"][0]["finish_reason"] == "length"
    assert values[-1]["choices"] == []
    assert values[-1]["usage"]["completion_tokens"] == 9
    assert all(value["usage"] is None for value in values[:-1])


def test_sample_i_of_a_seed_is_the_first_of_seed_plus_i(client: openai.OpenAI) -> None:
    def texts(seed: int, n: int, stream: bool = False) -> list[str]:
        options: dict[str, Any] = {"model": "fox", "prompt": "Gr", "temperature": 2, "max_tokens": 30}
        found = [""] * n
        if stream:
            for chunk in client.completions.create(seed=seed, n=n, stream=True, **options):
                found[chunk.choices[0].index] += chunk.choices[0].text
            return found
        return [choice.text for choice in client.completions.create(seed=seed, n=n, **options).choices]

    three = texts(5, 3)
    assert len(set(three)) == 3
    assert three == texts(5, 1) + texts(6, 1) + texts(7, 1)
    assert three == texts(5, 3, stream=True)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}])
def test_tool_calls_whole_and_streamed(client: openai.OpenAI, choice: Any) -> None:
    options: dict[str, Any] = {"model": "fox", "messages": HI, "tools": [WEATHER], "max_tokens": 200}
    options |= {"tool_choice": choice, "parallel_tool_calls": False}
    (whole,) = client.chat.completions.create(**options).choices
    with client.chat.completions.stream(**options) as stream:
        (streamed,) = stream.get_final_completion().choices
    for one in (whole, streamed):
        assert one.finish_reason == "tool_calls"
        (call,) = one.message.tool_calls or []
        assert call.type == "function"
        assert call.function.name == "get_weather"
        assert json.loads(call.function.arguments) == {"city": "Rome", "now": True}
        assert not one.message.content


def test_the_async_client_asks_two_things_at_once(server: ServerProcess) -> None:
    async def run() -> None:
        async with openai.AsyncOpenAI(**server.client_options()) as client:
            options: dict[str, Any] = {"model": "fox", "temperature": 0, "max_tokens": 50}

            async def streamed(prompt: str) -> str:
                stream = await client.completions.create(prompt=prompt, stream=True, **options)
                return "".join([chunk.choices[0].text async for chunk in stream])

            async def whole(prompt: str) -> str:
                return (await client.completions.create(prompt=prompt, **options)).choices[0].text

            alone = [await whole("Gr"), await whole("fo")]
            assert await asyncio.gather(streamed("Gr"), streamed("fo")) == alone
            assert await asyncio.gather(streamed("Gr"), whole("fo")) == alone

    asyncio.run(run())


def test_errors_become_the_clients_exceptions(client: openai.OpenAI) -> None:
    for stream in (False, True):
        with pytest.raises(openai.NotFoundError) as missing:
            client.completions.create(model="wolf", prompt="x", stream=stream)
        assert missing.value.code == "model_not_found"
        with pytest.raises(openai.BadRequestError) as long:
            client.completions.create(model="fox", prompt="x" * 600, stream=stream)
        assert long.value.code == "context_length_exceeded"
        assert "your prompt has 600 tokens" in str(long.value)
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model="fox", messages=HI, temperature=9)
    assert bad.value.param == "temperature"
    assert bad.value.request_id
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="sk-bad").models.list()


@pytest.mark.parametrize(
    ("status", "code", "method", "path", "options"),
    [
        (400, "invalid_json", "POST", "/v1/completions", {"content": b"{", "headers": KEY | JSON}),
        (400, "invalid_value", "POST", "/v1/embeddings", {"json": {"input": "x", "dimensions": 7}}),
        (401, "invalid_api_key", "GET", "/v1/models", {"headers": {}}),
        (403, "admin_key_required", "POST", "/admin/experts/start", {}),
        (404, "not_found", "GET", "/v1/nothing", {}),
        (404, "model_not_found", "GET", "/v1/models/wolf", {}),
        (405, "method_not_allowed", "GET", "/v1/completions", {}),
        (413, "request_too_large", "POST", "/v1/completions", {"json": {"prompt": "x" * MAX_BODY}}),
        (415, "unsupported_media_type", "POST", "/v1/completions", {"content": b"a=1", "headers": KEY}),
    ],
)
def test_errors_have_one_shape(
    server: ServerProcess, status: int, code: str, method: str, path: str, options: dict[str, Any]
) -> None:
    answer = server.http(method, path, **options)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert error["code"] == code
    assert len(answer.headers.get_list("x-request-id")) == 1
    if status == 405:
        assert answer.headers["allow"] == "POST"


def test_pain_5_a_full_queue_is_429_that_the_client_can_retry(client: openai.OpenAI, server: ServerProcess) -> None:
    refused = server.metric("admission_rejections_total", reason="requests")
    body = {key: value for key, value in ENDLESS.items() if key != "ignore_eos"}
    streams = [
        client.completions.create(model="fox", stream=True, extra_body={"ignore_eos": True}, **body) for _ in range(3)
    ]
    server.until_metrics(num_requests_running=1, num_requests_waiting=2)
    for stream in (False, True):
        began = time.monotonic()
        with pytest.raises(openai.RateLimitError) as full:
            client.completions.create(model="fox", prompt="x", stream=stream)
        assert time.monotonic() - began < 3  # at once, also where other programs want the processor
        assert int(full.value.response.headers["retry-after"]) >= 1
        assert (full.value.code, full.value.type) == ("queue_full_requests", "rate_limit_error")
    with ThreadPoolExecutor(1) as pool:
        patient = client.with_options(max_retries=5).completions.create
        retried = pool.submit(patient, model="fox", prompt="fo", max_tokens=2, temperature=0)
        time.sleep(0.2)
        for one in streams:
            one.close()
        assert retried.result(60).choices[0].text == "x!"
    server.until_metrics(**IDLE)
    assert server.metric("admission_rejections_total", reason="requests") >= refused + 3


@pytest.mark.parametrize("stream", [False, True])
def test_pain_7_closing_the_connection_ends_running_and_waiting_requests(server: ServerProcess, stream: bool) -> None:
    aborted = server.metric("request_success_total", finished_reason="abort")
    connections = [server.post_and_leave_open("/v1/completions", ENDLESS | {"stream": stream}) for _ in range(2)]
    server.until_metrics(num_requests_running=1, num_requests_waiting=1)
    for connection in reversed(connections):
        connection.close()
    assert server.until_metrics(**IDLE) < 3
    assert server.metric("request_success_total", finished_reason="abort") == aborted + 2


def test_embeddings_as_floats_and_base64(client: openai.OpenAI, server: ServerProcess) -> None:
    asked = client.embeddings.create(model="fox", input=["Gr", "fox!"], encoding_format="float")
    floats = [one.embedding for one in asked.data]
    assert [math.hypot(*vector) for vector in floats] == pytest.approx([1, 1], abs=1e-4)
    assert asked.usage.prompt_tokens == 6
    # The client asks for base64 by itself, and decodes it.
    assert client.embeddings.create(model="fox", input=[[*TOKENIZER.encode("Gr")]]).data[0].embedding == pytest.approx(
        floats[0], abs=1e-5
    )
    raw = server.http("POST", "/v1/embeddings", json={"input": "fox!", "encoding_format": "base64"}).json()
    packed = base64.b64decode(raw["data"][0]["embedding"])
    assert struct.unpack(f"<{len(packed) // 4}f", packed) == pytest.approx(floats[1], abs=1e-5)


def test_tokenize_and_detokenize(server: ServerProcess) -> None:
    answer = server.http("POST", "/tokenize", json={"prompt": "Grüße", "return_token_strs": True}).json()
    assert answer["tokens"] == TOKENIZER.encode("Grüße")
    assert (answer["count"], answer["max_model_len"]) == (7, CONTEXT)
    assert answer["token_strs"][:2] == ["G", "r"]
    assert server.http("POST", "/detokenize", json={"tokens": answer["tokens"]}).json() == {"prompt": "Grüße"}
    chat = server.http("POST", "/tokenize", json={"messages": HI, "model": "fox"}).json()
    assert TOKENIZER.decode(chat["tokens"]) == "user: Grüße! How are you?\n"


def test_health_needs_no_key_and_metrics_count(client: openai.OpenAI, server: ServerProcess) -> None:
    for path in ("/health", "/ready"):
        answer = httpx.get(server.url + path)
        assert (answer.status_code, answer.json()["status"]) == (200, "ready")
    for path in ("/metrics", "/version", "/openapi.json", "/experts/load"):
        assert httpx.get(server.url + path).status_code == 401
    assert server.http("GET", "/version").json()["version"]
    assert "/v1/completions" in server.http("GET", "/openapi.json").json()["paths"]
    assert server.http("GET", "/experts/load").json()["layers"] == [0, 1]

    server.until_metrics(**IDLE)
    before = server.metric("generation_tokens_total", model_name="fox")
    client.completions.create(model="fox", prompt="Gr", max_tokens=7, extra_body={"ignore_eos": True})
    server.until_metrics(generation_tokens_total=before + 7)
    text = server.http("GET", "/metrics").text
    assert 'moeyard:expert_load_imbalance{layer="1",model_name="fox"}' in text
    assert 'moeyard:e2e_request_latency_seconds_count{model_name="fox"}' in text


def test_an_error_after_the_first_byte_is_an_event_and_no_done(server: ServerProcess) -> None:
    """A server told to stop ends what is not over within its drain."""
    lines = server.stream_during(lambda: server.signal(signal.SIGTERM), max_tokens=500, n=100)
    error = json.loads(lines[-1].removeprefix("data: "))["error"]
    assert (error["code"], error["type"]) == ("aborted", "server_error")
    assert set(error) == {"message", "type", "param", "code"}
    assert "data: [DONE]" not in lines
    assert server.wait() == 0
    assert server.out[-1] == "stopped\n"
