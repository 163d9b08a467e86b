"""Tokenizers of every kind: ids, text, bytes, streaming, and what is saved."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import tokenizers
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import decoders, models, normalizers, pre_tokenizers

from moe.errors import TokenizerError
from moe.tokenizer import StreamDecoder, Tokenizer

pytestmark = pytest.mark.unit

TEXT = "To be, or not to be:  that is the question.\r\n\tNaïve café — 日本語 🎭👩‍👩‍👧 \x00 <|endoftext|> <|im_end|>\n\n"


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return Tokenizer.train_bpe([TEXT * 3, "to be or not to be " * 20], 320)


def sentencepiece_like() -> Tokenizer:
    """As Llama's: a marker for spaces, bytes for what is not in the vocabulary."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "▁a", "ab", "▁ab"]
    model = models.BPE(
        vocab={piece: index for index, piece in enumerate(pieces)},
        merges=[("▁", "a"), ("a", "b"), ("▁a", "b")],
        unk_token="<unk>",
        byte_fallback=True,
    )
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first")
    backend.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(replacement="▁", prepend_scheme="first")]
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    return Tokenizer(backend)


def word_piece() -> Tokenizer:
    """Lossy: lower case, words apart."""
    words = ["[UNK]", "<eos>", "to", "be", "##ing", "or", "not", "a", "##b"]
    backend = tokenizers.Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.decoder = decoders.WordPiece(cleanup=False)
    backend.add_special_tokens(["<eos>"])
    return Tokenizer(backend)


def test_bytes_tokenizer_is_the_utf8_bytes_behind_three_special_tokens():
    tokenizer = Tokenizer.bytes()
    assert tokenizer.vocab_size == 259
    assert tokenizer.eos_id == 0
    assert tokenizer.special_ids == {0, 1, 2}
    assert tokenizer.encode(TEXT, special=False) == [byte + 3 for byte in TEXT.encode()]
    assert [tokenizer.token_bytes(byte + 3) for byte in range(256)] == [bytes([byte]) for byte in range(256)]


def test_trained_bpe_merges_what_occurs_most(bpe):
    assert 259 < bpe.vocab_size <= 320
    assert bpe.eos_id == 0
    assert b" be" in {bpe.token_bytes(index) for index in range(bpe.vocab_size)}
    assert len(bpe.encode("to be or not to be")) <= 7


def test_small_corpus_gives_fewer_tokens_and_too_small_a_vocabulary_is_refused():
    assert Tokenizer.train_bpe(["abc"], 1000).vocab_size == 259
    with pytest.raises(TokenizerError, match=r"vocab_size: 258 is too small: 256 bytes and 3 special tokens need 259"):
        Tokenizer.train_bpe(["abc"], 258)


def test_round_trip_keeps_every_character(bpe):
    for tokenizer in (Tokenizer.bytes(), bpe):
        assert tokenizer.decode(tokenizer.encode(TEXT, special=False)) == TEXT
        assert tokenizer.decode(tokenizer.encode(TEXT), skip_special=False) == TEXT
        assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT.replace("<|endoftext|>", "").replace("<|im_end|>", "")


def test_spelled_out_special_tokens_count_in_prompts_and_not_in_corpora(bpe):
    assert bpe.encode("<|endoftext|>") == [0]
    assert bpe.encode("<|im_start|>x<|im_end|>")[::2] == [1, 2]
    plain = bpe.encode("<|endoftext|><|im_end|>", special=False)
    assert not bpe.special_ids & set(plain)
    assert sum(bpe.text_lengths[plain]) == len("<|endoftext|><|im_end|>")


def test_token_bytes_join_to_the_text_and_special_tokens_have_no_length(bpe):
    ids = bpe.encode(TEXT, special=False)
    assert b"".join(map(bpe.token_bytes, ids)) == TEXT.encode()
    assert int(bpe.text_lengths[ids].sum()) == len(TEXT.encode())
    assert bpe.text_lengths[:3].tolist() == [0, 0, 0]
    assert bpe.token_bytes(0) == b"<|endoftext|>"
    assert bpe.token_bytes(bpe.vocab_size) == bpe.token_bytes(-1) == b""
    assert bpe.decode([bpe.vocab_size + 5]) == ""


def test_bad_bytes_decode_to_the_replacement_character():
    tokenizer = Tokenizer.bytes()
    assert tokenizer.decode([0xE2 + 3, 0x82 + 3]) == b"\xe2\x82".decode("utf-8", "replace")


def test_stream_decoder_never_gives_half_a_character():
    tokenizer = Tokenizer.bytes()
    stream = StreamDecoder(tokenizer)
    out = [stream.push(index) for index in tokenizer.encode("é🎭x")]
    assert out == ["", "é", "", "", "", "🎭", "x"]
    assert stream.flush() == ""


def test_stream_decoder_flushes_an_unfinished_character_once_and_begins_anew():
    tokenizer = Tokenizer.bytes()
    stream = StreamDecoder(tokenizer)
    assert stream.push(0xE2 + 3) == ""
    assert stream.flush() == "\ufffd"
    assert stream.flush() == ""
    assert stream.push(ord("a") + 3) == "a"


def test_stream_decoder_hides_or_shows_special_tokens(bpe):
    ids = bpe.encode("a<|im_end|>b")
    for skip, expected in ((True, "ab"), (False, "a<|im_end|>b")):
        stream = StreamDecoder(bpe, skip_special=skip)
        assert "".join([stream.push(index) for index in ids]) + stream.flush() == expected


