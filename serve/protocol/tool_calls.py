"""Function calls in a model's text, in the form that Hermes and Qwen models are taught::

    <tool_call>
    {"name": "get_weather", "arguments": {"city": "Rome"}}
    </tool_call>

The parser takes text in any pieces and gives the same result for all of them: plain text as early as it is certain,
calls when they are complete. What looks like a call and is none stays text.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import NoReturn, TypeAlias

OPEN, CLOSE = "<tool_call>", "</tool_call>"
_STRING = re.compile(r'"(?:[^"\\]|\\.)*"', re.DOTALL)


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One call; ``arguments`` is the text of a JSON object, as OpenAI's clients expect it."""

    name: str
    arguments: str


Piece: TypeAlias = str | ToolCall


class ToolCallParser:
    """Follows one answer.

    Args:
        max_calls: calls after so many are left out; None: all are given.
    """

    def __init__(self, max_calls: int | None = None) -> None:
        self._max_calls = max_calls
        self._held = ""  # may be the beginning of a tag, or is the inside of a call
        self._searched = 0  # no closing tag begins before this in what is held
        self._inside = False
        self._gap: str | None = None  # blanks since the last call, which belong to nothing if another one follows
        self.num_calls = 0

    def push(self, text: str) -> list[Piece]:
        """What became certain with this text."""
        self._held += text
        pieces: list[Piece] = []
        while True:
            if self._inside:
                end = self._find_close()
                if end is None:
                    return pieces
                raw = self._held[:end]
                self._leave(end + len(CLOSE))
                pieces += self._call(raw, CLOSE)
                continue
            start = self._held.find(OPEN)
            if start < 0:
                certain = len(self._held) - _begun(self._held)
                pieces += self._text(self._held[:certain])
                self._held = self._held[certain:]
                return pieces
            pieces += self._text(self._held[:start])
            self._held = self._held[start + len(OPEN) :]
            self._inside, self._searched = True, 0

    def finish(self) -> list[Piece]:
        """What is still held at the end of the answer. A whole call counts without its closing tag too."""
        rest = self._held
        inside = self._inside
        self._leave(len(rest))
        return self._call(rest, "") if inside else self._text(rest)

    def _find_close(self) -> int | None:
        """Where the call ends: at the first closing tag that is no part of a string in its JSON."""
        while (end := self._held.find(CLOSE, self._searched)) >= 0:
            if '"' not in _STRING.sub("", self._held[:end]):
                return end
            self._searched = end + 1
        self._searched = max(self._searched, len(self._held) - len(CLOSE) + 1)
        return None

    def _leave(self, length: int) -> None:
        self._held = self._held[length:]
        self._inside, self._searched = False, 0

    def _call(self, raw: str, close: str) -> list[Piece]:
        call = parse_call(raw)
        if call is None:
            return self._text(OPEN + raw + close)
        self._gap = ""
        self.num_calls += 1
        return [call] if self._max_calls is None or self.num_calls <= self._max_calls else []

    def _text(self, text: str) -> list[Piece]:
        if self._gap is not None:
            self._gap += text
            if not self._gap.strip():
                return []
            text, self._gap = self._gap, None
        return [text] if text else []


def parse_call(raw: str) -> ToolCall | None:
    """The call between two tags, or None when it is not a JSON object with a name and an object of arguments."""
    try:
        value = json.loads(raw, parse_constant=_refuse_constant)
        name, arguments = value["name"], value["arguments"]
        if not (isinstance(name, str) and name and isinstance(arguments, dict)):
            return None
        return ToolCall(name, json.dumps(arguments, ensure_ascii=False))
    except (ValueError, TypeError, KeyError, RecursionError):
        return None


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _begun(text: str) -> int:
    """Length of the longest end of the text that an opening tag could begin with."""
    for length in range(min(len(text), len(OPEN) - 1), 0, -1):
        if OPEN.startswith(text[-length:]):
            return length
    return 0
