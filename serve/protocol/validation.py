"""What all request bodies share: strict types, our own words for errors, checks that several fields need."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pydantic import BaseModel, ConfigDict
from pydantic_core import PydanticCustomError


class RequestBody(BaseModel):
    """Base of all request bodies: strict types, so that ``"5"`` is no number and ``1`` no boolean."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False, frozen=True, protected_namespaces=())


def problem(message: str, param: str | None = None, kind: str = "invalid_value") -> PydanticCustomError:
    """A validation error with our own words; ``param`` is needed only where pydantic cannot know the field."""
    # pydantic formats the template with the context, so braces in the message must not be read as fields.
    return PydanticCustomError(kind, "{message}", {"message": message} | ({"param": param} if param else {}))


def only(*neutral: object) -> Callable[[Any], Any]:
    """Refuses every value but null and ``neutral``, which ask for nothing."""

    def check(value: Any) -> Any:
        if value is None or any(type(value) is type(item) and value == item for item in neutral):
            return value
        raise problem("is not supported by this server", kind="unsupported_parameter")

    return check


def check_text(text: str) -> str:
    """Refuses lone surrogates, which JSON can spell (``"\\ud800"``) and UTF-8, and so any tokenizer, cannot."""
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise problem(f"is not valid Unicode: lone surrogate at character {error.start}") from error
    return text
