"""The body of ``POST /v1/chat/completions``."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, model_validator

from serve.client import EngineRequest, ModelInfo, Structure
from serve.protocol.chat_template import ChatTemplate
from serve.protocol.fields import COUNT_LIMIT, MAX_LOGPROBS, GenerationFields, Unlisted, Unsupported
from serve.protocol.tools import Tool, ToolChoice, Tools, calls_grammar, name_of
from serve.protocol.validation import RequestBody, check_text, only, problem

MAX_MESSAGES = 4096


def _text_content(value: Any) -> Any:
    """Content as one string: null, a string, or a list of text parts (joined by newlines, as vLLM does)."""
    if value is None or isinstance(value, str):
        return check_text(value or "")
    if not isinstance(value, list):
        raise problem("must be a string or a list of content parts")
    texts = []
    for part in value:
        kind = part.get("type") if isinstance(part, dict) else None
        text = part.get("text") if isinstance(part, dict) else None
        if kind != "text":
            shown = kind[:40] if isinstance(kind, str) else type(part).__name__
            raise problem(f"only text parts are supported, got {shown!r}", kind="unsupported_parameter")
        if not isinstance(text, str):
            raise problem("a text part needs a string `text`")
        texts.append(text)
    return check_text("\n".join(texts))


def _with_parsed_arguments(call: dict[str, Any]) -> dict[str, Any]:
    """OpenAI's clients send a call's arguments as the text of JSON; templates of Hugging Face expect the object."""
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"])
    except (ValueError, RecursionError):
        return call
    return {**call, "function": {**function, "arguments": arguments}} if isinstance(arguments, dict) else call


_ContentForms: TypeAlias = str | list[dict[str, Any]] | None


class ChatMessage(RequestBody):
    """One message. Fields beyond these are kept for the chat template."""

    model_config = ConfigDict(extra="allow")

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Annotated[str, BeforeValidator(_text_content, json_schema_input_type=_ContentForms)] = ""
    tool_calls: list[dict[str, Any]] | None = Field(None, max_length=1024)

    def for_template(self) -> dict[str, object]:
        """What a template sees. Templates older than the role know "developer" as "system"."""
        role = "system" if self.role == "developer" else self.role
        calls = {"tool_calls": list(map(_with_parsed_arguments, self.tool_calls))} if self.tool_calls else {}
        return {**(self.model_extra or {}), "role": role, "content": self.content, **calls}


class ChatRequest(GenerationFields):
    """Fields as OpenAI documents them, plus those of :class:`~serve.protocol.fields.GenerationFields`."""

    messages: list[ChatMessage] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_tokens: int | None = Field(None, ge=1, lt=COUNT_LIMIT, description="left out: until the context is full")
    max_completion_tokens: int | None = Field(None, ge=1, lt=COUNT_LIMIT, description="the newer name of max_tokens")
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    add_generation_prompt: bool | None = Field(None, description="false leaves out the assistant's header (vLLM)")

    tools: Tools = None
    tool_choice: ToolChoice = None
    parallel_tool_calls: bool | None = Field(None, description="false: calls after the first are left out")
    functions: Unlisted = None
    function_call: Annotated[Any, AfterValidator(only("none", "auto"))] = None
    modalities: Annotated[Any, AfterValidator(only(["text"]))] = None
    audio: Unsupported = None
    prediction: Unsupported = None
    web_search_options: Unsupported = None

    @model_validator(mode="after")
    def _combinations(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise problem("`top_logprobs` needs `logprobs` to be true", "top_logprobs")
        both = self.max_tokens is not None and self.max_completion_tokens is not None
        if both and self.max_tokens != self.max_completion_tokens:
            raise problem("`max_tokens` and `max_completion_tokens` differ; send one of them", "max_tokens")
        return self

    @model_validator(mode="after")
    def _choice_among_tools(self) -> ChatRequest:
        known = [name_of(tool) for tool in self.tools or []]
        if self.tool_choice in (None, "none", "auto"):
            return self
        if not known:
            raise problem("`tool_choice` needs `tools` to choose from", "tool_choice")
        if self.tool_choice != "required" and self.tool_choice[0] not in known:
            raise problem(
                f"`tool_choice` names {self.tool_choice[0][:64]!r}, which is not among `tools`", "tool_choice"
            )
        if self.structure is not None:
            raise problem("an answer cannot be a function call and of another structure too", "tool_choice")
        self._forced_calls()  # refuses what is too large
        return self

    @property
    def offers_tools(self) -> bool:
        """The model is told of tools, so its answer may call them."""
        return bool(self.tools) and self.tool_choice != "none"

    @property
    def names(self) -> dict[str, str]:
        limit = "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"
        forced = {"response_format": "tools"} if self._forced_calls() else {}
        return super().names | {"prompt": "messages", "max_tokens": limit} | forced

    def _callable_tools(self) -> list[Tool]:
        if isinstance(self.tool_choice, tuple):
            return [tool for tool in self.tools or [] if name_of(tool) == self.tool_choice[0]]
        return self.tools or []

    def _forced_calls(self) -> Structure | None:
        if self.tool_choice in (None, "none", "auto"):
            return None
        several = self.tool_choice == "required" and self.parallel_tool_calls is not False
        return calls_grammar(self._callable_tools(), several=several)

    def to_engine(self, request_id: str, model: ModelInfo, template: ChatTemplate) -> EngineRequest:
        """Renders the messages.

        Raises:
            ApiError: 400 when the template refuses them, or knows no tools.
        """
        prompt = template.render(
            [message.for_template() for message in self.messages],
            tools=self.tools if self.offers_tools else None,
            add_generation_prompt=self.add_generation_prompt is not False,
        )
        sampling = self.sampling_options(
            model,
            max_tokens=self.max_completion_tokens or self.max_tokens,
            logprobs=(self.top_logprobs or 0) if self.logprobs else None,
            extra_stop=template.stop,
            structure=self._forced_calls(),
        )
        return self.engine_request(request_id, model, (prompt,), sampling)
