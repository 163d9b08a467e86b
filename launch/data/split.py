"""Which documents are held out for validation: a pure function of the documents and a seed.

A corpus is scanned once for what identifies it. The scan's result is remembered beside the shards under the files'
sizes and times, so a later run neither reads nor hashes an unchanged corpus again.
"""

from __future__ import annotations

import hashlib
import os
import zipfile
from array import array
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path

import numpy as np

from launch.data.cache import writable
from launch.data.documents import Document
from launch.data.permutation import derive_key, mix64, mix64_array
from launch.data.progress import Reporter
from launch.data.sources import Source
from moe.errors import DataError

SCAN_FORMAT = 1


@dataclass(frozen=True)
class Scan:
    """What identifies a corpus.

    Attributes:
        content_hash: sha256 (hex) over all documents' identities in order.
        identities: (documents,) uint64, the first 8 bytes of sha256(source name, text) of each document.
        sizes_bytes: (documents,) int64, UTF-8 bytes of each document's text.
    """

    content_hash: str
    identities: np.ndarray
    sizes_bytes: np.ndarray


@dataclass(frozen=True)
class Part:
    """A document, or one side of one that is divided; its training side must be read to the end before the other."""

    document: Document
    identity: int
    is_validation: bool
    pieces: Iterator[str]


def scan_source(source: Source, cache: Path, reporter: Reporter) -> Scan:
    """Read all of ``source`` once, or recall what an earlier scan of the same files found.

    Raises:
        DataError: unreadable, not UTF-8, or no text at all.
    """
    stamp = source.stamp()
    key = hashlib.sha256(f"{SCAN_FORMAT}\x1f{source.name}\x1f{source.spec}\x1f{stamp}".encode()).hexdigest()
    memo = cache / "scans" / f"{key[:32]}.npz"
    if stamp is not None:
        with suppress(OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile), np.load(memo) as stored:
            return Scan(str(stored["content_hash"]), stored["identities"], stored["sizes_bytes"])
    reporter.line(f"{source.name}: reading {source.spec}")
    scan = _scan(source)
    if stamp is not None:
        with writable(memo.parent):
            memo.parent.mkdir(parents=True, exist_ok=True)
            temporary = memo.with_name(f".{memo.stem}.{os.getpid()}.npz")
            np.savez(
                temporary,
                content_hash=np.array(scan.content_hash),
                identities=scan.identities,
                sizes_bytes=scan.sizes_bytes,
            )
            temporary.replace(memo)
    return scan


