"""Any text survives, any ids decode, however they are divided."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launch.data.documents import split_pieces
from moe.tokenizer import StreamDecoder, Tokenizer

pytestmark = pytest.mark.unit

BPE = Tokenizer.train_bpe(["the cat sat on the mat, and the café was naïve.\n  - 日本語 🎭 don't we'll\n\n" * 20], 400)
TOKENIZERS = {"bytes": Tokenizer.bytes(), "bpe": BPE}
TEXTS = st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from("ab \n\t\r'日🎭\u0301<|>"), max_size=80)


@pytest.mark.parametrize("kind", TOKENIZERS)
@settings(deadline=None)
@given(text=TEXTS)
def test_text_round_trip(kind, text):
    tokenizer = TOKENIZERS[kind]
    ids = tokenizer.encode(text, special=False)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(tokenizer.encode(text), skip_special=False) == text
    assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()
    assert tokenizer.text_lengths[ids].sum() == len(text.encode())


@pytest.mark.parametrize("kind", TOKENIZERS)
@settings(deadline=None)
@given(data=st.data(), skip=st.booleans())
def test_streaming_equals_decoding_for_any_ids(kind, data, skip):
    tokenizer = TOKENIZERS[kind]
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=40))
    stream = StreamDecoder(tokenizer, skip_special=skip)
    sofar = ""
    whole = tokenizer.decode(ids, skip_special=skip)
    for index in ids:
        sofar += stream.push(index)
        assert whole.startswith(sofar)
    assert sofar + stream.flush() == whole


@settings(max_examples=200, deadline=None)
@given(text=TEXTS.map(lambda text: text * 4), limit=st.integers(1, 60), chunk=st.integers(1, 50))
def test_pieces_do_not_depend_on_how_the_text_arrives(text, limit, chunk):
    whole = list(split_pieces([text], limit))
    parts = list(split_pieces([text[i : i + chunk] for i in range(0, len(text), chunk)], limit))
    assert parts == whole
    assert "".join(whole) == text
    assert all(whole)
    assert all(limit <= len(piece) <= 2 * limit for piece in whole[:-1])


@settings(max_examples=200, deadline=None)
@given(lines=st.lists(st.text("ab c'.1\t🎭", max_size=12), min_size=20, max_size=60))
def test_text_cut_at_lines_has_the_tokens_of_the_whole(lines):
    # Every fourth line is plain, so that there is always a newline between visible characters to cut at.
    text = "\n".join("line" if i % 2 else f"x{line}x" for i, line in enumerate(lines))
    pieces = list(split_pieces([text], 40))
    ids = [index for piece in pieces for index in BPE.encode(piece, special=False)]
    assert ids == BPE.encode(text, special=False)
