"""Request fields that completions and chat share, their limits, and what they mean to the engine.

Unknown fields are accepted and ignored: clients add fields every year. A known field that this server does not
implement is refused unless its value asks for nothing, because ignoring it would change the answer silently.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from serve.client import SamplingDefaults, SamplingOptions

MAX_CHOICES = 128
MAX_PROMPTS = 1024
MAX_STOP_STRINGS = 4
MAX_LOGPROBS = 20
SEED_BITS = 63


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
    return stops


def _logit_bias(value: dict[str, float] | None) -> dict[str, float] | None:
    for key in value or {}:
        if not key.isascii() or not key.isdigit() or len(key) > 9:
            raise problem(f"keys are token ids in decimal, got {key[:40]!r}")
    return value


Unsupported = Annotated[Any, AfterValidator(only())]
Unlisted = Annotated[Any, AfterValidator(only([]))]
Unset = Annotated[Any, AfterValidator(only(False))]
StopList = Annotated[list[str] | None, BeforeValidator(_stop_list)]
Bias = Annotated[float, Field(ge=-100, le=100)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]


class RequestBody(BaseModel):
    """Base of all request bodies: strict types, so that ``"5"`` is no number and ``1`` no boolean."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False, frozen=True, protected_namespaces=())


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
    top_k: int | None = Field(None, ge=-1, description="0 and -1 turn it off")
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0, le=10)
    min_tokens: int | None = Field(None, ge=0)
    stop_token_ids: list[TokenId] | None = Field(None, max_length=64)
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None

    # Known, not implemented: refused unless neutral.
    use_beam_search: Unset = None
    guided_json: Unsupported = None
    guided_regex: Unsupported = None
    guided_choice: Unsupported = None
    guided_grammar: Unsupported = None
    structured_outputs: Unsupported = None

    @model_validator(mode="after")
    def _stream_options_need_stream(self) -> GenerationFields:
        if self.stream_options is not None and not self.stream:
            raise problem("`stream_options` is only allowed when `stream` is true", "stream_options")
        return self

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
        defaults: SamplingDefaults,
        *,
        max_tokens: int | None,
        logprobs: int | None,
        prompt_logprobs: int | None = None,
        extra_stop: tuple[str, ...] = (),
    ) -> SamplingOptions:
        """The engine's options; what the request leaves out comes from the model's generation defaults."""

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
        )