def held_out(identities: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Which documents are for validation: (documents,) bool.

    Documents are put in the order of a hash of (seed, identity), and the first ``round(fraction * n)`` are taken, at
    least one and not all. Equal documents fall on the same side, so none is both trained on and held out; they count
    as one. All are False when there are fewer than two different documents: then :func:`cut_position` divides text.
    """
    keys = mix64_array(identities ^ np.uint64(derive_key("split", seed)))
    distinct = np.unique(keys)
    if len(distinct) < 2:
        return np.zeros(len(keys), dtype=bool)
    count = min(max(int(fraction * len(distinct) + 0.5), 1), len(distinct) - 1)
    held: np.ndarray = keys <= distinct[count - 1]
    return held


def cut_position(text_bytes: int, newlines: Iterator[int], fraction: float) -> int | None:
    """Where to divide one text so that about the last ``fraction`` of its bytes is for validation.

    Args:
        newlines: byte offset behind each newline, ascending.

    Returns:
        The first line's begin at or behind the wanted place, the last one before it when nothing follows, or None
        when the text is one line.
    """
    wanted = round((1 - fraction) * text_bytes)
    before = None
    for offset in newlines:
        if offset >= text_bytes:
            break
        if offset >= wanted:
            return offset
        before = offset
    return before


class SplitCorpus:
    """A source with its fixed split.

    Attributes:
        cut_bytes: byte offset that divides the text when the source has but one (different) document, else None.
    """

    def __init__(self, source: Source, scan: Scan, fraction: float, seed: int) -> None:
        self.source = source
        self.scan = scan
        self.fraction = fraction
        self.seed = seed
        self.held_out = held_out(scan.identities, fraction, seed)

    @cached_property
    def cut_bytes(self) -> int | None:
        if self.held_out.any():
            return None
        size = int(self.scan.sizes_bytes[0])
        document = next(_non_empty(self.source))
        cut = cut_position(size, _newlines(document), self.fraction)
        if cut is None:  # one line: at the character boundary nearest the wanted place
            cut = _character_boundary(next(_non_empty(self.source)), round((1 - self.fraction) * size))
        if not 0 < cut < size:
            raise DataError(f"source {self.source.spec!r} has {size} bytes of text: too little to hold any out")
        return cut

    @property
    def note(self) -> str:
        """What is unusual about the split, for people; empty when nothing is."""
        if self.cut_bytes is None:
            return ""
        share = 1 - self.cut_bytes / int(self.scan.sizes_bytes[0])
        return f"{self.source.name} is one document: its last {share:.1%} is held out for validation"

    @property
    def text_bytes(self) -> int:
        """UTF-8 bytes of all documents."""
        return int(self.scan.sizes_bytes.sum())

    @property
    def train_bytes(self) -> int:
        """UTF-8 bytes of the training side."""
        if self.cut_bytes is not None:
            return self.cut_bytes * len(self.scan.sizes_bytes)
        return int(self.scan.sizes_bytes[~self.held_out].sum())

    def parts(self) -> Iterator[Part]:
        """Every document in order with its side; a divided document gives two parts.

        Raises:
            DataError: there are more or fewer documents than were scanned.
        """
        cut = self.cut_bytes
        count = 0
        for document in _non_empty(self.source):
            if count == len(self.held_out):
                raise self.changed()
            identity, held = int(self.scan.identities[count]), bool(self.held_out[count])
            pieces = iter(document.pieces)
            if cut is None:
                yield Part(document, identity, held, pieces)
            else:
                front, rest = _divide(pieces, cut)
                yield Part(document, identity, False, front)
                yield Part(document, identity, True, rest)
            count += 1
        if count != len(self.held_out):
            raise self.changed()

    def changed(self) -> DataError:
        """The error for files that were written to while they were read."""
        return DataError(f"source {self.source.spec!r} changed while it was being prepared; run again")

    def sample(self, keep: float) -> Iterator[str]:
        """Training text for a tokenizer: each piece with probability ``keep``, decided by what it is."""
        limit = keep * 2.0**64
        for part in self.parts():
            if part.is_validation:
                continue
            for number, piece in enumerate(part.pieces):
                if keep >= 1 or mix64(part.identity ^ mix64(number)) < limit:
                    yield piece


def _scan(source: Source) -> Scan:
    content = hashlib.sha256()
    identities, sizes = array("Q"), array("q")
    for document in _non_empty(source):
        digest = hashlib.sha256(source.name.encode() + b"\0")
        size = 0
        for piece in document.pieces:
            try:
                raw = piece.encode()
            except UnicodeEncodeError as error:
                raise DataError(
                    f"source {source.spec!r}: {document.name} holds a lone surrogate"
                    f" ({piece[error.start]!r}), which is not valid Unicode"
                ) from error
            digest.update(raw)
            size += len(raw)
        content.update(digest.digest())
        identities.append(int.from_bytes(digest.digest()[:8], "big"))
        sizes.append(size)
    if not sizes:
        raise DataError(f"source {source.spec!r} is empty: it has no text at all")
    return Scan(content.hexdigest(), np.array(identities, dtype=np.uint64), np.array(sizes, dtype=np.int64))


def _non_empty(source: Source) -> Iterator[Document]:
    """The documents that have any text."""
    for document in source.documents():
        pieces = iter(document.pieces)
        first = next(pieces, None)
        if first is not None:
            yield Document(document.name, chain([first], pieces))


def _newlines(document: Document) -> Iterator[int]:
    begin = 0
    for piece in document.pieces:
        raw = piece.encode()
        at = raw.find(b"\n")
        while at >= 0:
            yield begin + at + 1
            at = raw.find(b"\n", at + 1)
        begin += len(raw)


def _character_boundary(document: Document, wanted: int) -> int:
    """The byte offset of the first character that begins at or behind ``wanted``."""
    begin = 0
    for piece in document.pieces:
        raw = piece.encode()
        if begin + len(raw) > wanted:
            at = wanted - begin
            while at < len(raw) and raw[at] & 0xC0 == 0x80:
                at += 1
            if at < len(raw):
                return begin + at
        begin += len(raw)
    return begin


def _divide(pieces: Iterator[str], cut: int) -> tuple[Iterator[str], Iterator[str]]:
    """The text before and from byte ``cut``, a character boundary; the first must be read to its end first."""
    rest: list[str] = []

    def front() -> Iterator[str]:
        done = 0
        for piece in pieces:
            raw = piece.encode()
            if done + len(raw) >= cut:
                yield raw[: cut - done].decode()
                if done + len(raw) > cut:
                    rest.append(raw[cut - done :].decode())
                return
            yield piece
            done += len(raw)

    def back() -> Iterator[str]:
        yield from rest
        yield from pieces

    return front(), back()
