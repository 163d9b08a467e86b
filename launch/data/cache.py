"""Folders that are made once and used again: complete or absent, checked when used, safe to make twice at once."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from launch.data.progress import Reporter
from moe.errors import DataError

Value = TypeVar("Value")

TEMPORARY_PREFIX = ".making-"
LEFTOVER_S = 24 * 3600.0


class DamagedError(Exception):
    """Something in the cache is not what was written there."""


def checksum(values: Any) -> str:
    """sha256 (hex) of plain values as canonical JSON."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


@contextmanager
def writable(cache: Path) -> Iterator[None]:
    """Turn failures to write the cache (a full disk, a read-only folder) into a DataError that names it."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        if error.errno == errno.ENOSPC:
            reason += "; free some, or point data.cache at another disk"
        raise DataError(f"data.cache: {cache} cannot be written: {reason}") from error


def load_or_make(
    folder: Path, read: Callable[[Path], Value], make: Callable[[Path], None], reporter: Reporter
) -> Value:
    """What ``read(folder)`` gives; where the folder is missing or damaged it is made first.

    ``make`` fills an empty folder, which is then renamed to ``folder``: a killed process leaves only a hidden folder
    that the next day's run removes, and of two processes that make the same one the second takes the first's.

    Args:
        read: raises DamagedError or FileNotFoundError when the folder is not as it was written.

    Raises:
        DataError: the cache cannot be written.
    """
    with writable(folder.parent):
        if folder.is_dir():
            try:
                return read(folder)
            except (DamagedError, FileNotFoundError) as error:
                reporter.line(f"{folder} is damaged ({error}); making it again")
                _discard(folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(folder.parent)
        temporary = folder.parent / f"{TEMPORARY_PREFIX}{folder.name}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        temporary.mkdir()
        try:
            make(temporary)
            _sync(temporary)
            try:
                temporary.rename(folder)
            except OSError as error:
                if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                    raise
            return read(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object that :func:`write_json` wrote.

    Raises:
        DamagedError: it is not what was written.
    """
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
        values: dict[str, Any] = stored["values"]
        if stored["sha256"] != checksum(values):
            raise DamagedError(f"{file.name} was changed")
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedError(f"{file.name} is not readable") from error
    return values


def write_json(file: Path, values: dict[str, Any]) -> None:
    """Write plain values together with their checksum."""
    text = json.dumps({"sha256": checksum(values), "values": values}, indent=1, ensure_ascii=False)
    file.write_text(text + "\n", encoding="utf-8")


def _discard(folder: Path) -> None:
    """Take a damaged folder out of the way in one step, so that no other process reads what is left of it."""
    aside = folder.parent / f"{TEMPORARY_PREFIX}damaged-{uuid.uuid4().hex[:8]}"
    with suppress(FileNotFoundError):  # another process was faster
        folder.rename(aside)
        shutil.rmtree(aside, ignore_errors=True)


def _remove_leftovers(parent: Path) -> None:
    """Remove what killed processes left; only after a day, for a living one may be at work in a young folder."""
    for entry in parent.glob(f"{TEMPORARY_PREFIX}*"):
        with suppress(FileNotFoundError):
            if time.time() - entry.stat().st_mtime > LEFTOVER_S:
                shutil.rmtree(entry, ignore_errors=True)


def _sync(folder: Path) -> None:
    """Make sure the files are on disk before the rename that makes them count."""
    for entry in folder.iterdir():
        with entry.open("rb") as file:
            os.fsync(file.fileno())
