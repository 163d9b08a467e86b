"""Text and conversations with a model in this process: what ``moeyard generate`` and ``moeyard chat`` do.

The prompt of a conversation is made as the HTTP server makes it, so that both give the same answers.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace

from moe.checkpoint import LoadedModel
from moe.errors import UserError
from moe.generate import SamplingParams, generate
from moe.tokenizer import IM_END, StreamDecoder, Tokenizer
from serve.engine.text import TextAssembler
from serve.protocol.chat_template import ChatTemplate
from serve.protocol.errors import ApiError


@dataclass
class Speed:
    """How much was generated and how fast.

    Attributes:
        prompt_tokens: of the last prompt.
        tokens: generated so far.
        first_token_s: seconds until the last answer's first token; rest_s: all seconds after first tokens.
        answers: how many were begun.
    """

    prompt_tokens: int = 0
    tokens: int = 0
    first_token_s: float = 0.0
    rest_s: float = 0.0
    answers: int = 0

    @property
    def tokens_per_s(self) -> float:
        """Tokens after each answer's first, per second; 0 before there are any."""
        later = self.tokens - self.answers
        return later / self.rest_s if later > 0 and self.rest_s > 0 else 0.0


def stream_text(
    loaded: LoadedModel, prompt_ids: list[int], params: SamplingParams, stop: tuple[str, ...], speed: Speed
) -> Iterator[str]:
    """The continuation of ``prompt_ids`` in whole characters, piece by piece.

    Args:
        stop: strings that end it and are not shown.
        speed: counts on.
    """
    text: TextAssembler[int] = TextAssembler(StreamDecoder(loaded.tokenizer), stop)
    eos_id = loaded.tokenizer.eos_id
    ends = params.stop_ids | ({eos_id} if not params.ignore_eos else set())
    speed.prompt_tokens = len(prompt_ids)
    begun = last = time.perf_counter()
    first = True
    for step in generate(loaded.model, prompt_ids, params, eos_id=eos_id):
        now = time.perf_counter()
        if first:
            speed.first_token_s, first = now - begun, False
            speed.answers += 1
        else:
            speed.rest_s += now - last
        last = now
        speed.tokens += 1
        if step.token in ends:
            break
        release = text.push(step.token, step.token)
        if release.text:
            yield release.text
        if release.stop is not None:
            return
    rest = text.finish()
    if rest.text:
        yield rest.text


class Conversation:
    """Messages with a model. Turns that no longer fit into the model's context are forgotten, oldest first.

    Args:
        loaded: the model.
        params: sampling rules of every answer; ``max_tokens`` is lowered where the context leaves less room.
        system: text of a system message at the beginning.

    Attributes:
        forgotten: messages that the last answer no longer saw.
    """

    def __init__(self, loaded: LoadedModel, params: SamplingParams, system: str | None = None) -> None:
        self._loaded = loaded
        self._system = [{"role": "system", "content": system}] if system else []
        self._messages: list[dict[str, str]] = []
        tokenizer = loaded.tokenizer
        source = tokenizer.chat_template
        self._template = ChatTemplate(source, _special_tokens(tokenizer)) if source else ChatTemplate.plain()
        ends = frozenset(tokenizer.encode(IM_END)) if source and IM_END in source else frozenset()
        self._params = replace(params, stop_ids=params.stop_ids | ends)
        self.forgotten = 0
        self.speed = Speed()

    @property
    def context(self) -> int:
        """Length of the model's context in tokens."""
        return self._loaded.config.max_seq_len

    @property
    def turns(self) -> int:
        """Messages so far, both sides."""
        return len(self._messages)

    def reset(self) -> None:
        """Begin anew; the system message stays."""
        self._messages.clear()
        self.speed, self.forgotten = Speed(), 0

    def answer(self, text: str) -> Generator[str, None, None]:
        """The answer to ``text``, piece by piece. What was yielded is remembered, even when the caller stops early.

        Raises:
            UserError: the message alone does not fit into the context, or the template refuses it.
        """
        self._messages.append({"role": "user", "content": text})
        try:
            prompt_ids = self._prompt()
        except UserError:
            self._messages.pop()
            raise
        pieces: list[str] = []
        seed = None if self._params.seed is None else self._params.seed + self.turns
        params = replace(self._params, seed=seed)
        try:
            for piece in stream_text(self._loaded, prompt_ids, params, self._template.stop, self.speed):
                # A template that ends with "Assistant:" makes the model begin with the space after it.
                shown = piece.lstrip() if not pieces else piece
                if shown:
                    pieces.append(shown)
                    yield shown
        finally:
            self._messages.append({"role": "assistant", "content": "".join(pieces).rstrip()})

    def _prompt(self) -> list[int]:
        """Token ids of the conversation, without the oldest turns if it is too long."""
        context = self._loaded.config.max_seq_len
        for first in range(0, len(self._messages), 2):
            messages = [*self._system, *self._messages[first:]]
            try:
                prompt = self._template.render(messages)
            except ApiError as error:
                raise UserError(str(error)) from error
            ids = self._loaded.tokenizer.encode(prompt)
            if len(ids) < context:
                self.forgotten = first
                return ids
        raise UserError(f"the message has {len(ids)} tokens; the model's context is {context}")


def _special_tokens(tokenizer: Tokenizer) -> dict[str, str]:
    return {"eos_token": tokenizer.decode([tokenizer.eos_id], skip_special=False)}
