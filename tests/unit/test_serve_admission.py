"""The bounded queue: limits, and that it never loses or leaks a request."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.engine.admission import Admission, QueueLimits

pytestmark = pytest.mark.unit


def queue_of(*prompt_tokens: int, requests: int = 2, tokens: int = 100, running: int = 1) -> Admission:
    queue = Admission(QueueLimits(requests, tokens), running)
    for number, count in enumerate(prompt_tokens):
        assert queue.refusal(count) is None
        queue.add(str(number), 1, count)
    return queue


def test_pain_5_the_queue_is_bounded_by_requests() -> None:
    queue = queue_of(1, 1, 1, requests=2)  # one is about to run, two wait
    assert queue.refusal(1) == "requests"
    queue.started("0")
    assert queue.refusal(1) == "requests"
    queue.sequence_over("0")
    assert queue.refusal(1) is None


def test_a_burst_may_fill_every_free_place_and_the_queue() -> None:
    queue = queue_of(*[1] * 6, requests=2, running=4)
    assert queue.refusal(1) == "requests"
    queue.started("0")
    assert (queue.num_requests, queue.num_waiting) == (6, 5)
    assert queue.refusal(1) == "requests"


def test_a_request_of_many_sequences_takes_their_places() -> None:
    queue = Admission(QueueLimits(1, 100), 4)
    queue.add("many", 4, 1)
    queue.started("many")
    queue.add("waits", 1, 1)
    assert queue.refusal(1) == "requests"
    queue.sequence_over("many")
    assert queue.refusal(1) is None


def test_pain_5_the_queue_is_bounded_by_prompt_tokens() -> None:
    queue = queue_of(60, 40, requests=10)
    assert queue.refusal(1) == "prompt_tokens"
    queue.started("0")
    assert queue.waiting_prompt_tokens == 40
    assert queue.refusal(60) is None
    assert queue.refusal(61) == "prompt_tokens"


def test_an_idle_engine_takes_a_prompt_beyond_the_limit_and_a_queue_of_none_takes_one_request() -> None:
    assert queue_of(requests=0, tokens=1).refusal(1000) is None
    assert queue_of(1, requests=0).refusal(1) == "requests"


def test_an_id_cannot_be_in_flight_twice() -> None:
    with pytest.raises(ValueError, match="'0' is already in flight"):
        queue_of(1).add("0", 1, 1)


def test_limits_must_make_sense() -> None:
    with pytest.raises(ValueError, match="queue limits"):
        QueueLimits(max_requests=-1)


@given(st.lists(st.tuples(st.sampled_from(["add", "start", "over", "remove"]), st.integers(0, 9)), max_size=60))
def test_pain_9_tokens_and_requests_always_add_up(moves: list[tuple[str, int]]) -> None:
    queue = Admission(QueueLimits(3, 12), 2)
    left: dict[str, int] = {}
    waiting: dict[str, int] = {}
    for move, number in moves:
        name = str(number)
        if move == "add" and name not in left and queue.refusal(number) is None:
            queue.add(name, number % 3 + 1, number)
            left[name], waiting[name] = number % 3 + 1, number
        elif move == "start":
            queue.started(name)
            waiting.pop(name, None)
        elif move == "over":
            queue.sequence_over(name)
            waiting.pop(name, None)
            if name in left:
                left[name] -= 1
                if not left[name]:
                    del left[name]
        elif move == "remove":
            queue.remove(name)
            waiting.pop(name, None)
            left.pop(name, None)
        assert queue.num_requests == len(left)
        assert queue.num_waiting == len(waiting)
        assert queue.waiting_prompt_tokens == sum(waiting.values())
        assert all((name in queue) == (name in left) for name in map(str, range(10)))
        assert queue.num_waiting <= 2 + 3
    queue.clear()
    assert (queue.num_requests, queue.num_waiting, queue.waiting_prompt_tokens) == (0, 0, 0)
    assert queue.refusal(1) is None
