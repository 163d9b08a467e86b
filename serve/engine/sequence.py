"""One continuation of one prompt, from the model's tokens to the chunks that its reader gets. Knows no threads."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from moe.tokenizer import StreamDecoder, Tokenizer
from serve.client import (
    FinishReason,
    PromptEcho,
    SamplingOptions,
    Timings,
    TokenChunk,
    TokenLogprobs,
    TokenScore,
    Usage,
)
from serve.engine.runner import ModelRunner, Scored
from serve.engine.text import Placed, Release, TextAssembler


@dataclass(frozen=True, slots=True)
class SequenceSpec:
    """What one sequence is.

    Attributes:
        index: its number in the request.
        prompt_ids, prompt_text: the prompt; the text is None when it was given as ids.
        seed: of its random stream.
        budget: most tokens to generate; 0 only returns the prompt.
        return_prompt: put the prompt into the first chunk.
        before: tokens of the whole request when this sequence begins.
        queue_s: how long it waited.
    """

    index: int
    prompt_ids: tuple[int, ...]
    prompt_text: str | None
    sampling: SamplingOptions
    seed: int
    budget: int
    return_prompt: bool
    before: Usage
    queue_s: float


def sequence_chunks(
    runner: ModelRunner, tokenizer: Tokenizer, spec: SequenceSpec, *, beat: Callable[[], None]
) -> Iterator[TokenChunk]:
    """Generates the sequence; the last chunk has the finish reason.

    Args:
        beat: called before the first token and after each one; what it raises ends the sequence.
    """
    sampling = spec.sampling
    started_s = first_token_s = time.monotonic()
    beat()
    prompt = prompt_echo(runner, tokenizer, spec) if spec.return_prompt else None
    decoder = StreamDecoder(tokenizer, skip_special=sampling.skip_special_tokens)
    text: TextAssembler[Scored] = TextAssembler(decoder, sampling.stop)
    finish: FinishReason | None = None if spec.budget else "length"
    stop_reason: int | str | None = None
    generated = 0

    def chunk(release: Release[Scored], timings: Timings | None = None) -> TokenChunk:
        usage = Usage(spec.before.prompt_tokens, spec.before.completion_tokens + generated)
        return TokenChunk(
            index=spec.index,
            text=release.text,
            token_ids=tuple(placed.item.token_id for placed in release.tokens),
            usage=usage,
            logprobs=() if sampling.logprobs is None else tuple(_logprobs(tokenizer, t) for t in release.tokens),
            finish_reason=None if timings is None else finish,
            stop_reason=None if timings is None else stop_reason,
            prompt=prompt,
            timings=timings,
        )

    with contextlib.closing(runner.steps(spec.prompt_ids, sampling, spec.seed, spec.budget)) as steps:
        while finish is None:
            step = next(steps)
            beat()
            generated += 1
            if generated == 1:
                first_token_s = time.monotonic()
            if step.ends:
                finish = "stop"
                stop_reason = step.token_id if step.token_id in sampling.stop_token_ids else None
                break
            release = text.push(step.token_id, step, may_stop=generated >= sampling.min_tokens)
            if release.stop is not None:
                finish, stop_reason = "stop", release.stop
            elif generated == spec.budget:
                finish = "length"
            if release.text or release.tokens:
                yield chunk(release)
                prompt = None
    # After a stop string nothing follows, not even the bytes of a character that had begun.
    rest: Release[Scored] = Release("", ()) if isinstance(stop_reason, str) else text.finish()
    if rest.stop is not None:
        finish, stop_reason = "stop", rest.stop
    ended_s = time.monotonic()
    yield chunk(rest, Timings(spec.queue_s, first_token_s - started_s, ended_s - first_token_s))


def prompt_echo(runner: ModelRunner, tokenizer: Tokenizer, spec: SequenceSpec) -> PromptEcho:
    """The prompt as it goes back to the client: given text as it was given, token ids decoded."""
    ids, top = spec.prompt_ids, spec.sampling.prompt_logprobs
    text: TextAssembler[int] = TextAssembler(StreamDecoder(tokenizer, skip_special=False))
    releases = [text.push(token, position) for position, token in enumerate(ids)] + [text.finish()]
    shown = "".join(release.text for release in releases) if spec.prompt_text is None else spec.prompt_text
    if top is None:
        return PromptEcho(shown, ids)
    start = {placed.item: placed.start for release in releases for placed in release.tokens}
    scores = runner.score(ids, top)
    logprobs = (_logprobs(tokenizer, Placed(scored, start[position])) for position, scored in enumerate(scores))
    return PromptEcho(shown, ids, tuple(logprobs))


def _logprobs(tokenizer: Tokenizer, placed: Placed[Scored]) -> TokenLogprobs:
    scored = placed.item
    top = tuple(_token_score(tokenizer, token, logprob) for token, logprob in scored.top)
    return TokenLogprobs(_token_score(tokenizer, scored.token_id, scored.logprob), top, placed.start)


def _token_score(tokenizer: Tokenizer, token_id: int, logprob: float | None) -> TokenScore:
    raw = tokenizer.token_bytes(token_id)
    return TokenScore(token_id, raw.decode("utf-8", "replace"), raw, logprob)
