"""Documents as streams of text pieces, and the readers of each kind of file.

A piece is at most about 256 thousand characters, so neither a file larger than memory nor a tokenizer's working
memory grows with a document.
"""

from __future__ import annotations

import codecs
import difflib
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe.errors import DataError

PIECE_CHARS = 1 << 17
READ_BYTES = 1 << 22

# A newline between two visible characters: GPT-2's pre-tokenisation always ends a token there, so a text cut behind it
# has the same tokens as the whole.
_SAFE_CUT = re.compile(r"\S\n(?=\S)")


@dataclass(frozen=True)
class Document:
    """One text. ``pieces`` joined are the document, none is empty; it is read once, lazily.

    Attributes:
        name: for people: a file, a play, ``file:line``.
    """

    name: str
    pieces: Iterable[str]


Reader = Callable[[Path, str, str], Iterator[Document]]
"""(file, name for messages, text field) to the file's documents."""


def split_pieces(chunks: Iterable[str], limit: int = PIECE_CHARS) -> Iterator[str]:
    """Regroup text into pieces of ``limit`` to ``2 * limit`` characters; the last may be shorter.

    Where to cut depends on the text alone, not on how ``chunks`` divide it.
    """
    buffer = ""
    for chunk in chunks:
        buffer += chunk
        while len(buffer) > 2 * limit:
            found = _SAFE_CUT.search(buffer, limit - 1, 2 * limit)
            cut = found.end() if found else 2 * limit
            yield buffer[:cut]
            buffer = buffer[cut:]
    if buffer:
        yield buffer


def read_text(path: Path, name: str, text_field: str = "") -> Iterator[Document]:
    """A whole text file as one document, byte for byte (no newline or BOM handling).

    Raises:
        DataError: while pieces are read: the file cannot be read, or is not UTF-8.
    """
    yield Document(name, split_pieces(_utf8_chunks(path)))


def read_jsonl(path: Path, name: str, text_field: str) -> Iterator[Document]:
    """One document per line: the string in ``text_field`` of a JSON object. Blank lines are skipped.

    Raises:
        DataError: with file and line: not UTF-8, not JSON, no such field, not a string.
    """
    try:
        with path.open("rb") as file:
            offset = 0
            for number, line in enumerate(file, 1):
                if line.strip():
                    text = _jsonl_text(line, f"{path}:{number}", text_field, path, offset)
                    yield Document(f"{name}:{number}", split_pieces([text]))
                offset += len(line)
    except OSError as error:
        raise unreadable(path, error) from error


def read_parquet(path: Path, name: str, text_field: str) -> Iterator[Document]:
    """One document per row: the string in column ``text_field``; row groups are read one after another.

    Raises:
        DataError: pyarrow is missing, the file is damaged, no such column, or a row that is not text.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise DataError(f"reading {path} needs pyarrow: pip install 'moeyard[data]'") from error
    try:
        with parquet.ParquetFile(path) as file:
            check_field(text_field, file.schema_arrow.names, f"{path}: there is no column")
            row = 0
            for batch in file.iter_batches(batch_size=1024, columns=[text_field]):
                for value in batch.column(0).to_pylist():
                    if not isinstance(value, str):
                        raise DataError(f"{path}: row {row}: column {text_field!r} is {_kind(value)}, not text")
                    yield Document(f"{name}:{row}", split_pieces([value]))
                    row += 1
    except OSError as error:
        raise unreadable(path, error) from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: column {text_field!r} is not UTF-8 near row {row}") from error
    except pyarrow.ArrowException as error:
        raise DataError(f"{path} is not a usable parquet file: {str(error).splitlines()[0]}") from error


READERS: dict[str, Reader] = {
    ".txt": read_text,
    ".md": read_text,
    ".jsonl": read_jsonl,
    ".parquet": read_parquet,
}


def check_field(field: str, present: Iterable[str], problem: str) -> None:
    """Raise DataError unless ``field`` is among ``present``, naming the nearest."""
    names = list(present)
    if field in names:
        return
    near = difflib.get_close_matches(field, names, 1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise DataError(
        f"{problem} {field!r}, only {', '.join(map(repr, names[:8])) or 'nothing'}{hint} (data.sources.text_field)"
    )


def unreadable(path: Path, error: OSError) -> DataError:
    """The error for a file that the system does not let us read."""
    return DataError(f"{path} cannot be read: {error.strerror or error}")


def _utf8_chunks(path: Path) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    begin = 0  # byte offset of what the decoder has not given out yet
    try:
        with path.open("rb") as file:
            while True:
                chunk = file.read(READ_BYTES)
                held = len(decoder.getstate()[0])
                try:
                    text = decoder.decode(chunk, final=not chunk)
                except UnicodeDecodeError as error:
                    raise _not_utf8(path, begin - held + error.start, error) from error
                if text:
                    yield text
                if not chunk:
                    return
                begin += len(chunk)
    except OSError as error:
        raise unreadable(path, error) from error


def _not_utf8(path: Path, offset: int, error: UnicodeDecodeError) -> DataError:
    byte = error.object[error.start]
    return DataError(f"{path} is not UTF-8: byte 0x{byte:02x} at offset {offset}; convert it, for example with iconv")


def _jsonl_text(line: bytes, where: str, field: str, path: Path, offset: int) -> str:
    try:
        row = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise _not_utf8(path, offset + error.start, error) from error
    except json.JSONDecodeError as error:
        raise DataError(f"{where} is not JSON: {error.msg} at column {error.colno}") from error
    if not isinstance(row, dict):
        raise DataError(f"{where} must hold a JSON object, it holds {_kind(row)}")
    check_field(field, row, f"{where} has no field")
    text = row[field]
    if not isinstance(text, str):
        raise DataError(f"{where}: field {field!r} is {_kind(text)}, not text")
    return text


def _kind(value: Any) -> str:
    """What JSON calls a value, for messages."""
    names = {
        type(None): "null",
        bool: "a boolean",
        int: "a number",
        float: "a number",
        list: "a list",
        dict: "an object",
    }
    return names.get(type(value), f"of type {type(value).__name__}")
