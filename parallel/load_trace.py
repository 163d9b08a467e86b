"""A record of loads: for every step how many rows each rank had for each expert of each layer; and made-up ones.

A file is one line of JSON that says what the numbers mean, then one record a step: its number, the length of what
follows, and the counts, compressed; all with checksums. It only ever grows at its end, so it can be read while training
writes it, and a run that is killed in the middle of a record loses that record and nothing else.

Shape suffixes: L layers, W ranks, E experts.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from parallel.placement import Ints

Floats = NDArray[np.float64]

FORMAT = "moeyard load trace"
VERSION = 1
_HEAD = struct.Struct("<qI")  # step, bytes of the compressed counts
_CHECKSUM = struct.Struct("<I")  # crc32; of the head right behind it, of the counts behind these
_MAX_HEADER_BYTES = 4096


class TraceError(ValueError):
    """The file is no trace, of another version, damaged, or of another run's shape."""


@dataclass(frozen=True)
class TraceHeader:
    """What a trace was recorded from.

    Attributes:
        num_layers: L, MoE layers.
        world_size: W.
        num_experts: E, experts of a layer.
        experts_per_token: K.
        width: D, numbers in a row.
        expert_hidden: F.
    """

    num_layers: int
    world_size: int
    num_experts: int
    experts_per_token: int
    width: int
    expert_hidden: int

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if type(value) is not int or value < 1:
                raise TraceError(f"{name} is {value!r} in the trace's header; it must be an integer of at least 1")

    @property
    def shape(self) -> tuple[int, int, int]:
        """(L, W, E), the shape of a step's counts."""
        return self.num_layers, self.world_size, self.num_experts


class TraceStep(NamedTuple):
    """One record: the step's number and its (L, W, E) counts."""

    step: int
    count_LWE: Ints


class TraceWriter:
    """Appends steps to a trace; a context manager.

    Args:
        path: made if it is not there.
        header: must be that of the file if there is one.
        next_step: records of this step and later ones, from a run that is being repeated, are dropped, as is what a
            killed run left of a last record.

    Raises:
        TraceError: there is a file and it is no trace, damaged, or has another header.
    """

    def __init__(self, path: Path, header: TraceHeader, next_step: int = 0) -> None:
        self._header = header
        self._last_step = -1
        if path.exists() and path.stat().st_size:
            reader = TraceReader(path)
            if reader.header != header:
                raise TraceError(f"{path} was recorded as {reader.header}, this run is {header}")
            end = reader.data_begins
            for step, _, after in reader.records():
                if step < next_step:
                    self._last_step, end = step, after
            self._file: BinaryIO = path.open("r+b")
            self._file.truncate(end)
            self._file.seek(end)
        else:
            self._file = path.open("wb")
            about = {"format": FORMAT, "version": VERSION, **asdict(header)}
            self._file.write(json.dumps(about).encode() + b"\n")
            self._file.flush()

    def append(self, step: int, count_LWE: Ints) -> None:
        """Write one step at once, so that readers and survivors of a kill see it.

        Args:
            step: larger than that of the record before.
            count_LWE: (L, W, E) rows, below 2^31.

        Raises:
            TraceError: another shape, not counts, or a step out of order. Nothing is written then.
        """
        if count_LWE.shape != self._header.shape:
            raise TraceError(f"counts have shape {count_LWE.shape}, the trace (L, W, E) = {self._header.shape}")
        if count_LWE.dtype.kind not in "iu" or not 0 <= count_LWE.min() <= count_LWE.max() < 2**31:
            raise TraceError(f"counts must be integers from 0 to {2**31 - 1}; these are {count_LWE.dtype}")
        if step <= self._last_step:
            raise TraceError(f"step {step} cannot follow step {self._last_step}")
        payload = zlib.compress(count_LWE.astype("<i4").tobytes(), level=1)
        head = _HEAD.pack(step, len(payload))
        self._file.write(head + _checksum(head) + payload + _checksum(payload))
        self._file.flush()
        self._last_step = step

    def close(self) -> None:
        """No more steps."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


class TraceReader:
    """Reads a trace, also one that is still being written.

    Attributes:
        header: what it was recorded from.
        data_begins: byte at which the first record begins.

    Raises:
        TraceError: the file is no trace, or of another version.
        OSError: it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        with path.open("rb") as file:
            line = file.readline(_MAX_HEADER_BYTES)
        try:
            about = json.loads(line)
            is_trace = isinstance(about, dict) and about.pop("format", None) == FORMAT and line.endswith(b"\n")
        except ValueError:
            is_trace = False
        if not is_trace:
            raise TraceError(f"{path} is no load trace: its first line does not say so")
        if about.pop("version", None) != VERSION:
            raise TraceError(f"{path} is a load trace of another version; this program reads version {VERSION}")
        try:
            self.header = TraceHeader(**about)
        except TypeError:
            raise TraceError(f"the header of {path} has other fields than a trace: {sorted(about)}") from None
        self.data_begins = len(line)

    def __iter__(self) -> Iterator[TraceStep]:
        """Complete records in order; one that is still being written is left for the next time.

        Raises:
            TraceError: a record is damaged; says which and where.
        """
        for step, payload, end in self.records():
            try:
                counts = np.frombuffer(zlib.decompress(payload), dtype="<i4").reshape(self.header.shape)
            except (zlib.error, ValueError):
                raise self._damaged(step, end) from None
            yield TraceStep(step, counts.astype(np.int64))

    def records(self) -> Iterator[tuple[int, bytes, int]]:
        """(step, compressed counts, byte behind the record) of each complete record, its checksum compared.

        Raises:
            TraceError: a record is damaged.
        """
        previous, end = -1, self.data_begins
        with self._path.open("rb") as file:
            file.seek(end)
            while len(record := file.read(_HEAD.size + _CHECKSUM.size)) == _HEAD.size + _CHECKSUM.size:
                head = record[: _HEAD.size]
                step, size = _HEAD.unpack(head)
                if record[_HEAD.size :] != _checksum(head) or step <= previous:
                    raise self._damaged(previous, end)
                rest = file.read(size + _CHECKSUM.size)
                if len(rest) < size + _CHECKSUM.size:
                    return
                if rest[size:] != _checksum(rest[:size]):
                    raise self._damaged(previous, end)
                previous, end = step, file.tell()
                yield step, rest[:size], end

    def _damaged(self, after_step: int, byte: int) -> TraceError:
        return TraceError(f"{self._path} is damaged behind step {after_step}, at byte {byte}")


