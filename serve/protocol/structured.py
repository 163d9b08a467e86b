"""The fields that ask for text of a given structure: OpenAI's ``response_format``, vLLM's newer and older ones.

Whether a schema, expression or grammar makes sense is for the engine to say. Here its kind, type and size are checked.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Annotated, Any

from pydantic import PlainValidator

from serve.client import Structure
from serve.protocol.json_body import is_deeper
from serve.protocol.validation import check_text, problem

MAX_SOURCE_BYTES = 64 * 2**10
MAX_SCHEMA_DEPTH = 32
MAX_ALTERNATIVES = 1024


def sized(structure: Structure, param: str | None = None) -> Structure:
    """Refuses a source that would take the engine long to read, or that is not Unicode."""
    size = len(check_text(structure.source).encode())
    if size > MAX_SOURCE_BYTES:
        message = f"a {structure.kind} of {size} bytes is too large, at most {MAX_SOURCE_BYTES} are allowed"
        raise problem(message, param)
    return structure


def schema_text(value: Any) -> str:
    """A JSON schema's source; vLLM's clients may send it as text."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise problem("a schema sent as text must be valid JSON") from error
    if not isinstance(value, dict):
        raise problem("a JSON schema must be an object")
    if is_deeper(value, MAX_SCHEMA_DEPTH):
        raise problem(f"a JSON schema may nest at most {MAX_SCHEMA_DEPTH} levels")
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except ValueError as error:
        raise problem("a JSON schema must not have infinite numbers") from error


def _schema(value: Any) -> Structure | None:
    return None if value is None else sized(Structure("json_schema", schema_text(value)))


def _regex(value: Any) -> Structure | None:
    return None if value is None else sized(Structure("regex", _filled(value, "a regular expression")))


def _grammar(value: Any) -> Structure | None:
    return None if value is None else sized(Structure("grammar", _filled(value, "a Lark grammar")))


def _filled(value: Any, what: str) -> str:
    if not isinstance(value, str) or not value:
        raise problem(f"{what} must be a string, and not empty")
    return value


def _choice(value: Any) -> Structure | None:
    if value is None:
        return None
    if not isinstance(value, list) or not value or not all(isinstance(item, str) and item for item in value):
        raise problem("the texts to choose from must be a list of strings, none of them empty")
    if len(value) > MAX_ALTERNATIVES:
        raise problem(f"at most {MAX_ALTERNATIVES} texts to choose from, got {len(value)}")
    return sized(Structure("choice", json.dumps(value, ensure_ascii=False)))


def _any_object(value: Any) -> Structure | None:
    if value is not None and not isinstance(value, bool):
        raise problem("`json_object` must be true or false")
    return Structure("json_object") if value else None


def _response_format(value: Any) -> Structure | None:
    if value is None:
        return None
    kind = value.get("type") if isinstance(value, dict) else None
    match kind:
        case "text":
            return None
        case "json_object":
            return Structure("json_object")
        case "json_schema":
            described = value.get("json_schema")
            if not isinstance(described, dict) or not isinstance(described.get("schema"), dict):
                raise problem("`json_schema` must be an object with a `schema`, which is an object too")
            return _schema(described["schema"])
        case str():
            message = f"must be of type text, json_object or json_schema, got {kind[:40]!r}"
            raise problem(message, kind="unsupported_parameter")
        case _:
            raise problem("must be an object with a `type`: text, json_object or json_schema")


_KINDS: dict[str, Callable[[Any], Structure | None]] = {
    "json": _schema,
    "regex": _regex,
    "choice": _choice,
    "grammar": _grammar,
    "json_object": _any_object,
}


def _structured_outputs(value: Any) -> Structure | None:
    if value is None:
        return None
    if not isinstance(value, dict):
        raise problem(f"must be an object with one of {', '.join(_KINDS)}")
    if value.get("structural_tag") is not None:
        raise problem("`structural_tag` is not supported by this server", kind="unsupported_parameter")
    found = [structure for key, parse in _KINDS.items() if (structure := parse(value.get(key))) is not None]
    if len(found) > 1:
        raise problem(f"only one of {', '.join(_KINDS)} at once")
    return found[0] if found else None


ResponseFormat = Annotated[
    Structure | None, PlainValidator(_response_format, json_schema_input_type=dict[str, Any] | None)
]
StructuredOutputs = Annotated[
    Structure | None, PlainValidator(_structured_outputs, json_schema_input_type=dict[str, Any] | None)
]
GuidedJson = Annotated[Structure | None, PlainValidator(_schema, json_schema_input_type=dict[str, Any] | str | None)]
GuidedRegex = Annotated[Structure | None, PlainValidator(_regex, json_schema_input_type=str | None)]
GuidedChoice = Annotated[Structure | None, PlainValidator(_choice, json_schema_input_type=list[str] | None)]
GuidedGrammar = Annotated[Structure | None, PlainValidator(_grammar, json_schema_input_type=str | None)]
