"""``POST /tokenize`` and ``POST /detokenize`` in the shapes of vLLM."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, Field, model_validator

from serve.protocol.chat import MAX_MESSAGES, ChatMessage
from serve.protocol.chat_template import ChatTemplate
from serve.protocol.fields import TokenId
from serve.protocol.tools import Tools
from serve.protocol.validation import RequestBody, check_text, problem

MAX_IDS = 2**20


class TokenizeRequest(RequestBody):
    """A text, or messages, which are rendered as ``/v1/chat/completions`` renders them."""

    model: str | None = Field(None, max_length=512, description="served model; left out: the default one")
    prompt: Annotated[str, AfterValidator(check_text)] | None = None
    messages: list[ChatMessage] | None = Field(None, min_length=1, max_length=MAX_MESSAGES)
    tools: Tools = None
    add_generation_prompt: bool | None = Field(None, description="false leaves out the assistant's header")
    add_special_tokens: bool | None = Field(
        None, description="makes no difference: these models' prompts begin with no token of their own"
    )
    return_token_strs: bool | None = None

    @model_validator(mode="after")
    def _one_source(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise problem("send either `prompt` or `messages`", "prompt")
        return self

    def text(self, template: ChatTemplate) -> str:
        """What is to be tokenised.

        Raises:
            ApiError: 400 when the template refuses the messages.
        """
        if self.messages is None:
            return self.prompt or ""
        return template.render(
            [message.for_template() for message in self.messages],
            tools=self.tools or None,
            add_generation_prompt=self.add_generation_prompt is not False,
        )


class DetokenizeRequest(RequestBody):
    model: str | None = Field(None, max_length=512, description="served model; left out: the default one")
    tokens: list[TokenId] = Field(max_length=MAX_IDS)
