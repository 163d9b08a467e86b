"""Function calls out of a model's text: what is a call, what is none, and that pieces make no difference."""

from __future__ import annotations

import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from serve.client import Structure
from serve.protocol.tool_calls import Piece, ToolCall, ToolCallParser, parse_call
from serve.protocol.tools import calls_grammar

pytestmark = pytest.mark.unit

CALL = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'
F = ToolCall("f", '{"a": 1}')


def parse(*pieces: str, max_calls: int | None = None) -> list[Piece]:
    """All that comes out, neighbouring texts joined."""
    parser = ToolCallParser(max_calls)
    joined: list[Piece] = []
    for out in [*(piece for text in pieces for piece in parser.push(text)), *parser.finish()]:
        if joined and isinstance(out, str) and isinstance(joined[-1], str):
            joined[-1] += out
        else:
            joined.append(out)
    return joined


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("", []),
        ("plain", ["plain"]),
        ("a < b <tool", ["a < b <tool"]),
        (CALL, [F]),
        (f"Let me see.\n{CALL}", ["Let me see.\n", F]),
        (f"{CALL}\n{CALL}\n", [F, F]),
        (f"{CALL} and {CALL}", [F, " and ", F]),
        (f"{CALL}\nDone.", [F, "\nDone."]),
        # The closing tag may be missing at the end, or stand in a string.
        (CALL.removesuffix("</tool_call>"), [F]),
        (
            '<tool_call>{"name": "f", "arguments": {"a": "</tool_call>\\"</tool_call>"}}</tool_call>.',
            [ToolCall("f", '{"a": "</tool_call>\\"</tool_call>"}'), "."],
        ),
        # No call, so it stays text, tags and all.
        ("<tool_call>f()</tool_call>", ["<tool_call>f()</tool_call>"]),
        ('<tool_call>{"name": "f"', ['<tool_call>{"name": "f"']),
        ("<tool_call>", ["<tool_call>"]),
        (f"<tool_call>\n{CALL}", [f"<tool_call>\n{CALL}"]),
        (f"{CALL}\n<tool_call>no</tool_call>", [F, "\n<tool_call>no</tool_call>"]),
        (f"<tool_call>no</tool_call>\n{CALL}", ["<tool_call>no</tool_call>\n", F]),
        ("</tool_call>", ["</tool_call>"]),
    ],
)
def test_calls_and_what_only_looks_like_them(text: str, pieces: list[Piece]) -> None:
    assert parse(text) == pieces
    assert parse(*text) == pieces


@pytest.mark.parametrize(
    "raw",
    [
        "",
        "[]",
        "null",
        '"f"',
        '{"name": "f"}',
        '{"arguments": {}}',
        '{"name": "", "arguments": {}}',
        '{"name": 5, "arguments": {}}',
        '{"name": "f", "arguments": "{}"}',
        '{"name": "f", "arguments": [1]}',
        '{"name": "f", "arguments": {"a": NaN}}',
        '{"name": "f", "arguments": {"a": ' + "9" * 5000 + "}}",
        '{"name": "f", "arguments": {"a": ' + "[" * 100_000 + "]" * 100_000 + "}}",
        '{"name": "f", "arguments": {}} {}',
    ],
)
def test_no_calls(raw: str) -> None:
    assert parse_call(raw) is None


def test_arguments_keep_their_characters_and_their_order() -> None:
    call = parse_call('{"arguments": {"b": "é\\n", "a": [1.5, null, true]}, "name": "f-1", "id": 3}')
    assert call == ToolCall("f-1", '{"b": "é\\n", "a": [1.5, null, true]}')


def test_text_is_given_as_early_as_it_is_certain() -> None:
    parser = ToolCallParser()
    assert parser.push("Look: a <") == ["Look: a "]
    assert parser.push(" b <tool_") == ["< b "]
    assert parser.push("call>") == []
    assert parser.push('{"name": "f", "arguments": {"a": 1}}</tool_call') == []
    assert parser.push("> \n") == [F]
    assert parser.push("x") == [" \nx"]
    assert parser.finish() == []
    assert parser.num_calls == 1