@pytest.mark.parametrize("make", [sentencepiece_like, word_piece])
def test_stream_decoder_equals_decode_for_other_decoders(make):
    tokenizer = make()
    for text in ("ab a abab é🎭 ab", "to be or not to being ab", "é", "ab ab"):
        ids = tokenizer.encode(text)
        stream = StreamDecoder(tokenizer)
        out = [stream.push(index) for index in ids]
        assert "".join(out) + stream.flush() == tokenizer.decode(ids)
        assert not any("\ufffd" in piece for piece in out)


def test_sentencepiece_like_tokens_stand_for_their_bytes():
    tokenizer = sentencepiece_like()
    assert not tokenizer.is_byte_level
    assert tokenizer.eos_id == 2
    ids = tokenizer.encode("ab é")
    assert tokenizer.decode(ids) == "ab é"
    assert b"".join(map(tokenizer.token_bytes, ids)) == " ab é".encode()  # its first word carries a space


def test_word_piece_tokens_stand_for_words_and_their_ends():
    tokenizer = word_piece()
    assert [tokenizer.token_bytes(index) for index in tokenizer.encode("To being")] == [b" to", b" be", b"ing"]


def test_truncation_padding_and_dropout_of_a_foreign_tokenizer_are_turned_off(bpe, tmp_path):
    bpe.save(tmp_path)
    backend = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    backend.enable_truncation(4)
    backend.enable_padding(length=8)
    backend.model.dropout = 0.5
    backend.save(str(tmp_path / "tokenizer.json"))
    loaded = Tokenizer.load(tmp_path)
    assert loaded.fingerprint == bpe.fingerprint
    assert loaded.encode(TEXT) == bpe.encode(TEXT)


def test_lone_surrogate_is_refused_with_its_place(bpe):
    with pytest.raises(TokenizerError, match=r"character 2 of the text is a lone surrogate \('\\ud800'\)"):
        bpe.encode("ab\ud800")


def test_saved_tokenizer_is_the_same_and_keeps_its_fingerprint(bpe, tmp_path):
    bpe.save(tmp_path / "deep" / "folder")
    for path in (tmp_path / "deep" / "folder", tmp_path / "deep" / "folder" / "tokenizer.json"):
        loaded = Tokenizer.load(path)
        assert loaded.fingerprint == bpe.fingerprint
        assert loaded.encode(TEXT) == bpe.encode(TEXT)
        assert (loaded.eos_id, loaded.special_ids) == (bpe.eos_id, bpe.special_ids)
    assert bpe.fingerprint != Tokenizer.bytes().fingerprint


def test_fingerprint_ignores_key_order_and_null_options(bpe, tmp_path):
    bpe.save(tmp_path)
    file = tmp_path / "tokenizer.json"
    values = json.loads(file.read_text())
    values["model"] = dict(reversed(values["model"].items()))
    file.write_text(json.dumps(dict(reversed(values.items())), indent=3))
    assert Tokenizer.load(tmp_path).fingerprint == bpe.fingerprint


# ChatML, as Qwen and SmolLM2 use it.
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def test_a_trained_tokenizer_has_no_chat_template_and_one_given_to_it_is_saved(bpe, tmp_path):
    bpe.save(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert config["eos_token"] == "<|endoftext|>"
    assert "chat_template" not in config
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": CHATML}))
    Tokenizer.load(tmp_path).save(tmp_path / "chat")
    config = json.loads((tmp_path / "chat" / "tokenizer_config.json").read_text())
    template = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(config["chat_template"])
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert template.render(messages=messages, add_generation_prompt=True) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_model_s_own_chat_template_and_end_token_survive_loading_and_saving(bpe, tmp_path):
    bpe.save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": {"content": "<|im_end|>"}, "tokenizer_class": "OddTokenizer", "model_max_length": 77})
    )
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    loaded = Tokenizer.load(tmp_path)
    assert (loaded.eos_id, loaded.chat_template) == (2, "{{ messages }}")
    loaded.save(tmp_path / "again")
    config = json.loads((tmp_path / "again" / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert config["model_max_length"] == 77
    again = Tokenizer.load(tmp_path / "again")
    assert (again.eos_id, again.chat_template) == (2, "{{ messages }}")


def test_chat_template_is_the_default_of_several_or_absent(bpe, tmp_path):
    bpe.save(tmp_path)
    entries = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": entries}))
    assert Tokenizer.load(tmp_path).chat_template == "D"
    assert word_piece().chat_template is None
    assert bpe.chat_template is None


def test_training_is_the_same_with_any_number_of_threads_and_hash_seed():
    program = (
        "from moe.tokenizer import Tokenizer\n"
        "texts = [f'word{i % 97} and {i % 31} more, {i % 7}' * 3 for i in range(3000)]\n"
        "print(Tokenizer.train_bpe(texts, 500).fingerprint)"
    )
    prints = set()
    for threads, seed in (("1", "1"), ("4", "2")):
        environment = os.environ | {"RAYON_NUM_THREADS": threads, "PYTHONHASHSEED": seed, "PYTHONPATH": os.getcwd()}
        run = subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
        )
        prints.add(run.stdout)
    assert len(prints) == 1
