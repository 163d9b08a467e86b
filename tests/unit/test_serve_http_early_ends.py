"""Answers that end early: the client leaves, the time is over, the engine gives up. Always one request, and at once."""

from __future__ import annotations

import asyncio
import json
import re
import time

import httpx
import openai
import pytest

from serve.client import EngineRequest, TokenChunk, TokenStream
from serve.http.app import build_app
from serve.http.settings import ServerSettings
from tests.parrot_engine import Json, ParrotEngine, ParrotStream, call, raw_request

pytestmark = pytest.mark.unit


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


def test_a_body_that_breaks_off_is_nobodys_fault() -> None:
    async def run() -> None:
        engine, leave, sent = ParrotEngine(), asyncio.Event(), list[Json]()
        leave.set()
        async with raw_request(engine, b'{"prompt": ', sent, leave) as task:
            await asyncio.wait_for(task, 1)
        assert sent[0]["status"] == 499
        assert engine.seen == []

    asyncio.run(run())


def test_a_client_that_leaves_ends_its_embeddings() -> None:
    async def run() -> None:
        engine, leave, sent = ParrotEngine(), asyncio.Event(), list[Json]()
        async with raw_request(engine, {"input": "wait"}, sent, leave, "/v1/embeddings") as task:
            await asyncio.wait_for(engine.reading.wait(), 2)
            assert engine.closed == []
            leave.set()
            await asyncio.wait_for(task, 1)
        assert engine.closed == [engine.embedded[0].request_id]
        assert sent[0]["status"] == 499

    asyncio.run(run())


SHORT = ServerSettings(request_timeout_s=0.1)


def test_a_whole_answer_that_takes_too_long_is_408_and_its_request_ends() -> None:
    async def work(client: httpx.AsyncClient, engine: ParrotEngine) -> None:
        for path, body in (("/v1/completions", {"prompt": "wait"}), ("/v1/embeddings", {"input": "wait"})):
            answer = await client.post(path, json=body)
            assert answer.status_code == 408
            assert answer.json() == {
                "error": {
                    "message": "The answer was not complete after 0.1 s, which is this server's limit.",
                    "type": "timeout_error",
                    "param": None,
                    "code": "timeout",
                }
            }
            assert answer.headers["x-should-retry"] == "false"
        assert engine.closed == [engine.seen[0].request_id, engine.embedded[0].request_id]
        # The server goes on.
        assert (await client.post("/v1/completions", json={"prompt": "x"})).json()["choices"][0]["text"] == "x"

    call(work, SHORT)


def test_a_stream_that_takes_too_long_ends_with_an_error_event() -> None:
    async def work(client: httpx.AsyncClient, engine: ParrotEngine) -> None:
        answer = await client.post("/v1/completions", json={"prompt": "wait", "stream": True})
        assert answer.status_code == 200
        events = [json.loads(line.removeprefix("data: ")) for line in answer.text.split("\n\n") if line]
        assert events[0]["choices"][0]["text"] == "w"
        assert events[1]["error"]["code"] == "timeout"
        assert len(events) == 2
        assert "[DONE]" not in answer.text
        assert engine.closed == [engine.seen[0].request_id]

    call(work, SHORT)


def test_openai_client_does_not_repeat_a_request_that_took_too_long() -> None:
    async def run() -> None:
        engine = ParrotEngine()
        transport = httpx.ASGITransport(build_app(engine, SHORT))
        async with openai.AsyncOpenAI(
            base_url="http://server/v1",
            api_key="none",
            max_retries=2,
            http_client=httpx.AsyncClient(transport=transport),
        ) as client:
            with pytest.raises(openai.APIStatusError) as late:
                await client.completions.create(model="parrot", prompt="wait")
            assert (late.value.status_code, late.value.code) == (408, "timeout")
            assert len(engine.seen) == 1
            with pytest.raises(openai.APIError, match=r"not complete after 0\.1 s"):
                async for _ in await client.completions.create(model="parrot", prompt="wait", stream=True):
                    pass

    asyncio.run(run())


def test_the_time_limit_counts_the_whole_answer_and_not_the_silence() -> None:
    """An engine that never pauses long enough to be interrupted is stopped too."""

    class Slow(ParrotEngine):
        async def generate(self, request: EngineRequest) -> TokenStream:
            return SlowStream(self, request)

    class SlowStream(ParrotStream):
        async def __anext__(self) -> TokenChunk:
            time.sleep(0.02)  # as a step that keeps the event loop busy does
            return await super().__anext__()

    async def work(client: httpx.AsyncClient, _: ParrotEngine) -> None:
        answer = await client.post("/v1/completions", json={"prompt": "x" * 500, "max_tokens": 500})
        assert answer.status_code == 408

    call(work, SHORT, Slow)


def test_early_ends_are_counted_by_reason() -> None:
    async def run() -> None:
        engine, leave, sent = ParrotEngine(), asyncio.Event(), list[Json]()
        app = build_app(engine, SHORT)
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(app, raise_app_exceptions=False), base_url="http://server"
        ) as client:
            for prompt in ("wait", "abort", "fail", "bug"):
                for stream in (False, True):
                    await client.post("/v1/completions", json={"prompt": prompt, "stream": stream})
            await client.post("/v1/embeddings", json={"input": "abort"})
            for stream in (False, True):
                engine.reading.clear()
                leave.clear()
                async with raw_request(engine, {"prompt": "wait", "stream": stream}, sent, leave, app=app) as task:
                    await asyncio.wait_for(engine.reading.wait(), 2)
                    leave.set()
                    await asyncio.wait_for(task, 1)
            # Refused before they were admitted, so nothing was aborted.
            engine.full = True
            assert (await client.post("/v1/completions", json={"prompt": "x"})).status_code == 429
            text = (await client.get("/metrics")).text
        counted = dict(re.findall(r'moeyard:requests_aborted_total\{model_name="parrot",reason="(\w+)"\} (\S+)', text))
        assert counted == {"timeout": "2.0", "abort": "3.0", "engine": "2.0", "error": "2.0", "disconnect": "2.0"}

    asyncio.run(run())
