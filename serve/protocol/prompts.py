"""The four forms in which OpenAI takes prompts and inputs: a text, texts, token ids, lists of token ids."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

from serve.client import Prompt
from serve.protocol.validation import check_text, problem

PromptForms: TypeAlias = str | list[str] | list[int] | list[list[int]]


def _is_token(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**31


def check_prompts(most: int) -> Callable[[Any], Any]:
    """Checks the forms by hand, because pydantic would report every branch of the union."""

    def check(value: Any) -> Any:
        if isinstance(value, str):
            return check_text(value)
        if isinstance(value, list) and value:
            if len(value) > most and not _is_token(value[0]):
                raise problem(f"at most {most} prompts in one request, got {len(value)}")
            if all(isinstance(item, str) for item in value):
                return [check_text(item) for item in value]
            if all(map(_is_token, value)):
                return value
            if all(isinstance(item, list) and item and all(map(_is_token, item)) for item in value):
                return value
        raise problem(
            "must be a string, a list of strings, a list of token ids or a list of lists of token ids,"
            " none of them empty"
        )

    return check


def as_prompts(value: PromptForms) -> tuple[Prompt, ...]:
    """One prompt per element, text as it stands and token ids as tuples."""
    if isinstance(value, str):
        return (value,)
    first = value[0]
    if isinstance(first, int):
        return (tuple(token for token in value if isinstance(token, int)),)
    return tuple(item if isinstance(item, str) else tuple(item) for item in value if not isinstance(item, int))
