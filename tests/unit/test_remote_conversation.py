"""moeyard chat with a server: against a scripted one in a thread, with real sockets."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from launch.remote_conversation import RemoteConversation, ServerAnswerError
from moe.generate import SamplingParams

pytestmark = pytest.mark.unit


class Script:
    """What the server answers, and what it was asked."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.answers: list[Any] = []
        self.url = ""


def event(**delta: str) -> bytes:
    return b"data: " + json.dumps({"choices": [{"index": 0, "delta": delta}]}).encode() + b"\n\n"


USAGE = b'data: {"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 7}}\n\n'
DONE = b"data: [DONE]\n\n"


@pytest.fixture
def script() -> Iterator[Script]:
    state = Script()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None: ...

        def _send(self, status: int, body: bytes, **headers: str) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self) -> None:
            state.keys.append(self.headers.get("Authorization"))
            self._send(200, b'{"data": [{"id": "fox", "max_model_len": 99}]}')

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            state.asked.append(body)
            answer = state.answers.pop(0)
            if isinstance(answer, tuple):
                status, error, headers = answer
                self._send(status, json.dumps({"error": error}).encode(), **headers)
            else:
                self._send(200, answer)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield state
    server.shutdown()
    thread.join()
    server.server_close()


def test_turns_are_sent_as_one_conversation_and_counted(script: Script) -> None:
    script.answers = [
        b": keep-alive\n\n"
        + event(role="assistant", content="")
        + event(content=" Grüße")
        + event(content="!")
        + USAGE
        + DONE,
        event(content="Yes.") + USAGE + DONE,
    ]
    params = SamplingParams(max_tokens=9, temperature=0.5, top_k=3, seed=4)
    conversation = RemoteConversation(f"{script.url}/v1/", params, "Be brief.", "sk-1")
    assert (conversation.model, conversation.context) == ("fox", 99)
    assert list(conversation.answer("Hello")) == ["Grüße", "!"]
    assert list(conversation.answer("Sure?")) == ["Yes."]
    assert script.keys == ["Bearer sk-1"]
    first, second = script.asked
    assert first["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
    ]
    assert second["messages"][2:] == [
        {"role": "assistant", "content": "Grüße!"},
        {"role": "user", "content": "Sure?"},
    ]
    assert (first["max_tokens"], first["temperature"], first["top_k"], first["stream"]) == (9, 0.5, 3, True)
    assert first["seed"] != second["seed"]
    assert (conversation.turns, conversation.speed.tokens, conversation.speed.prompt_tokens) == (4, 14, 5)
    conversation.reset()
    assert conversation.turns == 0


def test_turns_that_do_not_fit_are_forgotten_oldest_first(script: Script) -> None:
    too_long = (400, {"message": "too long", "code": "context_length_exceeded"}, {})
    script.answers = [event(content="a") + DONE, too_long, event(content="b") + DONE, too_long, too_long]
    conversation = RemoteConversation(script.url, SamplingParams())
    list(conversation.answer("one"))
    assert list(conversation.answer("two")) == ["b"]
    assert conversation.forgotten == 2
    assert script.asked[-1]["messages"] == [{"role": "user", "content": "two"}]
    conversation.reset()
    with pytest.raises(ServerAnswerError, match="the message alone is longer"):
        list(conversation.answer("x" * 999))
    assert conversation.turns == 0


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ((401, {"message": "Incorrect API key provided."}, {}), "Incorrect API key provided. .give it with --api-key"),
        ((429, {"message": "The server is overloaded."}, {"Retry_After": "7"}), "overloaded. .in about 7 s"),
        ((500, {"message": "The server had an error."}, {}), "The server had an error"),
        ((502, {}, {}), "HTTP status 502"),
        (b'data: {"error": {"message": "The engine failed."}}\n\n', "The engine failed"),
        (event(content="cut"), "broke off the answer"),
        (b"data: nonsense\n\n", "broke off the answer"),
    ],
)
def test_refusals_and_broken_answers_are_said_in_words(script: Script, answer: Any, words: str) -> None:
    script.answers = [answer, event(content="fine") + DONE]
    conversation = RemoteConversation(script.url, SamplingParams())
    with pytest.raises(ServerAnswerError, match=words):
        list(conversation.answer("Hello"))
    assert list(conversation.answer("Again")) == ["fine"]


def test_no_server_there(script: Script) -> None:
    with pytest.raises(ServerAnswerError, match=r"cannot reach http://127.0.0.1:9/v1: .*refused.*server running"):
        RemoteConversation("http://127.0.0.1:9", SamplingParams())
