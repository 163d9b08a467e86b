"""transformers reads what we save and gives the same ids, text and prompts."""

from __future__ import annotations

import pytest

from moe.tokenizer import Tokenizer

pytestmark = [pytest.mark.unit, pytest.mark.peer]

TEXT = "To be, or not to be:  that is the question.\n\nNaïve café 🎭 <|im_start|>x<|endoftext|>"


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_transformers_agrees(kind, tmp_path):
    transformers = pytest.importorskip("transformers", reason="compares with it: pip install transformers")
    ours = Tokenizer.bytes() if kind == "bytes" else Tokenizer.train_bpe([TEXT * 5], 300)
    ours.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs(TEXT)["input_ids"] == ours.encode(TEXT)
    assert theirs.decode(ours.encode(TEXT)) == TEXT
    assert theirs.eos_token_id == ours.eos_id
    assert len(theirs) == ours.vocab_size
    theirs.chat_template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}{% endfor %}"
    messages = [{"role": "user", "content": "Hi"}]
    assert theirs.apply_chat_template(messages, tokenize=False) == "user: Hi"
    theirs.save_pretrained(tmp_path / "theirs")
    again = Tokenizer.load(tmp_path / "theirs")
    assert again.encode(TEXT) == ours.encode(TEXT)
    assert again.chat_template == theirs.chat_template