def _checksum(data: bytes) -> bytes:
    return _CHECKSUM.pack(zlib.crc32(data))


# --- made-up loads ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SyntheticLoads:
    """Zipf popularity that drifts, as trained gates show it.

    Attributes:
        rows_per_rank: rows of each rank in a step and layer: tokens times experts per token.
        imbalance: of ranks under even owners, max/mean, that the popularity at the start has on average of layers.
        drift: standard deviation of one step of the random walk of an expert's logit.
        rank_spread: standard deviation of a rank's own preference for an expert, a logit too.
        clustered: popular experts have neighbouring numbers, so that one rank owns several of them: the worst case.
    """

    rows_per_rank: int
    imbalance: float
    drift: float = 0.02
    rank_spread: float = 0.1
    clustered: bool = False

    def steps(self, header: TraceHeader, num_steps: int, seed: int) -> Iterator[TraceStep]:
        """Steps of a trace, the same for the same seed.

        Raises:
            TraceError: no popularity has the imbalance, because one expert gets at most one row of a token.
        """
        rng = np.random.default_rng(seed)
        layers, world, experts = header.shape
        ranking_LE = np.array(
            [np.arange(experts) if self.clustered else rng.permutation(experts) for _ in range(layers)]
        )
        logit_LE = -np.log1p(ranking_LE)
        logit_LE = logit_LE * self._sharpness(logit_LE, header)
        own_LWE = rng.normal(0, self.rank_spread, (layers, world, experts))
        for step in range(num_steps):
            share_LWE = _shares(logit_LE[:, None] + own_LWE, header.experts_per_token)
            counts = [[rng.multinomial(self.rows_per_rank, share_E) for share_E in share_WE] for share_WE in share_LWE]
            yield TraceStep(step, np.array(counts, dtype=np.int64))
            logit_LE = logit_LE + rng.normal(0, self.drift, (layers, experts))

    def _sharpness(self, logit_LE: Floats, header: TraceHeader) -> float:
        """The factor on the logits that gives the wanted imbalance, found by bisection."""
        low, high = 0.0, 16.0

        def imbalance(factor: float) -> float:
            share_LE = _shares(logit_LE * factor, header.experts_per_token)
            owner_E = np.arange(header.num_experts) * header.world_size // header.num_experts
            rows_WL = np.zeros((header.world_size, header.num_layers))
            np.add.at(rows_WL, owner_E, share_LE.T)
            return float((rows_WL.max(0) * header.world_size).mean())

        if not imbalance(low) <= self.imbalance <= imbalance(high):
            raise TraceError(
                f"no popularity of {header.num_experts} experts on {header.world_size} ranks has an imbalance of"
                f" {self.imbalance}; it can be {imbalance(low):.2f} to {imbalance(high):.2f}"
            )
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (middle, high) if imbalance(middle) < self.imbalance else (low, middle)
        return high


def _shares(logits: Floats, experts_per_token: int) -> Floats:
    """Softmax over the last dimension, but no expert gets more than one row of each token: others get what is over."""
    shares: Floats = np.exp(logits - logits.max(-1, keepdims=True))
    shares /= shares.sum(-1, keepdims=True)
    cap = 1 / experts_per_token
    for _ in range(experts_per_token):
        full = shares >= cap
        rest = np.where(full, 0, shares)
        room = 1 - cap * full.sum(-1, keepdims=True)
        shares = np.where(full, cap, rest * room / np.maximum(rest.sum(-1, keepdims=True), 1e-300))
    shares /= shares.sum(-1, keepdims=True)
    return shares
