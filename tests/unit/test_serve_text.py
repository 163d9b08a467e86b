"""Text assembly: whole characters, stop strings across token borders, tokens aligned with their text."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe.tokenizer import StreamDecoder, Tokenizer
from serve.engine.text import TextAssembler

pytestmark = pytest.mark.unit

BYTES = Tokenizer.bytes()


def assemble(text: bytes | str, stop: list[str], *, may_stop_from: int = 0) -> tuple[list[str], list[int], str | None]:
    """Pushes one byte per token; the pieces of text, the released token numbers, and the stop string."""
    raw = text.encode() if isinstance(text, str) else text
    assembler: TextAssembler[int] = TextAssembler(StreamDecoder(BYTES), stop)
    pieces, tokens = [], []
    for number, byte in enumerate(raw):
        release = assembler.push(byte + 3, number, may_stop=number >= may_stop_from)
        pieces.append(release.text)
        tokens += [placed.item for placed in release.tokens]
        if release.stop is not None:
            return pieces, tokens, release.stop
    release = assembler.finish()
    return [*pieces, release.text], tokens + [placed.item for placed in release.tokens], release.stop


def test_characters_of_several_tokens_come_out_whole() -> None:
    pieces, tokens, stop = assemble("aé😀b", [])
    assert pieces == ["a", "", "é", "", "", "", "😀", "b", ""]
    assert tokens == list(range(8))
    assert stop is None


def test_an_incomplete_character_at_the_end_is_replaced() -> None:
    pieces, tokens, _ = assemble("a😀".encode()[:3], [])
    assert "".join(pieces) == "a\ufffd"
    assert tokens == [0, 1, 2]


def test_a_partial_stop_string_is_held_back_and_given_when_it_turns_out_not_to_be_one() -> None:
    pieces, tokens, stop = assemble("xENx", ["END"])
    assert pieces == ["x", "", "", "ENx", ""]
    assert (tokens, stop) == ([0, 1, 2, 3], None)


def test_a_stop_string_cuts_text_and_tokens_even_inside_a_token() -> None:
    bpe = Tokenizer.train_bpe(["abcd " * 50], 280)
    (token,) = bpe.encode("abcd")
    assembler: TextAssembler[str] = TextAssembler(StreamDecoder(bpe), ["cd"])
    release = assembler.push(token, "t")
    assert (release.text, release.stop) == ("ab", "cd")
    assert [(placed.item, placed.start) for placed in release.tokens] == [("t", 0)]
    assert assemble("xxENDyy", ["END"]) == (["x", "x", "", "", ""], [0, 1], "END")


def test_earliest_stop_wins_and_the_longer_of_two_that_begin_together() -> None:
    assert assemble("abcab", ["cab", "bc"])[::2] == (["a", "", ""], "bc")
    assert assemble("xab", ["a", "ab"])[2] == "a"  # it is complete first, token by token
    bpe = Tokenizer.train_bpe(["ab ab ab ab"], 270)
    assembler: TextAssembler[int] = TextAssembler(StreamDecoder(bpe), ["a", "ab"])
    assert assembler.push(bpe.encode("ab")[0], 0).stop == "ab"


def test_stop_strings_before_min_tokens_do_not_count() -> None:
    pieces, _, stop = assemble("ab.cd.e", ["."], may_stop_from=4)
    assert ("".join(pieces), stop) == ("ab.cd", ".")


def test_a_multibyte_stop_string_holds_back_its_first_bytes() -> None:
    assert assemble("hé—x", ["—"]) == (["h", "", "é", "", "", ""], [0, 1, 2], "—")


def test_token_starts_count_characters_of_the_released_text() -> None:
    assembler: TextAssembler[int] = TextAssembler(StreamDecoder(BYTES))
    placed = [p for number, byte in enumerate("aéb".encode()) for p in assembler.push(byte + 3, number).tokens]
    assert [(p.item, p.start) for p in placed] == [(0, 0), (1, 1), (2, 1), (3, 2)]


@given(st.text("abé€", max_size=30), st.lists(st.text("abé€", min_size=1, max_size=4), max_size=4))
def test_whatever_the_cuts_the_text_is_what_a_search_of_the_whole_gives(text: str, stops: list[str]) -> None:
    pieces, tokens, stop = assemble(text, stops)
    # Oracle: the first prefix, in characters, that ends with a stop string; of several there the one begun earliest.
    expected, hit = text, None
    for end in range(1, len(text) + 1):
        matches = [s for s in stops if text[:end].endswith(s)]
        if matches:
            hit = max(matches, key=len)
            expected = text[: end - len(hit)]
            break
    assert "".join(pieces) == expected
    assert stop == hit
    assert tokens == list(range(len(expected.encode())))
