"""Traces: what is written is read, while it grows and after a kill; damage and strangers are named; made-up loads."""

from __future__ import annotations

import os
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from parallel.load_trace import SyntheticLoads, TraceError, TraceHeader, TraceReader, TraceWriter

pytestmark = pytest.mark.unit

HEADER = TraceHeader(num_layers=2, world_size=3, num_experts=4, experts_per_token=2, width=8, expert_hidden=16)


def counts(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 1000, HEADER.shape)


def write(path: Path, steps: list[int], **options: Any) -> None:
    with TraceWriter(path, HEADER, **options) as writer:
        for step in steps:
            writer.append(step, counts(step))


def read(path: Path) -> dict[int, np.ndarray]:
    return dict(TraceReader(path))


def test_what_is_written_is_read(tmp_path: Path) -> None:
    write(tmp_path / "trace", [0, 1, 5])
    assert TraceReader(tmp_path / "trace").header == HEADER
    steps = read(tmp_path / "trace")
    assert list(steps) == [0, 1, 5]
    for step, count_LWE in steps.items():
        assert count_LWE.dtype == np.int64
        assert np.array_equal(count_LWE, counts(step))


def test_it_can_be_read_while_it_grows(tmp_path: Path) -> None:
    with TraceWriter(tmp_path / "trace", HEADER) as writer:
        reader = TraceReader(tmp_path / "trace")
        assert list(reader) == []
        writer.append(0, counts(0))
        assert [step for step, _ in reader] == [0]
        writer.append(1, counts(1))
        assert [step for step, _ in reader] == [0, 1]


def test_a_kill_at_any_byte_of_a_record_loses_that_record_alone(tmp_path: Path) -> None:
    path, cut = tmp_path / "trace", tmp_path / "cut"
    write(path, [0, 1])
    before = path.stat().st_size
    write(path, [2], next_step=2)
    whole = path.read_bytes()
    for size in range(before, len(whole)):
        cut.write_bytes(whole[:size])
        assert list(read(cut)) == [0, 1]
        write(cut, [2, 3], next_step=2)
        steps = read(cut)
        assert list(steps) == [0, 1, 2, 3]
        assert np.array_equal(steps[2], counts(2))


def test_steps_that_are_repeated_after_a_resume_are_replaced(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    write(path, [0, 1, 2, 3])
    write(path, [2], next_step=2)
    assert list(read(path)) == [0, 1, 2]
    write(path, [0], next_step=0)
    assert list(read(path)) == [0]


def test_it_is_compact(tmp_path: Path) -> None:
    """Counts of a skewed layer take less than half of four bytes each."""
    header = TraceHeader(num_layers=4, world_size=16, num_experts=64, experts_per_token=2, width=8, expert_hidden=16)
    with TraceWriter(tmp_path / "trace", header) as writer:
        for step, count_LWE in SyntheticLoads(4096, imbalance=3.0).steps(header, 5, seed=0):
            writer.append(step, count_LWE)
    assert (tmp_path / "trace").stat().st_size < 5 * 4 * 16 * 64 * 4 / 2


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is no load trace: its first line does not say so"),
        (b"\x93NUMPY\x01\x00v\x00{'descr'}\n", "is no load trace"),
        (b'{"format": "moeyard load trace"', "is no load trace"),
        (b"[1, 2]\n", "is no load trace"),
        (b'{"format": "something else"}\n', "is no load trace"),
        (b'{"format": "moeyard load trace", "version": 2}\n', "another version; this program reads version 1"),
        (b'{"format": "moeyard load trace", "version": 1, "layers": 2}\n', "has other fields than a trace: ['layers']"),
        (
            b'{"format": "moeyard load trace", "version": 1, "num_layers": 0, "world_size": 1, "num_experts": 1,'
            b' "experts_per_token": 1, "width": 1, "expert_hidden": 1}\n',
            "num_layers is 0 in the trace's header; it must be an integer of at least 1",
        ),
        (b"x" * 10_000, "is no load trace"),
    ],
)
def test_a_foreign_file_is_refused_in_words(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "trace").write_bytes(content)
    with pytest.raises(TraceError) as caught:
        TraceReader(tmp_path / "trace")
    assert words in str(caught.value)


