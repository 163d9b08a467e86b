"""Request bodies from bytes to values: JSON as the standard has it, in UTF-8, and no deeper than anybody means it."""

from __future__ import annotations

import json
from typing import NoReturn

from serve.protocol.errors import ApiError

# Tool parameters and JSON schemas nest about ten levels. Whatever walks the values later may do so by recursion.
MAX_DEPTH = 64


def parse_body(raw: bytes) -> object:
    """The value of a body.

    Raises:
        ApiError: 400 that says what is wrong and where.
    """
    try:
        # From bytes, json.loads would guess UTF-16 and UTF-32 too. A byte order mark is allowed (RFC 8259, 8.1).
        value = json.loads(raw.decode("utf-8-sig"), parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise _invalid(f"is not UTF-8: byte {error.start} cannot be decoded") from error
    except json.JSONDecodeError as error:
        raise _invalid(f"is not valid JSON: {error.msg} at character {error.pos}") from error
    except RecursionError as error:
        raise _too_deep() from error
    except ValueError as error:  # Python's own limit on the digits of an integer
        raise _invalid("has a number that is too long") from error
    if is_deeper(value, MAX_DEPTH):
        raise _too_deep()
    return value


def is_deeper(value: object, limit: int) -> bool:
    """Whether lists and objects nest deeper than ``limit``. Goes level by level, so depth costs no stack."""
    level = [value]
    for _ in range(limit):
        level = [
            inner
            for outer in level
            if isinstance(outer, list | dict)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, list | dict)
        ]
        if not level:
            return False
    return True


def _refuse_constant(name: str) -> NoReturn:
    raise _invalid(f"is not valid JSON: {name} is not a JSON number")


def _too_deep() -> ApiError:
    return _invalid(f"nests lists and objects deeper than {MAX_DEPTH} levels")


def _invalid(what: str) -> ApiError:
    return ApiError(400, f"The request body {what}.", code="invalid_json")
