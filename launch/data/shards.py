"""Tokenised corpora on disk: one folder per corpus, split and tokenizer, named by a hash of all three.

``train.bin`` and ``validation.bin`` are plain arrays of token ids, ``<eos> text <eos> text <eos> ...``, to be memory
mapped; ``meta.json`` says what they hold.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from launch.data.cache import DamagedError, checksum, load_or_make, read_json, write_json
from launch.data.progress import Advance, Reporter
from launch.data.split import SplitCorpus
from moe.tokenizer import Tokenizer

SHARD_FORMAT = 1
SIDES = ("train", "validation")
META_FILE = "meta.json"
BATCH_CHARS = 1 << 21
EDGE_BYTES = 1 << 16
KEPT_NAMES = 100


@dataclass(frozen=True, eq=False)
class Domain:
    """One side (training or validation) of one source, tokenised.

    Attributes:
        name: the domain's name, different from the other domains'.
        weight: relative share of the training mixture.
        tokens: 1-D uint16 or uint32 array, memory mapped: eos, document, eos, document, ..., eos.
        text_bytes: UTF-8 bytes of the documents.
        num_documents: how many documents.
        fingerprint: identifies the tokens by where they come from (corpus, split, tokenizer), on any machine.
        token_bytes: sum of the tokens' text lengths; None: equal to text_bytes, as with a lossless tokenizer.
        document_names: the first documents' names.
        note: what is unusual about the split, for people.
    """

    name: str
    weight: float
    tokens: np.ndarray
    text_bytes: int
    num_documents: int
    fingerprint: str = ""
    token_bytes: int | None = None
    document_names: tuple[str, ...] = ()
    note: str = ""


def load_or_tokenise(
    cache: Path, corpus: SplitCorpus, tokenizer: Tokenizer, name: str, weight: float, reporter: Reporter
) -> tuple[Domain, Domain]:
    """The training and the validation domain of ``corpus``, from the cache or made now.

    Raises:
        DataError: the source cannot be read or has changed meanwhile.
    """
    key = checksum(
        {
            "format": SHARD_FORMAT,
            "source": corpus.source.name,
            "content": corpus.scan.content_hash,
            "validation_fraction": corpus.fraction,
            "split_seed": corpus.seed,
            "tokenizer": tokenizer.fingerprint,
            "eos": tokenizer.eos_id,
        }
    )
    return load_or_make(
        cache / "tokens" / f"{corpus.source.name}-{key[:24]}",
        lambda folder: _read(folder, key, name, weight),
        lambda folder: _write(folder, corpus, key, tokenizer, reporter),
        reporter,
    )


def _read(folder: Path, key: str, name: str, weight: float) -> tuple[Domain, Domain]:
    meta = read_json(folder / META_FILE)
    if meta["key"] != key:
        raise DamagedError("it belongs to another corpus")
    train, validation = (_open_side(folder, meta, side, name, weight) for side in SIDES)
    return train, validation


def _open_side(folder: Path, meta: dict[str, Any], side: str, name: str, weight: float) -> Domain:
    file, values, dtype = folder / f"{side}.bin", meta[side], np.dtype(meta["dtype"])
    try:
        size = file.stat().st_size
    except FileNotFoundError as error:
        raise DamagedError(f"{file.name} is missing") from error
    if size != values["tokens"] * dtype.itemsize:
        raise DamagedError(f"{file.name} has {size} bytes instead of {values['tokens'] * dtype.itemsize}")
    if _edges(file) != values["edges"]:
        raise DamagedError(f"{file.name} was changed")
    return Domain(
        name=name,
        weight=weight,
        tokens=np.memmap(file, dtype=dtype, mode="r", shape=(values["tokens"],)),
        text_bytes=values["text_bytes"],
        num_documents=values["documents"],
        fingerprint=meta["key"],
        token_bytes=values["token_bytes"],
        document_names=tuple(values["names"]),
        note=meta["note"],
    )


@dataclass
class _SideWriter:
    """Appends the tokens of one side to its file and counts what it wrote."""

    file: BinaryIO
    dtype: np.dtype[Any]
    lengths: np.ndarray
    tokens: int = 0
    documents: int = 0
    text_bytes: int = 0
    token_bytes: int = 0
    names: list[str] = field(default_factory=list)

    def write(self, ids: list[int]) -> None:
        array = np.asarray(ids, dtype=np.int64)
        self.file.write(array.astype(self.dtype).data)  # not tofile, which loses the system's reason on a full disk
        self.tokens += len(ids)
        self.token_bytes += int(self.lengths[array].sum())

    def values(self) -> dict[str, Any]:
        return {
            "tokens": self.tokens,
            "documents": self.documents,
            "text_bytes": self.text_bytes,
            "token_bytes": self.token_bytes,
            "names": self.names,
            "edges": _edges(Path(self.file.name)),
        }


def _write(folder: Path, corpus: SplitCorpus, key: str, tokenizer: Tokenizer, reporter: Reporter) -> None:
    """Tokenise both sides of ``corpus`` into ``folder``."""
    dtype = np.dtype("<u2" if tokenizer.vocab_size < 1 << 16 else "<u4")
    stamp = corpus.source.stamp()
    with (folder / "train.bin").open("wb") as train, (folder / "validation.bin").open("wb") as validation:
        writers = [_SideWriter(file, dtype, tokenizer.text_lengths) for file in (train, validation)]
        for writer in writers:
            writer.write([tokenizer.eos_id])
        with reporter.task(f"{corpus.source.name}: tokenising", corpus.text_bytes) as advance:
            _tokenise(corpus, tokenizer, writers, advance)
    if sum(writer.text_bytes for writer in writers) != corpus.text_bytes or corpus.source.stamp() != stamp:
        raise corpus.changed()
    meta: dict[str, Any] = {"key": key, "dtype": dtype.str, "note": corpus.note}
    meta |= {side: writer.values() for side, writer in zip(SIDES, writers, strict=True)}
    write_json(folder / META_FILE, meta)


def _tokenise(corpus: SplitCorpus, tokenizer: Tokenizer, writers: list[_SideWriter], advance: Advance) -> None:
    """Encode piece by piece in batches, so that memory stays bounded and every core has work."""
    texts: list[str] = []
    sides: list[tuple[_SideWriter, bool]] = []

    def flush() -> None:
        # A corpus that spells out a special token means its characters: no document may end itself.
        for ids, (writer, ends) in zip(tokenizer.encode_batch(texts, special=False), sides, strict=True):
            writer.write([*ids, tokenizer.eos_id] if ends else ids)
        advance(sum(len(text.encode()) for text in texts))
        texts.clear()
        sides.clear()

    pending = 0
    for writer, piece, ends in _pieces(corpus, writers):
        texts.append(piece)
        sides.append((writer, ends))
        pending += len(piece)
        if pending >= BATCH_CHARS:
            flush()
            pending = 0
    flush()


def _pieces(corpus: SplitCorpus, writers: list[_SideWriter]) -> Iterator[tuple[_SideWriter, str, bool]]:
    """(writer, piece, is it the document's last) of the whole corpus; counts documents and bytes on the way."""
    for part in corpus.parts():
        writer = writers[part.is_validation]
        writer.documents += 1
        if len(writer.names) < KEPT_NAMES:
            writer.names.append(part.document.name)
        held: str | None = None
        for piece in part.pieces:
            if held is not None:
                yield writer, held, False
            writer.text_bytes += len(piece.encode())
            held = piece
        if held is not None:
            yield writer, held, True


def _edges(file: Path) -> str:
    """sha256 of a file's first and last 64 KiB: finds zeroed and overwritten files without reading all of them."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        digest.update(stream.read(EDGE_BYTES))
        size = file.stat().st_size
        if size > EDGE_BYTES:
            stream.seek(max(EDGE_BYTES, size - EDGE_BYTES))
            digest.update(stream.read())
    return digest.hexdigest()
