"""Text to token ids and back: one class for bytes, trained BPE and any ``tokenizer.json``.

Every tokenizer is a ``tokenizers.Tokenizer`` and so one ``tokenizer.json``, which transformers and other servers read
too. Ours are byte-level (GPT-2, Radford et al. 2019, section 2.2): any text goes in and comes out unchanged.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from moe.errors import TokenizerError
from moe.tokenizer_files import CONFIG_FILE, TOKENIZER_FILE, read_tokenizer

END_OF_TEXT = "<|endoftext|>"
IM_START = "<|im_start|>"
IM_END = "<|im_end|>"
SPECIAL_TOKENS = (END_OF_TEXT, IM_START, IM_END)
MIN_VOCAB_SIZE = len(SPECIAL_TOKENS) + 256

# Tried in this order when no tokenizer_config.json names one. [SEP] is left out: the tokenizers that have it drop case
# and spaces, so bits per byte of the text would mean nothing.
END_OF_TEXT_NAMES = (
    END_OF_TEXT,
    "</s>",
    "<|end_of_text|>",
    "<eos>",
    "<|eos|>",
    "<｜end▁of▁sentence｜>",
    "<|im_end|>",
    "<|eot_id|>",
)

_Bytes = bytes  # inside the class, bytes is a constructor's name


class Tokenizer:
    """A tokenizer with an end-of-text token.

    Attributes:
        vocab_size: one more than the largest token id; the rows that an embedding needs.
        eos_id: the end-of-text token, which separates documents and ends generation.
        special_ids: tokens that stand for no text: end of text and every token flagged special.
        fingerprint: sha256 (hex) of the canonical ``tokenizer.json``; equal ids for equal text, on any machine.
    """

    def __init__(
        self, backend: tokenizers.Tokenizer, config: Mapping[str, Any] | None = None, origin: str = "the tokenizer"
    ) -> None:
        """Wrap ``backend``, which is changed: whatever shortens, pads or randomises its output is turned off.

        Args:
            config: values of a ``tokenizer_config.json``; its ``eos_token`` and ``chat_template`` count.
            origin: file name for messages.

        Raises:
            TokenizerError: it has no end-of-text token.
        """
        backend.no_truncation()
        backend.no_padding()
        if getattr(backend.model, "dropout", None):
            backend.model.dropout = None  # BPE dropout: the same text would give other ids each time
        backend.encode_special_tokens = False
        self._backend = backend
        self._config = dict(config or {})
        self._vocab: dict[str, int] = backend.get_vocab(with_added_tokens=True)
        if not self._vocab:
            raise TokenizerError(f"{origin} has an empty vocabulary")
        self.vocab_size = max(self._vocab.values()) + 1
        self.eos_id = self._vocab[_end_of_text(self._vocab, self._config, origin)]
        added = backend.get_added_tokens_decoder()
        self.special_ids = frozenset({self.eos_id} | {index for index, token in added.items() if token.special})
        self._json = backend.to_str()
        values = json.loads(self._json)
        self._decoder = values.get("decoder")
        self.fingerprint = hashlib.sha256(_canonical(values).encode()).hexdigest()

    # --- ways to get one --------------------------------------------------------------------------------------------

    @classmethod
    def bytes(cls) -> Tokenizer:
        """One token for each of the 256 bytes, after the special tokens: byte ``b`` is token ``b + 3``."""
        vocab = {token: index for index, token in enumerate(SPECIAL_TOKENS)}
        vocab |= {char: len(SPECIAL_TOKENS) + byte for byte, char in enumerate(_byte_chars())}
        return cls(_byte_level(models.BPE(vocab=vocab, merges=[])))

    @classmethod
    def train_bpe(cls, texts: Iterable[str], vocab_size: int) -> Tokenizer:
        """Byte-level BPE with GPT-2's pre-tokenisation; the same texts give the same tokenizer on any machine.

        Args:
            texts: read once.
            vocab_size: tokens to end with, special ones and the 256 bytes included; a small corpus gives fewer,
                because a pair that occurs once is never merged.

        Raises:
            TokenizerError: ``vocab_size`` leaves no room for the bytes.
        """
        if vocab_size < MIN_VOCAB_SIZE:
            raise TokenizerError(
                f"vocab_size: {vocab_size} is too small: 256 bytes and {len(SPECIAL_TOKENS)} special tokens"
                f" need {MIN_VOCAB_SIZE}"
            )
        backend = _byte_level(models.BPE())
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=2,
            show_progress=False,
            special_tokens=list(SPECIAL_TOKENS),
            initial_alphabet=sorted(_byte_chars()),
        )
        backend.train_from_iterator(texts, trainer=trainer)
        return cls(backend)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Tokenizer:
        """Read a ``tokenizer.json``, or a directory that has one, with the ``tokenizer_config.json`` beside it.

        Raises:
            TokenizerError: missing, unreadable, truncated, not a tokenizer, or without an end-of-text token.
        """
        file, text, config = read_tokenizer(Path(path))
        try:
            backend = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the Rust side raises bare Exception
            raise TokenizerError(f"{file} is not a usable tokenizer: {error}") from error
        return cls(backend, config, origin=str(file))

    # --- text and ids -----------------------------------------------------------------------------------------------

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids of ``text``; nothing is put in front or behind.

        Args:
            special: a special token spelled out in the text becomes that token, as chat prompts need. False takes
                it as ordinary characters, as a corpus needs: a document must not be able to end itself.

        Raises:
            TokenizerError: the text holds a lone surrogate, which no UTF-8 can express.
        """
        return self.encode_batch([text], special=special)[0]

    def encode_batch(self, texts: Sequence[str], *, special: bool = True) -> list[list[int]]:
        """:meth:`encode` of many texts at once, on several threads."""
        backend = self._backend if special else self._plain_backend
        try:
            encodings = backend.encode_batch_fast(list(texts), add_special_tokens=False)
        except (TypeError, UnicodeEncodeError):
            for text in texts:
                _check_unicode(text)
            raise
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """The text of ``ids``; bytes that are not UTF-8 become U+FFFD, ids without a token become nothing."""
        if skip_special:
            ids = [index for index in ids if index not in self.special_ids]
        return self._backend.decode(list(ids), skip_special_tokens=False)

    def token_bytes(self, index: int) -> _Bytes:
        """The bytes that token ``index`` stands for; a special token's own name; nothing for an id without a token."""
        return self._bytes_by_id[index] if 0 <= index < self.vocab_size else b""

    @cached_property
    def text_lengths(self) -> np.ndarray:
        """UTF-8 bytes of document text behind each token, shape (vocab_size,), int64; special tokens have none."""
        lengths = np.fromiter(map(len, self._bytes_by_id), np.int64, self.vocab_size)
        lengths[sorted(self.special_ids)] = 0
        return lengths

    @property
    def is_byte_level(self) -> bool:
        """Whether tokens are strings of bytes, so that text of any kind survives a round trip."""
        return _has_byte_level(self._decoder)

    @property
    def chat_template(self) -> str | None:
        """Jinja source that turns messages into a prompt, None when the tokenizer has none.

        A tokenizer trained here has none: a model that never saw chat markup answers better without it.
        """
        template = self._config.get("chat_template")
        if isinstance(template, list):  # several by name: [{"name": "default", "template": "..."}]
            template = {entry["name"]: entry["template"] for entry in template}.get("default")
        return template

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write ``tokenizer.json`` and ``tokenizer_config.json``, readable by transformers, into ``directory``.

        Raises:
            TokenizerError: the directory cannot be written.
        """
        directory = Path(directory)
        names = {index: token for token, index in self._vocab.items()}
        config: dict[str, Any] = {
            # The class that takes tokenizer.json as it stands, whatever class a foreign config had named.
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            "eos_token": names[self.eos_id],
        }
        for key in ("bos_token", "unk_token", "pad_token", "model_max_length"):
            if self._config.get(key) is not None:
                config[key] = self._config[key]
        config.setdefault("pad_token", names[self.eos_id])
        if self.chat_template is not None:
            config["chat_template"] = self.chat_template
        try:
            directory.mkdir(parents=True, exist_ok=True)
            (directory / TOKENIZER_FILE).write_text(self._json, encoding="utf-8")
            text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
            (directory / CONFIG_FILE).write_text(text, encoding="utf-8")
        except OSError as error:
            raise TokenizerError(f"cannot write the tokenizer to {directory}: {error.strerror or error}") from error

    # --- inside -----------------------------------------------------------------------------------------------------

    @cached_property
    def _plain_backend(self) -> tokenizers.Tokenizer:
        """A second copy that never sees special tokens in text; a switch on the first would not be thread-safe."""
        backend = tokenizers.Tokenizer.from_str(self._json)
        backend.encode_special_tokens = True
        return backend

    @cached_property
    def _bytes_by_id(self) -> list[_Bytes]:
        added = {token.content for token in self._backend.get_added_tokens_decoder().values()}
        table = [b""] * self.vocab_size
        for token, index in self._vocab.items():
            table[index] = _token_bytes(token, self._decoder, added)
        return table


class StreamDecoder:
    """Text from tokens as they come, never half a character: what it gave so far is always a prefix of the whole.

    ``"".join(push(id) for id in ids) + flush()`` equals ``tokenizer.decode(ids, skip_special)``.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special else frozenset()
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace") if tokenizer.is_byte_level else None
        self._ids: list[int] = []
        self._read = 0

    def push(self, index: int) -> str:
        """The text that is certain now; empty while a character is incomplete."""
        if index in self._skipped:
            return ""
        if self._utf8 is not None:
            return self._utf8.decode(self._tokenizer.token_bytes(index))
        # Other decoders look at a token's neighbours (a word's leading space): decode the new token behind the last
        # ones that gave text, and give what it adds.
        self._ids.append(index)
        new = self._pending()
        if not new or new.endswith("\ufffd"):
            return ""
        self._ids = self._ids[self._read :]
        self._read = len(self._ids)
        return new

    def flush(self) -> str:
        """The rest, incomplete characters as U+FFFD; the decoder is as new afterwards."""
        if self._utf8 is not None:
            rest = self._utf8.decode(b"", final=True)
            self._utf8.reset()
            return rest
        rest = self._pending()
        self._ids, self._read = [], 0
        return rest

    def _pending(self) -> str:
        before = self._tokenizer.decode(self._ids[: self._read], skip_special=False)
        return self._tokenizer.decode(self._ids, skip_special=False)[len(before) :]


