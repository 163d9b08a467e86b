"""Text that must match a JSON schema, a regular expression, a choice or a grammar: which tokens may come next.

The grammars themselves are `llguidance <https://github.com/guidance-ai/llguidance>`_'s (MIT): it follows the bytes of a
text through a parser and says for every token of the vocabulary whether it can go on from there.

Shape suffixes: V vocabulary.
"""

from __future__ import annotations

import importlib.util
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moe.tokenizer import Tokenizer
from serve.client import InvalidRequestError, Structure

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer


class Matcher:
    """Follows one sequence's text."""

    def __init__(self, matcher: LLMatcher, vocab_size: int) -> None:
        self._matcher, self._vocab_size = matcher, vocab_size

    def copy(self) -> Matcher:
        """Another one in the same state."""
        return Matcher(self._matcher.deep_copy(), self._vocab_size)

    @property
    def complete(self) -> bool:
        """Nothing more may follow, so the text must end now."""
        return bool(self._matcher.is_stopped())

    def masked(self, logits_V: Tensor) -> Tensor:
        """(V,) logits with -inf for every token that cannot come next."""
        allowed = torch.frombuffer(bytearray(self._matcher.compute_logit_bias()), dtype=torch.uint8)
        hidden_V = torch.ones(self._vocab_size, dtype=torch.bool)
        hidden_V[: allowed.numel()] = allowed[: self._vocab_size] == 0
        return logits_V.masked_fill(hidden_V, -torch.inf)

    def push(self, token: int) -> bool:
        """Take a chosen token; False when it does not match, which no masked row allows."""
        return bool(self._matcher.consume_token(token))


class StructureCompiler:
    """Makes matchers for one tokenizer; the work per vocabulary is done once, at the first use.

    Args:
        end_ids: tokens that may end a complete text.
        vocab_size: V, which may be more than the tokenizer has.
    """

    def __init__(self, tokenizer: Tokenizer, end_ids: frozenset[int], vocab_size: int) -> None:
        self._source, self._end_ids, self._vocab_size = tokenizer, end_ids, vocab_size

    def matcher(self, structure: Structure) -> Matcher:
        """A fresh matcher.

        Raises:
            InvalidRequestError: the schema, expression or grammar is not valid or too complex; llguidance is missing.
        """
        if importlib.util.find_spec("llguidance") is None:
            raise InvalidRequestError(
                "structured output needs llguidance on the server: pip install 'moeyard[serve]'", "response_format"
            )
        from llguidance import LLMatcher

        try:
            grammar = _grammar(structure)
        except (ValueError, TypeError) as error:
            raise InvalidRequestError(f"not a valid {structure.kind}: {error}", "response_format") from error
        matcher = LLMatcher(self._tokenizer, grammar, log_level=0)
        if matcher.is_error():
            reason = matcher.get_error().strip().splitlines()[0][:500]
            raise InvalidRequestError(f"not a usable {structure.kind}: {reason}", "response_format")
        return Matcher(matcher, self._vocab_size)

    @cached_property
    def _tokenizer(self) -> LLTokenizer:
        from llguidance import LLTokenizer, TokenizerWrapper

        return LLTokenizer(TokenizerWrapper(_Words(self._source)), eos_token=sorted(self._end_ids))


class _Words:
    """A tokenizer in the shape that llguidance asks for."""

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id = tokenizer.eos_id
        self.special_token_ids = sorted(tokenizer.special_ids)
        special = tokenizer.special_ids
        # A special token is no text: by its bytes alone, a grammar could take it for the letters of its name.
        self.tokens = [
            b"\xff" + tokenizer.token_bytes(token) if token in special else tokenizer.token_bytes(token)
            for token in range(tokenizer.vocab_size)
        ]

    def __call__(self, text: bytes | str) -> list[int]:
        return self._tokenizer.encode(text.decode("utf-8", "replace") if isinstance(text, bytes) else text)


def _grammar(structure: Structure) -> str:
    """llguidance's own form of a structure.

    Raises:
        ValueError: it is not even the right syntax.
    """
    from llguidance import LLMatcher, grammar_from

    if structure.kind in ("regex", "choice", "grammar"):
        return grammar_from(structure.kind, structure.source)
    schema = structure.source if structure.kind == "json_schema" else '{"type": "object"}'
    # No blanks but those that json.dumps writes: a model that may write blanks anywhere can do so for ever.
    return LLMatcher.grammar_from_json_schema(
        schema, defaults={"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
    )
