"""Messages to prompt text, with the Jinja template that comes with the model.

Templates are written for Hugging Face's renderer, so this one has the same environment: a sandbox, trimmed blocks,
``raise_exception``, ``strftime_now``, ``tojson`` without HTML escapes, and loop controls.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import NoReturn

import jinja2
import jinja2.meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from moe.errors import UserError
from serve.protocol.errors import ApiError

# For models without a template: plain text that even a model that never saw a chat can continue.
PLAIN_TEMPLATE = """\
{% for message in messages %}
{{ message['role'] | capitalize }}: {{ message['content'] }}
{% endfor %}
{% if add_generation_prompt %}
Assistant:
{%- endif %}
"""
# Such a model does not know when its turn is over, and would write the user's next line too.
PLAIN_STOP = ("\nUser:", "\nSystem:")


class ChatTemplateError(UserError):
    """A chat template that is not valid Jinja."""


class _RefusedError(jinja2.TemplateError):
    """What a template's ``raise_exception`` raises."""


def _raise_exception(message: object) -> NoReturn:
    raise _RefusedError(str(message))


def _tojson(value: object, ensure_ascii: bool = False, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


class ChatTemplate:
    """A compiled template.

    Attributes:
        stop: strings that end the assistant's turn besides the request's own.
        takes_tools: the source looks at ``tools``.

    Raises:
        ChatTemplateError: when the source does not compile; says where.
    """

    def __init__(
        self, source: str, special_tokens: Mapping[str, str] | None = None, *, stop: tuple[str, ...] = ()
    ) -> None:
        self.stop = stop
        self._special_tokens = dict(special_tokens or {})
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        try:
            self._template = environment.from_string(source)
            self.takes_tools = "tools" in jinja2.meta.find_undeclared_variables(environment.parse(source))
        except jinja2.TemplateSyntaxError as error:
            raise ChatTemplateError(f"chat_template, line {error.lineno}: {error.message}") from error

    @classmethod
    def plain(cls) -> ChatTemplate:
        """The fallback: one ``Role: text`` line per message."""
        return cls(PLAIN_TEMPLATE, stop=PLAIN_STOP)

    def render(
        self,
        messages: Sequence[Mapping[str, object]],
        *,
        tools: Sequence[Mapping[str, object]] | None = None,
        add_generation_prompt: bool = True,
    ) -> str:
        """The prompt.

        Raises:
            ApiError: 400 with the template's own words when it refuses the messages (roles out of order, ...), or
                when there are tools and it has no place for them.
        """
        if tools and not self.takes_tools:
            message = 'This model\'s chat template has no tools. Send none, or `tool_choice`: "none".'
            raise ApiError(400, message, param="tools", code="unsupported_parameter")
        # Hugging Face's renderer gives templates these names whether there is something behind them or not.
        values = {"messages": messages, "tools": tools, "documents": None, **self._special_tokens}
        try:
            prompt = self._template.render(values, add_generation_prompt=add_generation_prompt)
            prompt.encode()  # a lone surrogate, from anywhere in the messages, ends here and not in the tokenizer
            return prompt
        except Exception as error:  # a template is a program that came with the model
            raise ApiError(
                400, f"The model's chat template cannot render these messages: {error}", param="messages"
            ) from error