def _byte_level(model: models.BPE) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(SPECIAL_TOKENS))
    return backend


@lru_cache(maxsize=1)
def _byte_chars() -> tuple[str, ...]:
    """The printable character that stands for each byte in a byte-level vocabulary (GPT-2, ``bytes_to_unicode``)."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    spare = iter(range(256, 512))
    return tuple(chr(byte if byte in printable else next(spare)) for byte in range(256))


@lru_cache(maxsize=1)
def _byte_of_char() -> dict[str, int]:
    return {char: byte for byte, char in enumerate(_byte_chars())}


def _token_bytes(token: str, decoder: Any, added: set[str]) -> bytes:
    """What a vocabulary entry stands for, under the decoder that ``tokenizer.json`` describes."""
    if _has_byte_level(decoder):
        byte_of = _byte_of_char()
        # An added token may hold characters outside the map (a plain space); the decoder then takes it as it is.
        return bytes(byte_of[c] for c in token) if all(c in byte_of for c in token) else token.encode()
    if token in added:
        return token.encode()
    kinds = _decoder_kinds(decoder)
    if "ByteFallback" in kinds and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes([int(token[3:5], 16)])
    if "WordPiece" in kinds:
        prefix = kinds["WordPiece"].get("prefix", "##")
        return (token.removeprefix(prefix) if token.startswith(prefix) else " " + token).encode()
    if "Metaspace" in kinds:
        return token.replace(kinds["Metaspace"].get("replacement", "▁"), " ").encode()
    return token.replace("▁", " ").encode() if "Replace" in kinds else token.encode()


def _decoder_kinds(decoder: Any) -> dict[str, dict[str, Any]]:
    """The decoders in a ``tokenizer.json`` by type, a sequence's parts included."""
    if not isinstance(decoder, dict):
        return {}
    found = {str(decoder.get("type")): decoder}
    for part in decoder.get("decoders", []):
        found |= _decoder_kinds(part)
    return found


