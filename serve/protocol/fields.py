"""Request fields that completions and chat share, their limits, and what they mean to the engine.

Unknown fields are accepted and ignored: clients add fields every year. A known field that this server does not
implement is refused unless its value asks for nothing, because ignoring it would change the answer silently.
"""

from __future__ import annotations

from typing import Annotated, Any, TypeAlias

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from serve.client import EngineRequest, ModelInfo, Prompt, SamplingOptions, Structure
from serve.protocol.structured import (
    GuidedChoice,
    GuidedGrammar,
    GuidedJson,
    GuidedRegex,
    ResponseFormat,
    StructuredOutputs,
)
from serve.protocol.validation import RequestBody, check_text, only, problem

MAX_CHOICES = 128
MAX_STOP_STRINGS = 4
MAX_STOP_CHARS = 1024
MAX_LOGIT_BIASES = 4096
MAX_LOGPROBS = 20
SEED_BITS = 63
# Far beyond any context, and still a number that every engine can add to another.
COUNT_LIMIT = 2**31


def _stop_list(value: Any) -> Any:
    """``stop`` as a list: OpenAI takes one string or up to four."""
    if value is None:
        return None
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise problem("must be a string or a list of strings")
    if len(stops) > MAX_STOP_STRINGS:
        raise problem(f"at most {MAX_STOP_STRINGS} stop strings, got {len(stops)}")
    if any(not stop for stop in stops):
        raise problem("a stop string must not be empty")
    if any(len(stop) > MAX_STOP_CHARS for stop in stops):
        raise problem(f"a stop string may have at most {MAX_STOP_CHARS} characters")
    return [check_text(stop) for stop in stops]


def _logit_bias(value: dict[str, float] | None) -> dict[str, float] | None:
    if len(value or {}) > MAX_LOGIT_BIASES:
        raise problem(f"at most {MAX_LOGIT_BIASES} biases, got {len(value or {})}")
    for key in value or {}:
        if not key.isascii() or not key.isdigit() or len(key) > 9:
            raise problem(f"keys are token ids in decimal, got {key[:40]!r}")
    return value


STRUCTURE_FIELDS = (
    "response_format",
    "structured_outputs",
    "guided_json",
    "guided_regex",
    "guided_choice",
    "guided_grammar",
)
Unsupported = Annotated[Any, AfterValidator(only())]
Unlisted = Annotated[Any, AfterValidator(only([]))]
Unset = Annotated[Any, AfterValidator(only(False))]
_StopForms: TypeAlias = (
    str
    | Annotated[
        list[Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]], Field(max_length=MAX_STOP_STRINGS)
    ]
    | None
)
StopList = Annotated[list[str] | None, BeforeValidator(_stop_list, json_schema_input_type=_StopForms)]
Bias = Annotated[float, Field(ge=-100, le=100)]
TokenId = Annotated[int, Field(ge=0, lt=COUNT_LIMIT)]
Count = Annotated[int, Field(ge=0, lt=COUNT_LIMIT)]


class StreamOptions(RequestBody):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = Field(None, description="usage in every chunk (vLLM)")


