"""From a request's text and options to token ids that the model can take, or the error that says why not.

Runs in the event loop: what takes longer than a millisecond is moved to a thread.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence

from moe.errors import TokenizerError
from moe.tokenizer import Tokenizer
from serve.client import ContextLengthError, InvalidRequestError, Prompt, SamplingOptions
from serve.engine.structured import Matcher, StructureCompiler

# Tokenising this many characters takes about a millisecond; more of them would hold up every stream.
INLINE_CHARS = 16_384
MAX_SEQUENCES = 1024


class RequestChecker:
    """Knows the model's limits.

    Args:
        tokenizer: of the model.
        context_length: most tokens of prompt and continuation.
        vocab_size: valid ids are below this.
        structures: makes matchers for structured output.
    """

    def __init__(
        self, tokenizer: Tokenizer, context_length: int, vocab_size: int, structures: StructureCompiler
    ) -> None:
        self._tokenizer, self._limit, self._vocab_size = tokenizer, context_length, vocab_size
        self._structures = structures

    async def encode(self, prompts: Sequence[Prompt]) -> tuple[tuple[int, ...], ...]:
        """Token ids of each prompt. An empty one stands for the start of a document."""
        if sum(len(prompt) for prompt in prompts if isinstance(prompt, str)) <= INLINE_CHARS:
            return self._encode(prompts)
        return await asyncio.to_thread(self._encode, prompts)

    def _encode(self, prompts: Sequence[Prompt]) -> tuple[tuple[int, ...], ...]:
        encoded = (self._tokenizer.encode(p) if isinstance(p, str) else p for p in prompts)
        return tuple(tuple(ids) or (self._tokenizer.eos_id,) for ids in encoded)

    def check(self, sampling: SamplingOptions, prompts: Sequence[tuple[int, ...]]) -> None:
        """Refuse what the model can never do.

        Raises:
            InvalidRequestError, ContextLengthError: with the field that is wrong.
        """
        if len(prompts) * sampling.n > MAX_SEQUENCES:
            raise InvalidRequestError(f"prompts times `n` must be at most {MAX_SEQUENCES}", "n")
        self.check_lengths(prompts, sampling.max_tokens)
        self._check_ids((token for token, _ in sampling.logit_bias), "logit_bias")
        self._check_ids(sampling.stop_token_ids, "stop_token_ids")
        if sampling.max_tokens is not None and sampling.min_tokens > sampling.max_tokens:
            raise InvalidRequestError(
                f"min_tokens {sampling.min_tokens} is more than max_tokens {sampling.max_tokens}", "min_tokens"
            )

    def check_lengths(self, prompts: Sequence[tuple[int, ...]], max_tokens: int | None) -> None:
        """Prompts and what is to follow must fit into the context, and be of the vocabulary."""
        limit = self._limit
        for ids in prompts:
            if len(ids) + (max_tokens or 0) > limit:
                raise ContextLengthError(limit, len(ids), max_tokens if len(ids) <= limit else None)
            if max_tokens is None and len(ids) >= limit:
                raise ContextLengthError(limit, len(ids), None)
            self._check_ids(ids, "prompt")

    def _check_ids(self, ids: Iterable[int], field: str) -> None:
        unknown = next((token for token in ids if not 0 <= token < self._vocab_size), None)
        if unknown is not None:
            raise InvalidRequestError(f"token id {unknown} is not in the vocabulary of {self._vocab_size}", field)

    async def matchers(self, sampling: SamplingOptions, num_prompts: int) -> tuple[Matcher, ...]:
        """One matcher for each sequence if the text must match something, else none."""
        structure = sampling.structure
        if structure is None:
            return ()
        first = await asyncio.to_thread(self._structures.matcher, structure)
        return (first, *(first.copy() for _ in range(num_prompts * sampling.n - 1)))

    async def tokenize(self, text: str, *, special: bool) -> tuple[int, ...]:
        """Ids of a text."""
        try:
            if len(text) <= INLINE_CHARS:
                return tuple(self._tokenizer.encode(text, special=special))
            return tuple(await asyncio.to_thread(self._tokenizer.encode, text, special=special))
        except TokenizerError as error:
            raise InvalidRequestError(str(error), "prompt") from error

    def detokenize(self, token_ids: Sequence[int]) -> str:
        """Text of ids, special tokens included."""
        self._check_ids(token_ids, "tokens")
        known = [token for token in token_ids if token < self._tokenizer.vocab_size]
        return self._tokenizer.decode(known, skip_special=False)