def _has_byte_level(decoder: Any) -> bool:
    return "ByteLevel" in _decoder_kinds(decoder)


def _canonical(values: Any) -> str:
    """JSON that does not depend on key order, nor on options that a newer library writes out as null."""

    def without_null(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: without_null(inner) for key, inner in value.items() if inner is not None}
        return [without_null(inner) for inner in value] if isinstance(value, list) else value

    return json.dumps(without_null(values), sort_keys=True, ensure_ascii=False, separators=(",", ":"))


def _end_of_text(vocab: Mapping[str, int], config: Mapping[str, Any], origin: str) -> str:
    named = config.get("eos_token")
    if isinstance(named, dict):
        named = named.get("content")
    if named is not None:
        if named not in vocab:
            raise TokenizerError(f"{origin}: eos_token {named!r} of {CONFIG_FILE} is not in the vocabulary")
        return str(named)
    for name in END_OF_TEXT_NAMES:
        if name in vocab:
            return name
    raise TokenizerError(
        f"{origin} has no end-of-text token: tried {', '.join(END_OF_TEXT_NAMES)};"
        f' name its own as {{"eos_token": ...}} in a {CONFIG_FILE} beside it'
    )


def _check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise TokenizerError(
            f"character {error.start} of the text is a lone surrogate ({text[error.start]!r}); it is not valid Unicode"
        ) from error