def test_calls_after_the_most_that_are_wanted_are_left_out() -> None:
    assert parse(f"a{CALL}\n{CALL} b {CALL}", max_calls=1) == ["a", F, " b "]


FRAGMENTS = st.sampled_from(
    [
        CALL,
        "<tool_call>",
        "</tool_call>",
        '{"name": "g", "arguments": {}}',
        '"',
        "\\",
        "{",
        "}",
        "\n",
        " ",
        "<",
        "é",
        "x",
    ]
)
TEXTS = st.lists(FRAGMENTS, max_size=12).map("".join)


@given(TEXTS, st.data())
@example(f"a{CALL}\n{CALL}b", None)
def test_any_split_gives_the_same(text: str, data: st.DataObject | None) -> None:
    whole = parse(text)
    assert parse(*text) == whole
    if data is not None:
        cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
        assert parse(*(text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True))) == whole


@given(TEXTS)
def test_nothing_is_lost_but_calls_and_the_blanks_between_them(text: str) -> None:
    pieces = parse(text)
    shown = "".join(piece for piece in pieces if isinstance(piece, str))
    if not any(isinstance(piece, ToolCall) for piece in pieces):
        assert shown == text
    remaining = iter(text)
    assert all(char in remaining for char in shown)  # in order, nothing made up


SHORT = st.text('aé"\\\n<', max_size=4)


@given(st.dictionaries(SHORT, st.integers() | SHORT | st.none(), max_size=4), st.text("a <\n", max_size=4))
def test_written_calls_are_read_back(arguments: dict[str, object], before: str) -> None:
    call = ToolCall("f", json.dumps(arguments, ensure_ascii=False))
    written = f'{before}<tool_call>\n{{"name": "f", "arguments": {call.arguments}}}\n</tool_call>'
    assert parse(written) == ([before] if before else []) + [call]


def tool(name: str, parameters: object = None) -> dict[str, object]:
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


@pytest.mark.parametrize(
    ("text", "several", "matches"),
    [
        ('<tool_call>\n{"name": "f", "arguments": {"city": "Rome"}}\n</tool_call>', False, True),
        ('<tool_call>\n{"name": "g-1", "arguments": {"any": [1, 2]}}\n</tool_call>', False, True),
        ('<tool_call>\n{"name": "f", "arguments": {"city": 5}}\n</tool_call>', False, False),
        ('<tool_call>\n{"name": "h", "arguments": {}}\n</tool_call>', False, False),
        ("Rome", False, False),
        (f"{CALL.replace('f', 'g-1')}\n{CALL.replace('f', 'g-1')}", True, True),
        (f"{CALL.replace('f', 'g-1')}\n{CALL.replace('f', 'g-1')}", False, False),
    ],
)
def test_grammar_of_forced_calls_admits_calls_and_nothing_else(text: str, several: bool, matches: bool) -> None:
    llguidance = pytest.importorskip("llguidance", reason="needs the serve extra: pip install 'moeyard[serve]'")

    class Bytes:
        bos_token_id, eos_token_id = None, 256

        def __init__(self) -> None:
            self.special_token_ids = [256]
            self.tokens = [*(bytes([byte]) for byte in range(256)), b"\xff<end>"]

        def __call__(self, text: bytes | str) -> list[int]:
            return list(text.encode() if isinstance(text, str) else text)

    city = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    structure = calls_grammar([tool("f", city), tool("g-1")], several=several)
    assert isinstance(structure, Structure)
    assert structure.kind == "grammar"
    tokenizer = llguidance.LLTokenizer(llguidance.TokenizerWrapper(Bytes()), eos_token=[256])
    matcher = llguidance.LLMatcher(tokenizer, llguidance.grammar_from("grammar", structure.source), log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    assert (matcher.consume_tokens(list(text.encode())) and matcher.is_accepting()) is matches
    if matches:
        assert all(isinstance(piece, ToolCall) for piece in parse(text))
