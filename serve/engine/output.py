"""One sequence's way from tokens to the chunks that its reader gets: text, log-probabilities, routing, the end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moe.tokenizer import StreamDecoder, Tokenizer
from serve.client import (
    FinishReason,
    PromptEcho,
    SamplingOptions,
    Timings,
    TokenChunk,
    TokenLogprobs,
    TokenRouting,
    TokenScore,
    Usage,
)
from serve.engine.sampler import Scored
from serve.engine.text import Placed, Release, TextAssembler


@dataclass(slots=True)
class RequestUsage:
    """Tokens of a whole request so far; all of its sequences count here."""

    prompt_tokens: int
    completion_tokens: int = 0
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Generated:
    """A chosen token and what is known of it."""

    scored: Scored
    routing: TokenRouting | None = None


class SequenceOutput:
    """Takes a sequence's tokens one by one.

    Args:
        tokenizer: of the model.
        sampling: the request's options.
        index: which sequence of the request.
        budget: most tokens to generate; 0 only returns the prompt.
        ends: tokens that end it and are not part of its text.
        usage: of the request, shared by its sequences.

    Attributes:
        usage: as given.
        finish: why it ended, once it has.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        sampling: SamplingOptions,
        index: int,
        budget: int,
        ends: frozenset[int],
        usage: RequestUsage,
    ) -> None:
        self._tokenizer, self._sampling, self._index = tokenizer, sampling, index
        self._budget, self._ends, self.usage = budget, ends, usage
        decoder = StreamDecoder(tokenizer, skip_special=sampling.skip_special_tokens)
        self._text: TextAssembler[Generated] = TextAssembler(decoder, sampling.stop)
        self._prompt: PromptEcho | None = None
        self._generated = 0
        self._stop_reason: int | str | None = None
        self.finish: FinishReason | None = None

    def return_prompt(self, prompt: PromptEcho) -> None:
        """The prompt goes out with the first chunk."""
        self._prompt = prompt

    def push(self, token: Generated, *, complete: bool = False) -> TokenChunk | None:
        """What can be shown after one token more; None when nothing can.

        Args:
            complete: the text must not go on after this token (its structure is complete).
        """
        self._generated += 1
        self.usage.completion_tokens += 1
        token_id = token.scored.token_id
        if token_id in self._ends:
            self.finish = "stop"
            self._stop_reason = token_id if token_id in self._sampling.stop_token_ids else None
            return None
        release = self._text.push(token_id, token, may_stop=self._generated >= self._sampling.min_tokens)
        if release.stop is not None:
            self.finish, self._stop_reason = "stop", release.stop
        elif complete:
            self.finish = "stop"
        elif self._generated == self._budget:
            self.finish = "length"
        return self._chunk(release) if release.text or release.tokens else None

    def last_chunk(self, timings: Timings) -> TokenChunk:
        """What was still held back, and the reason of the end."""
        self.finish = self.finish or "length"  # nothing was to be generated
        # After a stop string nothing follows, not even the bytes of a character that had begun.
        rest: Release[Generated] = Release("", ()) if isinstance(self._stop_reason, str) else self._text.finish()
        if rest.stop is not None:
            self.finish, self._stop_reason = "stop", rest.stop
        return self._chunk(rest, timings)

    def _chunk(self, release: Release[Generated], timings: Timings | None = None) -> TokenChunk:
        usage, prompt = self.usage, self._prompt
        self._prompt = None
        return TokenChunk(
            index=self._index,
            text=release.text,
            token_ids=tuple(placed.item.scored.token_id for placed in release.tokens),
            usage=Usage(usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens),
            logprobs=()
            if self._sampling.logprobs is None
            else tuple(_logprobs(self._tokenizer, Placed(t.item.scored, t.start)) for t in release.tokens),
            finish_reason=None if timings is None else self.finish,
            stop_reason=None if timings is None else self._stop_reason,
            prompt=prompt,
            timings=timings,
            routing=tuple(placed.item.routing for placed in release.tokens if placed.item.routing is not None),
        )


def prompt_echo(tokenizer: Tokenizer, ids: tuple[int, ...], given: str | None, scores: Sequence[Scored]) -> PromptEcho:
    """The prompt as it goes back to the client: given text as it was given, token ids decoded.

    Args:
        scores: one per token, or none.
    """
    text: TextAssembler[int] = TextAssembler(StreamDecoder(tokenizer, skip_special=False))
    releases = [text.push(token, position) for position, token in enumerate(ids)] + [text.finish()]
    shown = "".join(release.text for release in releases) if given is None else given
    start = {placed.item: placed.start for release in releases for placed in release.tokens}
    logprobs = (_logprobs(tokenizer, Placed(scored, start[position])) for position, scored in enumerate(scores))
    return PromptEcho(shown, ids, tuple(logprobs))


def _logprobs(tokenizer: Tokenizer, placed: Placed[Scored]) -> TokenLogprobs:
    scored = placed.item
    top = tuple(_token_score(tokenizer, token, logprob) for token, logprob in scored.top)
    return TokenLogprobs(_token_score(tokenizer, scored.token_id, scored.logprob), top, placed.start)


def _token_score(tokenizer: Tokenizer, token_id: int, logprob: float | None) -> TokenScore:
    raw = tokenizer.token_bytes(token_id)
    return TokenScore(token_id, raw.decode("utf-8", "replace"), raw, logprob)
