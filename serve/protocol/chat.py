"""The body of ``POST /v1/chat/completions``."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, model_validator

from serve.client import EngineRequest, ModelInfo
from serve.protocol.chat_template import ChatTemplate
from serve.protocol.fields import MAX_LOGPROBS, GenerationFields, RequestBody, Unlisted, Unsupported, only, problem


def _text_content(value: Any) -> Any:
    """Content as one string: null, a string, or a list of text parts (joined by newlines, as vLLM does)."""
    if value is None or isinstance(value, str):
        return value or ""
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
    return "\n".join(texts)


def _response_format(value: Any) -> Any:
    kind = value.get("type") if isinstance(value, dict) else value
    if value is None or kind == "text":
        return value
    raise problem("only {'type': 'text'} is supported by this server", kind="unsupported_parameter")


class ChatMessage(RequestBody):
    """One message. Fields beyond these are kept for the chat template."""

    model_config = ConfigDict(extra="allow")

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Annotated[str, BeforeValidator(_text_content)] = ""

    def for_template(self) -> dict[str, object]:
        """What a template sees. Templates older than the role know "developer" as "system"."""
        role = "system" if self.role == "developer" else self.role
        return {**(self.model_extra or {}), "role": role, "content": self.content}


class ChatRequest(GenerationFields):
    """Fields as OpenAI documents them, plus those of :class:`~serve.protocol.fields.GenerationFields`."""

    messages: list[ChatMessage] = Field(min_length=1, max_length=4096)
    max_tokens: int | None = Field(None, ge=1, description="left out: until the context is full")
    max_completion_tokens: int | None = Field(None, ge=1, description="the newer name of max_tokens")
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    add_generation_prompt: bool | None = Field(None, description="false leaves out the assistant's header (vLLM)")

    response_format: Annotated[Any, AfterValidator(_response_format)] = None
    tools: Unlisted = None
    tool_choice: Annotated[Any, AfterValidator(only("none", "auto"))] = None
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

    def to_engine(self, request_id: str, model: ModelInfo, template: ChatTemplate) -> EngineRequest:
        """Renders the messages.

        Raises:
            ApiError: 400 when the template refuses them.
        """
        prompt = template.render(
            [message.for_template() for message in self.messages],
            add_generation_prompt=self.add_generation_prompt is not False,
        )
        sampling = self.sampling_options(
            model.defaults,
            max_tokens=self.max_completion_tokens or self.max_tokens,
            logprobs=(self.top_logprobs or 0) if self.logprobs else None,
            extra_stop=template.stop,
        )
        return EngineRequest(request_id, model.model_id, (prompt,), sampling)
