"""One line per request: as text for people, or as JSON for machines, which also says what an answer was made of."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Literal

from starlette.types import Scope

ACCESS_LOG = logging.getLogger("moeyard.serve.access")


@dataclass(slots=True)
class Answered:
    """What a request to a model came to. The route fills it in, the guard logs it.

    Attributes:
        finish: how its sequences ended ("stop", "length"; both: "length,stop"), or what ended it before.
    """

    model: str
    prompt_tokens: int = 0
    completion_tokens: int = 0
    finish: str = ""


def note(scope: Scope, answered: Answered) -> None:
    """Lets the request's line in the log have this."""
    scope["state"]["answered"] = answered


def printable(path: str) -> str:
    """A decoded path may hold line breaks, with which a client could forge log lines."""
    return path.encode("unicode_escape").decode("ascii")


def log_access(scope: Scope, status: int | None, seconds: float, form: Literal["text", "json"]) -> None:
    """Writes the line. ``status`` is None when nothing was answered."""
    if not ACCESS_LOG.isEnabledFor(logging.INFO):
        return
    request_id, method, ms = scope["state"]["request_id"], scope["method"], 1000 * seconds
    if form == "text":
        ACCESS_LOG.info("%s %s %s %s %.1f ms", request_id, method, printable(scope["path"]), status or "-", ms)
        return
    line: dict[str, object] = {
        "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "request_id": request_id,
        "method": method,
        "path": scope["path"],
        "status": status,
        "ms": round(ms, 1),
    }
    answered = scope["state"].get("answered")
    if isinstance(answered, Answered):
        line |= asdict(answered)
    ACCESS_LOG.info("%s", json.dumps(line))
