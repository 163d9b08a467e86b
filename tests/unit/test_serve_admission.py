"""The bounded line: limits, order, and that it never loses or leaks a request."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.engine.admission import QueueLimits, RequestLine

pytestmark = pytest.mark.unit


def line_of(*prompt_tokens: int, requests: int = 2, tokens: int = 100) -> RequestLine[str]:
    line: RequestLine[str] = RequestLine(QueueLimits(requests, tokens))
    for number, count in enumerate(prompt_tokens):
        assert line.refusal(count) is None
        line.add(str(number), f"item {number}", count)
    return line


def test_pain_5_the_line_is_bounded_by_requests() -> None:
    line = line_of(1, 1, 1, requests=2)  # one runs next, two wait
    assert line.refusal(1) == "requests"
    assert line.start_next() == "item 0"
    assert line.refusal(1) == "requests"
    line.finish()
    assert line.refusal(1) is None


def test_pain_5_the_line_is_bounded_by_prompt_tokens() -> None:
    line = line_of(60, 40, requests=10)
    assert line.refusal(1) == "prompt_tokens"
    line.start_next()
    assert line.waiting_prompt_tokens == 40
    assert line.refusal(60) is None
    assert line.refusal(61) == "prompt_tokens"


def test_an_idle_engine_takes_a_prompt_beyond_the_limit_and_a_line_of_none_takes_one_request() -> None:
    assert line_of(requests=0, tokens=1).refusal(1000) is None
    assert line_of(1, requests=0).refusal(1) == "requests"


def test_requests_leave_in_order_or_by_name() -> None:
    line = line_of(1, 2, 3)
    assert line.remove("1") == "item 1"
    assert line.remove("1") is None
    assert line.start_next() == "item 0"
    assert line.remove("0") is None  # it runs; it does not wait
    with pytest.raises(RuntimeError, match="'0' is still running"):
        line.start_next()
    line.finish()
    assert line.start_next() == "item 2"
    assert line.waiting_prompt_tokens == 0


def test_an_id_cannot_be_in_the_line_twice() -> None:
    line = line_of(1)
    with pytest.raises(ValueError, match="'0' is already in the line"):
        line.add("0", "again", 1)


def test_limits_must_make_sense() -> None:
    with pytest.raises(ValueError, match="queue limits"):
        QueueLimits(max_requests=-1)


@given(st.lists(st.tuples(st.sampled_from(["add", "start", "finish", "remove"]), st.integers(0, 9)), max_size=60))
def test_pain_9_tokens_and_requests_always_add_up(moves: list[tuple[str, int]]) -> None:
    line: RequestLine[int] = RequestLine(QueueLimits(3, 12))
    waiting: dict[str, int] = {}
    running: str | None = None
    for move, number in moves:
        name = str(number)
        if move == "add" and name not in waiting and name != running and line.refusal(number) is None:
            line.add(name, number, number)
            waiting[name] = number
        elif move == "start" and running is None:
            item = line.start_next()
            expected = next(iter(waiting), None)
            assert (None if item is None else str(item)) == expected
            if expected is not None:
                waiting.pop(expected)
                running = expected
        elif move == "finish" and running is not None:
            line.finish()
            running = None
        elif move == "remove":
            assert line.remove(name) == waiting.pop(name, None)
        assert line.num_waiting == len(waiting)
        assert line.waiting_prompt_tokens == sum(waiting.values())
        assert line.num_running == (running is not None)
        assert line.num_waiting + line.num_running <= 4
