"""Every way in which a tokenizer on disk can be wrong says so in words that help."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moe.errors import TokenizerError
from moe.tokenizer import Tokenizer

pytestmark = pytest.mark.unit


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    Tokenizer.bytes().save(tmp_path)
    return tmp_path


def refused(path: Path) -> str:
    with pytest.raises(TokenizerError) as caught:
        Tokenizer.load(path)
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_missing_file_names_the_nearest(saved):
    message = refused(saved / "tokeniser.json")
    assert message == f"there is no tokenizer at {saved / 'tokeniser.json'}; did you mean {saved / 'tokenizer.json'}?"
    assert refused(saved / "no" / "where") == f"there is no tokenizer at {saved / 'no' / 'where'}"


def test_directory_without_a_tokenizer_says_what_it_has(tmp_path):
    assert refused(tmp_path) == f"there is no tokenizer.json in {tmp_path}; it is empty"
    (tmp_path / "tokenizer.model").write_bytes(b"\x0a\x0b")
    message = refused(tmp_path)
    assert "it has tokenizer.model" in message
    assert "convert an older format with transformers" in message


def test_truncated_file(saved):
    file = saved / "tokenizer.json"
    text = file.read_text(encoding="utf-8")
    for kept in (len(text) // 2, len(text) - 1):
        file.write_text(text[:kept], encoding="utf-8")
        assert refused(saved).startswith(f"{file} is truncated: ")
    file.write_text("")
    assert refused(saved) == f"{file} is empty"


def test_text_that_is_not_json(saved):
    (saved / "tokenizer.json").write_text("hello, world")
    assert "is not JSON: Expecting value at line 1, column 1" in refused(saved)


def test_binary_file(saved):
    (saved / "tokenizer.json").write_bytes(b'{"a": "\xff"}')
    assert "is not a tokenizer.json: byte 7 is not UTF-8" in refused(saved)


def test_foreign_json(saved):
    (saved / "tokenizer.json").write_text('{"hidden_size": 4, "model_type": "llama"}')
    message = refused(saved)
    assert "is JSON but not a tokenizer" in message
    assert "this has: hidden_size, model_type" in message
    (saved / "tokenizer.json").write_text("[1, 2]")
    assert "this has: list" in refused(saved)


def test_json_that_the_library_refuses(saved):
    values = json.loads((saved / "tokenizer.json").read_text(encoding="utf-8"))
    values["model"]["merges"] = [["nobody", "knows"]]
    (saved / "tokenizer.json").write_text(json.dumps(values))
    assert "tokenizer.json is not a usable tokenizer: " in refused(saved)


def test_tokenizer_without_end_of_text_says_what_was_tried_and_what_to_do(saved):
    text = (saved / "tokenizer.json").read_text(encoding="utf-8")
    for old, new in (("<|endoftext|>", "<|fin|>"), ("<|im_end|>", "<|stop|>")):
        text = text.replace(old, new)
    (saved / "tokenizer.json").write_text(text, encoding="utf-8")
    (saved / "tokenizer_config.json").unlink()
    message = refused(saved)
    assert "has no end-of-text token: tried <|endoftext|>, </s>, " in message
    assert '{"eos_token": ...} in a tokenizer_config.json beside it' in message
    (saved / "tokenizer_config.json").write_text('{"eos_token": "<|fin|>"}')
    assert Tokenizer.load(saved).eos_id == 0


def test_common_names_of_the_end_of_text_token_are_found(saved):
    text = (saved / "tokenizer.json").read_text(encoding="utf-8")
    (saved / "tokenizer_config.json").unlink()
    for name in ("</s>", "<eos>", "<|eot_id|>", "<｜end▁of▁sentence｜>"):
        renamed = text.replace("<|endoftext|>", name).replace("<|im_end|>", "<|stop|>")
        (saved / "tokenizer.json").write_text(renamed, encoding="utf-8")
        assert Tokenizer.load(saved).eos_id == 0


def test_config_that_names_a_token_the_vocabulary_lacks(saved):
    (saved / "tokenizer_config.json").write_text('{"eos_token": "<|nope|>"}')
    assert "eos_token '<|nope|>' of tokenizer_config.json is not in the vocabulary" in refused(saved)


def test_broken_config_is_an_error_not_ignored(saved):
    (saved / "tokenizer_config.json").write_text('{"eos_token": ')
    assert "tokenizer_config.json is truncated" in refused(saved)
    (saved / "tokenizer_config.json").write_text("[]")
    assert "tokenizer_config.json must hold a JSON object, it holds list" in refused(saved)


def test_saving_where_nothing_can_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(TokenizerError, match=r"cannot write the tokenizer to .*file"):
        Tokenizer.bytes().save(tmp_path / "file")