def test_any_damaged_byte_is_found_and_named(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    write(path, [0, 1, 2])
    whole = path.read_bytes()
    ends = [TraceReader(path).data_begins, *(end for _, _, end in TraceReader(path).records())]
    for place in range(ends[0], ends[-1]):
        record = sum(place >= end for end in ends[1:])
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x41]) + whole[place + 1 :])
        with pytest.raises(TraceError, match=f"is damaged behind step {record - 1}, at byte {ends[record]}$"):
            read(path)
        with pytest.raises(TraceError, match="is damaged"):
            TraceWriter(path, HEADER, next_step=3)
    assert path.stat().st_size == len(whole)  # nothing was cut off


def test_a_run_of_another_shape_does_not_go_on_in_this_trace(tmp_path: Path) -> None:
    write(tmp_path / "trace", [0])
    with pytest.raises(TraceError, match=r"was recorded as TraceHeader.*, this run is TraceHeader"):
        TraceWriter(tmp_path / "trace", replace(HEADER, world_size=4))
    assert list(read(tmp_path / "trace")) == [0]


@pytest.mark.parametrize(
    ("step", "count_LWE", "words"),
    [
        (1, np.zeros((2, 4, 3), dtype=int), "counts have shape (2, 4, 3), the trace (L, W, E) = (2, 3, 4)"),
        (1, np.full(HEADER.shape, -1), "counts must be integers from 0 to 2147483647; these are int64"),
        (1, np.full(HEADER.shape, 2**31), "counts must be integers from 0 to 2147483647"),
        (1, np.zeros(HEADER.shape), "counts must be integers from 0 to 2147483647; these are float64"),
        (0, np.zeros(HEADER.shape, dtype=int), "step 0 cannot follow step 0"),
    ],
)
def test_what_cannot_be_recorded_is_refused_and_not_written(
    tmp_path: Path, step: int, count_LWE: np.ndarray, words: str
) -> None:
    with TraceWriter(tmp_path / "trace", HEADER) as writer:
        writer.append(0, counts(0))
        with pytest.raises(TraceError) as caught:
            writer.append(step, count_LWE)
    assert words in str(caught.value)
    assert list(read(tmp_path / "trace")) == [0]


def test_a_full_disk_is_not_hidden(tmp_path: Path) -> None:
    if not os.path.exists("/dev/full"):
        pytest.skip("this system has no /dev/full")
    (tmp_path / "trace").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        TraceWriter(tmp_path / "trace", HEADER)


# --- made-up loads ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("imbalance", [1.6, 3.0, 5.0])
def test_made_up_loads_have_the_imbalance_asked_for(imbalance: float) -> None:
    header = TraceHeader(num_layers=12, world_size=16, num_experts=64, experts_per_token=2, width=8, expert_hidden=16)
    _, count_LWE = next(SyntheticLoads(8192, imbalance, rank_spread=0.0).steps(header, 1, seed=1))
    assert (count_LWE.sum(2) == 8192).all()
    rows_LW = count_LWE.sum(1).reshape(12, 16, 4).sum(2)  # consecutive experts have one owner
    assert (rows_LW.max(1) / rows_LW.mean(1)).mean() == pytest.approx(imbalance, rel=0.03)


def test_no_expert_gets_two_rows_of_a_token() -> None:
    header = TraceHeader(num_layers=3, world_size=2, num_experts=8, experts_per_token=2, width=8, expert_hidden=16)
    _, count_LWE = next(SyntheticLoads(100_000, 1.6).steps(header, 1, seed=1))
    assert count_LWE.max() < 51_000


def test_made_up_loads_drift_slowly_and_are_the_same_for_the_same_seed() -> None:
    make = SyntheticLoads(50_000, 1.8, drift=0.05)
    first, again = ([c for _, c in make.steps(replace(HEADER, num_experts=32), 40, seed=7)] for _ in range(2))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    other = next(make.steps(replace(HEADER, num_experts=32), 1, seed=8)).count_LWE
    assert not np.array_equal(first[0], other)

    def distance(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.abs(a.sum(1) - b.sum(1)).sum() / a.sum())

    near = np.mean([distance(a, b) for a, b in pairwise(first)])
    assert 0 < near < 0.1
    assert distance(first[0], first[-1]) > 3 * near


def test_an_imbalance_that_cannot_be_is_refused() -> None:
    with pytest.raises(TraceError, match=r"no popularity of 4 experts on 3 ranks has an imbalance of 9.0; it can be"):
        next(SyntheticLoads(100, 9.0).steps(HEADER, 1, seed=0))
