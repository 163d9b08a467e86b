"""Validation split over two real ranks: the same numbers on each as one process gives."""

from __future__ import annotations

import numpy as np
import pytest

from launch.data import Domain, EvalWindows
from launch.evaluate import EvalResult, evaluate
from moe import ModelConfig, MoEConfig, Tokenizer, Transformer
from parallel.topology import Topology
from tests.harness import run_distributed, run_single

pytestmark = pytest.mark.distributed

LIMITS = (None, 3, 1)


def results(topology: Topology) -> list[EvalResult]:
    """Of all windows, of an odd number of them, and of one: a rank without any must take part all the same."""
    tokenizer = Tokenizer.bytes()
    text = "Seven windows do not split evenly over two ranks, and the last one is padded."
    ids = [tokenizer.eos_id, *tokenizer.encode(text), tokenizer.eos_id]
    windows = EvalWindows([Domain("d", 1.0, np.array(ids, np.uint16), len(text.encode()), 1)], 12, tokenizer)
    assert windows.num_sequences == 7
    moe = MoEConfig(num_experts=4, hidden_dim=8)
    model = Transformer(ModelConfig(vocab_size=tokenizer.vocab_size, dim=16, num_layers=2, num_heads=2, moe=moe))
    model.init_weights(0)
    return [evaluate(model, windows, topology, limit=limit, batch=2) for limit in LIMITS]


def test_two_ranks_agree_with_one() -> None:
    alone = run_single(results)
    first, second = run_distributed(results, 2)
    assert first == second
    for split, whole in zip(first, alone, strict=True):
        assert (split.tokens, split.text_bytes) == (whole.tokens, whole.text_bytes)
        assert split.load_LE == whole.load_LE
        assert split.nats == pytest.approx(whole.nats, rel=1e-6)  # other batches: other rounding in fp32
