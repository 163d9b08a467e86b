"""The comparison with other projects' load tools sees what differs: its arithmetic on made-up counters."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import sys
from pathlib import Path
from types import ModuleType

import pytest

pytestmark = pytest.mark.unit
FILE = Path(__file__).resolve().parents[2] / "benchmarks" / "serve" / "witnesses.py"


@pytest.fixture(scope="module")
def witnesses() -> ModuleType:
    spec = importlib.util.spec_from_file_location("serve_witnesses", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    kept = sys.path[0]
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path[0] = kept
    return module


BEFORE = {"request_success_total:length": 5.0, "generation_tokens_total": 70.0, "request_prompt_tokens_sum": 9.0}
AFTER = {
    "request_success_total:length": 7.0,
    "request_success_total:stop": 1.0,
    "generation_tokens_total": 454.0,
    "request_prompt_tokens_sum": 201.0,
    "time_to_first_token_seconds_sum": 0.006,
    "time_to_first_token_seconds_count": 3.0,
    "inter_token_latency_seconds_sum": 0.4,
    "inter_token_latency_seconds_count": 400.0,
}


def test_account_is_what_grew_between_two_scrapes(witnesses: ModuleType) -> None:
    ours = witnesses.account(BEFORE, AFTER)
    assert dataclasses.astuple(ours) == pytest.approx((3, 0, 192, 384, 2.0, 1.0))
    assert witnesses.problems(ours, ours, witnesses.Load(requests=3, streams=1)) == []


@pytest.mark.parametrize(
    "grown", ["admission_rejections_total", "requests_aborted_total", "request_success_total:abort"]
)
def test_a_request_that_the_server_did_not_answer_counts_as_failed(witnesses: ModuleType, grown: str) -> None:
    assert witnesses.account(BEFORE, {**AFTER, grown: 1.0}).failed == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"prompt_tokens": 191}, "prompt_tokens: 191 and 192"),
        ({"requests": 2}, "2 of 3 requests were answered"),
        ({"generated_tokens": 383}, "383 tokens instead of 384"),
        ({"failed": 1}, "1 requests failed"),
        ({"first_token_ms": 0.0}, "first_token_ms is 0.0"),
        ({"inter_token_ms": math.nan}, "inter_token_ms is nan"),
    ],
)
def test_what_a_tool_saw_otherwise_is_told(witnesses: ModuleType, change: dict[str, float], words: str) -> None:
    ours = witnesses.account(BEFORE, AFTER)
    found = witnesses.problems(dataclasses.replace(ours, **change), ours, witnesses.Load(requests=3, streams=1))
    assert words in found
