"""The body of ``POST /v1/completions``."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from serve.client import EngineRequest, ModelInfo
from serve.protocol.fields import MAX_LOGPROBS, Count, GenerationFields
from serve.protocol.prompts import PromptForms, as_prompts, check_prompts
from serve.protocol.validation import only, problem

MAX_PROMPTS = 1024
# OpenAI's default; a chat answer, which ends by itself, has none.
DEFAULT_MAX_TOKENS = 16


class CompletionRequest(GenerationFields):
    """Fields as OpenAI documents them, plus those of :class:`~serve.protocol.fields.GenerationFields`."""

    prompt: Annotated[PromptForms, BeforeValidator(check_prompts(MAX_PROMPTS))]
    max_tokens: Count | None = Field(None, description=f"left out: {DEFAULT_MAX_TOKENS}")
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    suffix: Annotated[Any, AfterValidator(only(""))] = None
    best_of: int | None = None
    add_special_tokens: bool | None = Field(
        None, description="makes no difference: these models' prompts begin with no token of their own (vLLM)"
    )

    @model_validator(mode="after")
    def _combinations(self) -> CompletionRequest:
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise problem(
                "`best_of` is not supported by this server unless it equals `n`", "best_of", "unsupported_parameter"
            )
        if self.max_tokens == 0 and not self.echo:
            raise problem("`max_tokens` must be at least 1 unless `echo` is true", "max_tokens")
        return self

    def to_engine(self, request_id: str, model: ModelInfo) -> EngineRequest:
        echo = bool(self.echo)
        sampling = self.sampling_options(
            model,
            max_tokens=DEFAULT_MAX_TOKENS if self.max_tokens is None else self.max_tokens,
            logprobs=self.logprobs,
            prompt_logprobs=self.logprobs if echo else None,
        )
        return self.engine_request(request_id, model, as_prompts(self.prompt), sampling, return_prompt=echo)
