"""Counts from the config alone equal those of the model that is built; options that do not go together are named."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from gates import parse_gate_config
from moe import ModelConfig, MoEConfig, Transformer, count_params, flops_per_token

pytestmark = pytest.mark.unit

GRID = [
    {"qk_norm": qk, "tie_embeddings": tie, "num_dense_layers": dense, "num_kv_heads": kv, "head_dim": head}
    for qk, tie, dense, kv, head in itertools.product((False, True), (False, True), (0, 1, 3), (None, 1), (None, 10))
]
GATES: list[dict[str, Any]] = [
    {"name": "topk", "k": 2},
    {"name": "topk", "k": 1, "renormalise": False},
    {"name": "topk", "k": 3, "noise": "learned"},
]


@pytest.mark.parametrize("gate_options", GATES, ids=["k=2", "k=1", "learned noise"])
@pytest.mark.parametrize("num_shared", [0, 2])
def test_counts_equal_the_built_model(gate_options: dict[str, Any], num_shared: int) -> None:
    gate = parse_gate_config(gate_options)
    moe = MoEConfig(num_experts=5, hidden_dim=12, num_shared_experts=num_shared)
    for options in GRID:
        config = ModelConfig(vocab_size=37, dim=16, num_layers=3, num_heads=4, moe=moe, **options)
        with torch.device("meta"):
            model = Transformer(config, gate)
        counts = count_params(config, gate)
        sizes = {name: p.numel() for name, p in model.named_parameters()}
        assert counts.total == sum(sizes.values()), options

        def part(text: str, sizes: dict[str, int] = sizes) -> int:
            return sum(n for name, n in sizes.items() if text in name)

        assert counts.embedding == part("embed.weight")
        assert counts.head == part("head.weight")
        assert counts.norm == part("norm.weight")
        assert counts.attention == part(".attn.w")
        assert counts.dense_ffn == part(".ffn.")
        assert counts.gate == part(".moe.gate.")
        assert counts.shared_experts == part(".moe.shared.")
        assert counts.experts == part(".moe.experts.")
        # One token: one embedding row, the whole head (tied or not), and K of the E experts.
        idle = counts.experts * (1 - gate.experts_per_token(5) / 5)
        head = 0 if config.tie_embeddings else counts.embedding
        assert counts.active == round(counts.total - idle - counts.embedding - head + 16 + 37 * 16), options


def test_flops_count_every_matmul_of_forward_and_backward() -> None:
    """Forward matmuls of one token as torch counts them, times three."""
    from torch.utils.flop_counter import FlopCounterMode

    moe = MoEConfig(num_experts=4, hidden_dim=24, num_shared_experts=1, expert_op="loop")
    config = ModelConfig(vocab_size=64, dim=32, num_layers=2, num_heads=4, num_kv_heads=2, num_dense_layers=1, moe=moe)
    model = Transformer(config, {"name": "topk", "k": 2})
    model.init_weights(0)
    seq_len = 32
    ids_BT = torch.zeros(1, seq_len, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(ids_BT)
    # torch does not count attention on the CPU: two products of d multiply-adds for each head and earlier position, of
    # which there are S / 2 on average.
    attention = config.num_layers * config.num_heads * 2 * 2 * config.width_per_head * seq_len / 2
    counted = 3 * (counter.get_total_flops() / seq_len + attention)
    assert counted == pytest.approx(flops_per_token(config, model.gate_config, seq_len), rel=1e-6)


def test_vocabulary_may_come_from_the_tokenizer() -> None:
    config, gate = ModelConfig(), parse_gate_config("topk")
    with pytest.raises(ValueError, match="vocab_size is null and no tokenizer was given"):
        count_params(config, gate)
    assert count_params(config, gate, 100).embedding == 100 * config.dim
    with pytest.raises(ValueError, match="vocab_size: must be set to build a model"):
        Transformer(config)


def test_everything_wrong_is_reported_at_once() -> None:
    config = ModelConfig(vocab_size=10, dim=10, num_heads=4, num_kv_heads=3, num_layers=2, num_dense_layers=3)
    with pytest.raises(ValueError, match="num_heads: 4 does not divide dim 10") as error:
        Transformer(config, {"name": "topk", "k": 99})
    text = str(error.value)
    assert "num_kv_heads: 3 does not divide num_heads 4" in text
    assert "num_dense_layers: 3 is more than num_layers 2" in text
    assert "gate.k: 99 experts per token, but there are only 8" in text
    assert ModelConfig(dim=12, num_heads=4).check() == ["head_dim: rotary embedding needs an even head width, got 3"]