class GenerationFields(RequestBody):
    """Fields of both generation routes. Null means the default everywhere."""

    model: str | None = Field(None, max_length=512, description="served model; left out: the default one")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: Annotated[dict[str, Bias] | None, AfterValidator(_logit_bias)] = None
    seed: int | None = Field(None, ge=-(2**SEED_BITS), lt=2**SEED_BITS)
    stop: StopList = None

    # What load generators and vLLM's clients send beyond OpenAI.
    top_k: int | None = Field(None, ge=-1, lt=COUNT_LIMIT, description="0 and -1 turn it off")
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0, le=10)
    min_tokens: Count | None = None
    stop_token_ids: list[TokenId] | None = Field(None, max_length=64)
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None

    priority: int | None = Field(
        None, ge=-COUNT_LIMIT, lt=COUNT_LIMIT, description="lower ones are served first; left out: 0 (vLLM)"
    )
    return_token_ids: bool | None = Field(None, description="token ids of each choice (vLLM)")
    return_routing: bool | None = Field(None, description="experts of each generated token (moeyard)")

    response_format: ResponseFormat = None
    structured_outputs: StructuredOutputs = None
    guided_json: GuidedJson = None
    guided_regex: GuidedRegex = None
    guided_choice: GuidedChoice = None
    guided_grammar: GuidedGrammar = None

    # Known, not implemented: refused unless neutral.
    use_beam_search: Unset = None

    @model_validator(mode="after")
    def _stream_options_need_stream(self) -> GenerationFields:
        if self.stream_options is not None and not self.stream:
            raise problem("`stream_options` is only allowed when `stream` is true", "stream_options")
        return self

    @model_validator(mode="after")
    def _one_structure(self) -> GenerationFields:
        asked = [name for name in STRUCTURE_FIELDS if getattr(self, name) is not None]
        if len(asked) > 1:
            raise problem(f"`{asked[0]}` and `{asked[1]}` both ask for a structure; send one of them", asked[1])
        return self

    @property
    def structure_field(self) -> str | None:
        """Name of the field that says what the answer must match."""
        return next((name for name in STRUCTURE_FIELDS if getattr(self, name) is not None), None)

    @property
    def structure(self) -> Structure | None:
        """What the answer must match, whichever field says so."""
        return getattr(self, self.structure_field) if self.structure_field else None

    @property
    def names(self) -> dict[str, str]:
        """This body's names of fields that engines call otherwise in their errors."""
        return {"response_format": self.structure_field or "response_format"}

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def continuous_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage) and bool(
            self.stream_options and self.stream_options.continuous_usage_stats
        )

    def sampling_options(
        self,
        model: ModelInfo,
        *,
        max_tokens: int | None,
        logprobs: int | None,
        prompt_logprobs: int | None = None,
        extra_stop: tuple[str, ...] = (),
        structure: Structure | None = None,
    ) -> SamplingOptions:
        """The engine's options; what the request leaves out comes from the model's generation defaults."""
        defaults = model.defaults

        def pick(value: float | None, default: float) -> float:
            return default if value is None else value

        top_p = pick(self.top_p, defaults.top_p)
        top_k = self.top_k if self.top_k is not None else defaults.top_k
        if top_p == 0:  # an empty nucleus still holds its likeliest token
            top_p, top_k = 1.0, 1
        return SamplingOptions(
            max_tokens=max_tokens,
            min_tokens=self.min_tokens or 0,
            temperature=pick(self.temperature, defaults.temperature),
            top_p=top_p,
            top_k=top_k if top_k is not None and top_k > 0 else None,
            min_p=pick(self.min_p, defaults.min_p),
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            repetition_penalty=pick(self.repetition_penalty, defaults.repetition_penalty),
            logit_bias=tuple((int(key), bias) for key, bias in (self.logit_bias or {}).items()),
            seed=self.seed,
            n=self.n or 1,
            stop=tuple(self.stop or ()) + extra_stop,
            stop_token_ids=tuple(self.stop_token_ids or ()),
            ignore_eos=bool(self.ignore_eos),
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            skip_special_tokens=self.skip_special_tokens is not False,
            structure=structure or self.structure,
        )

    def engine_request(
        self,
        request_id: str,
        model: ModelInfo,
        prompts: tuple[Prompt, ...],
        sampling: SamplingOptions,
        *,
        return_prompt: bool = False,
    ) -> EngineRequest:
        """The request as the engine gets it."""
        return EngineRequest(
            request_id=request_id,
            model=model.model_id,
            prompts=prompts,
            sampling=sampling,
            return_prompt=return_prompt,
            return_routing=bool(self.return_routing),
            priority=self.priority or 0,
        )
