"""The request's side of function calls: ``tools`` and ``tool_choice``, and a grammar for answers that must be calls."""

from __future__ import annotations

import json
import re
from typing import Annotated, Any, TypeAlias

from pydantic import AfterValidator

from serve.client import Structure
from serve.protocol.structured import schema_text, sized
from serve.protocol.tool_calls import CLOSE, OPEN
from serve.protocol.validation import problem

MAX_TOOLS = 128
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
# Blanks as json.dumps writes them: a model that may write them anywhere can do so for ever.
_STYLE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}

Tool: TypeAlias = dict[str, Any]


def _check_tools(tools: list[Tool] | None) -> list[Tool] | None:
    if len(tools or []) > MAX_TOOLS:
        raise problem(f"at most {MAX_TOOLS} tools, got {len(tools or [])}")
    for index, tool in enumerate(tools or []):
        if tool.get("type") != "function":
            raise problem(f"tool {index}: only tools of type 'function' are supported", kind="unsupported_parameter")
        function = tool.get("function")
        name = function.get("name") if isinstance(function, dict) else None
        if not isinstance(function, dict) or not isinstance(name, str) or not _NAME.fullmatch(name):
            raise problem(f"tool {index} needs a `function` whose `name` has up to 64 of the characters A-Za-z0-9_-")
        if not isinstance(function.get("description"), str | None):
            raise problem(f"tool {index}: `description` must be a string")
        if function.get("parameters") is not None:
            schema_text(function["parameters"])  # not valid: refused
    return tools


def _check_choice(choice: Any) -> Any:
    """One of the three words, or the name of the chosen function in a tuple."""
    if choice is None or choice in ("none", "auto", "required"):
        return choice
    if isinstance(choice, dict):
        function = choice.get("function")
        if choice.get("type") == "function" and isinstance(function, dict) and isinstance(function.get("name"), str):
            return (function["name"],)
        if choice.get("type") != "function":
            raise problem("only a choice of type 'function' is supported", kind="unsupported_parameter")
    raise problem("must be 'none', 'auto', 'required' or {'type': 'function', 'function': {'name': ...}}")


Tools = Annotated[list[Tool] | None, AfterValidator(_check_tools)]
ToolChoice = Annotated[Any, AfterValidator(_check_choice)]


def name_of(tool: Tool) -> str:
    return str(tool["function"]["name"])


def calls_grammar(tools: list[Tool], *, several: bool) -> Structure:
    """Answers that are calls of these functions and nothing else, as :mod:`serve.protocol.tool_calls` reads them.

    Args:
        several: more calls may follow the first.

    Raises:
        PydanticCustomError: the parameters of all functions together are too large.
    """
    rules = ['start: call ("\\n" call)*' if several else "start: call"]
    rules.append("call: " + " | ".join(f"call_{index}" for index in range(len(tools))))
    for index, tool in enumerate(tools):
        head = f'{OPEN}\n{{"name": {json.dumps(name_of(tool))}, "arguments": '
        schema = {"type": "object", **(tool["function"].get("parameters") or {}), "x-guidance": _STYLE}
        rules.append(f"call_{index}: {json.dumps(head)} arguments_{index} {json.dumps('}' + chr(10) + CLOSE)}")
        rules.append(f"arguments_{index}: %json {schema_text(schema)}")
    return sized(Structure("grammar", "\n".join(rules) + "\n"), "tools")
