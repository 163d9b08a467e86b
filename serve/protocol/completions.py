"""The body of ``POST /v1/completions``."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from serve.client import EngineRequest, ModelInfo, Prompt
from serve.protocol.fields import MAX_LOGPROBS, MAX_PROMPTS, GenerationFields, check_text, only, problem

# OpenAI's default; a chat answer, which ends by itself, has none.
DEFAULT_MAX_TOKENS = 16


def _is_token(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**31


def _prompts(value: Any) -> Any:
    """Checks the four legal forms by hand: pydantic would report every branch of the union."""
    if isinstance(value, str):
        return check_text(value)
    if isinstance(value, list) and value:
        if len(value) > MAX_PROMPTS and not _is_token(value[0]):
            raise problem(f"at most {MAX_PROMPTS} prompts in one request, got {len(value)}")
        if all(isinstance(item, str) for item in value):
            return [check_text(item) for item in value]
        if all(map(_is_token, value)):
            return value
        if all(isinstance(item, list) and item and all(map(_is_token, item)) for item in value):
            return value
    raise problem(
        "must be a string, a list of strings, a list of token ids or a list of lists of token ids, none of them empty"
    )


class CompletionRequest(GenerationFields):
    """Fields as OpenAI documents them, plus those of :class:`~serve.protocol.fields.GenerationFields`."""

    prompt: Annotated[str | list[str] | list[int] | list[list[int]], BeforeValidator(_prompts)]
    max_tokens: int | None = Field(None, ge=0, description=f"left out: {DEFAULT_MAX_TOKENS}")
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    suffix: Annotated[Any, AfterValidator(only(""))] = None
    best_of: int | None = None

    @model_validator(mode="after")
    def _combinations(self) -> CompletionRequest:
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise problem(
                "`best_of` is not supported by this server unless it equals `n`", "best_of", "unsupported_parameter"
            )
        if self.max_tokens == 0 and not self.echo:
            raise problem("`max_tokens` must be at least 1 unless `echo` is true", "max_tokens")
        return self

    def prompts(self) -> tuple[Prompt, ...]:
        """One prompt per element, text as it stands and token ids as tuples."""
        if isinstance(self.prompt, str):
            return (self.prompt,)
        first = self.prompt[0]
        if isinstance(first, int):
            return (tuple(token for token in self.prompt if isinstance(token, int)),)
        return tuple(
            item if isinstance(item, str) else tuple(item) for item in self.prompt if not isinstance(item, int)
        )

    def to_engine(self, request_id: str, model: ModelInfo) -> EngineRequest:
        echo = bool(self.echo)
        sampling = self.sampling_options(
            model.defaults,
            max_tokens=DEFAULT_MAX_TOKENS if self.max_tokens is None else self.max_tokens,
            logprobs=self.logprobs,
            prompt_logprobs=self.logprobs if echo else None,
        )
        return EngineRequest(request_id, model.model_id, self.prompts(), sampling, return_prompt=echo)
