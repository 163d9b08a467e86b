"""A conversation with a model behind OpenAI's API: what ``moeyard chat http://...`` does.

The same shape as :class:`launch.conversation.Conversation`, so that the terminal does not know which one it talks to.
"""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Generator, Iterator
from typing import Any

from launch.conversation import Speed
from moe.errors import UserError
from moe.generate import SamplingParams

CONNECT_S = 10.0
ANSWER_S = 600.0


class ServerAnswerError(UserError):
    """The server cannot be reached, or refuses, or breaks off; the text says which."""


class RemoteConversation:
    """Messages with a served model. Turns that no longer fit into its context are forgotten, oldest first.

    Args:
        url: of the server, with or without ``/v1``.
        params: sampling rules of every answer.
        system: text of a system message at the beginning.
        api_key: sent as a bearer token.

    Attributes:
        model: the served model's name; context: its length in tokens, 0 if the server does not say.
        forgotten: messages that the last answer no longer saw.

    Raises:
        ServerAnswerError: no such server there, or it serves nothing.
    """

    def __init__(self, url: str, params: SamplingParams, system: str | None = None, api_key: str | None = None) -> None:
        self._base = url.rstrip("/").removesuffix("/v1") + "/v1"
        self._params = params
        self._headers = {"Content-Type": "application/json"} | (
            {"Authorization": f"Bearer {api_key}"} if api_key else {}
        )
        self._system = [{"role": "system", "content": system}] if system else []
        self._messages: list[dict[str, str]] = []
        self.speed = Speed()
        self.forgotten = 0
        with self._open("/models", None, CONNECT_S) as response:
            served = _object(response.read()).get("data") or []
        if not served or not isinstance(served[0], dict):
            raise ServerAnswerError(f"{self._base}/models lists no model")
        self.model = str(served[0].get("id"))
        self.context = int(served[0].get("max_model_len") or 0)

    @property
    def turns(self) -> int:
        """Messages so far, both sides."""
        return len(self._messages)

    def reset(self) -> None:
        """Begin anew; the system message stays."""
        self._messages.clear()
        self.speed, self.forgotten = Speed(), 0

    def answer(self, text: str) -> Generator[str, None, None]:
        """The answer to ``text``, piece by piece. What was yielded is remembered, even when the caller stops early.

        Raises:
            ServerAnswerError: see there.
        """
        self._messages.append({"role": "user", "content": text})
        pieces: list[str] = []
        begun = last = time.perf_counter()
        try:
            for piece in self._stream():
                now = time.perf_counter()
                if not pieces:
                    self.speed.first_token_s = now - begun
                    self.speed.answers += 1
                else:
                    self.speed.rest_s += now - last
                last = now
                shown = piece.lstrip() if not pieces else piece
                if shown:
                    pieces.append(shown)
                    yield shown
        except ServerAnswerError:
            if not pieces:
                self._messages.pop()
            raise
        finally:
            if self._messages and self._messages[-1]["role"] == "user":
                self._messages.append({"role": "assistant", "content": "".join(pieces).rstrip()})

    def _stream(self) -> Iterator[str]:
        for first in range(0, len(self._messages), 2):
            try:
                response = self._open("/chat/completions", self._body(self._messages[first:]), ANSWER_S)
            except _TooLongError:
                continue
            self.forgotten = first
            with response:
                yield from self._pieces(response)
            return
        raise ServerAnswerError("the message alone is longer than the model's context")

    def _body(self, messages: list[dict[str, str]]) -> dict[str, Any]:
        params = self._params
        seed = None if params.seed is None else params.seed + self.turns
        body = {
            "model": self.model,
            "messages": [*self._system, *messages],
            "stream": True,
            "stream_options": {"include_usage": True},
            "max_tokens": params.max_tokens,
            "temperature": params.temperature,
            "top_p": params.top_p,
            "top_k": params.top_k,
            "seed": seed,
        }
        return {key: value for key, value in body.items() if value is not None}

    def _pieces(self, response: http.client.HTTPResponse) -> Iterator[str]:
        """Text of the stream's events.

        Raises:
            ServerAnswerError: an error event, or the end of the stream without its last event.
        """
        try:
            for line in response:
                if not line.startswith(b"data:"):
                    continue
                data = line.removeprefix(b"data:").strip()
                if data.startswith(b"[DONE]"):
                    return
                event = _object(data)
                if event.get("error"):
                    raise ServerAnswerError(_message(event) or "the server failed while answering")
                usage = event.get("usage")
                if isinstance(usage, dict):
                    self.speed.prompt_tokens = int(usage.get("prompt_tokens", 0))
                    self.speed.tokens += int(usage.get("completion_tokens", 0))
                for choice in event.get("choices") or []:
                    if text := (choice.get("delta") or {}).get("content"):
                        yield str(text)
        except (OSError, http.client.HTTPException) as error:
            raise ServerAnswerError(f"the connection broke off: {error}") from error
        raise ServerAnswerError("the server broke off the answer")

    def _open(self, path: str, body: dict[str, Any] | None, timeout_s: float) -> http.client.HTTPResponse:
        data = None if body is None else json.dumps(body).encode()
        try:
            request = urllib.request.Request(self._base + path, data, self._headers)
            response: http.client.HTTPResponse = urllib.request.urlopen(request, timeout=timeout_s)
            return response
        except urllib.error.HTTPError as error:
            raise self._refused(error) from error
        except (urllib.error.URLError, OSError, http.client.HTTPException, ValueError) as error:
            reason = getattr(error, "reason", None) or error
            raise ServerAnswerError(f"cannot reach {self._base}: {reason}; is the server running?") from error

    def _refused(self, error: urllib.error.HTTPError) -> ServerAnswerError:
        answer = _object(error.read())
        message = _message(answer) or f"HTTP status {error.code}"
        detail = answer.get("error")
        if isinstance(detail, dict) and detail.get("code") == "context_length_exceeded":
            return _TooLongError(message)
        if error.code == 401:
            message += " (give it with --api-key or MOEYARD_API_KEY)"
        if error.code == 429 and error.headers.get("Retry-After"):
            message += f" (in about {error.headers['Retry-After']} s)"
        return ServerAnswerError(message)


class _TooLongError(ServerAnswerError):
    """The messages do not fit into the model's context."""


def _object(data: bytes) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _message(answer: dict[str, Any]) -> str:
    detail = answer.get("error")
    return str(detail.get("message", "")) if isinstance(detail, dict) else str(detail or "")
