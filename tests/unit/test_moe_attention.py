"""Rotary positions and the key-value cache: cached generation sees exactly what a full pass sees."""

from __future__ import annotations

import pytest
import torch

from moe import KVCache, ModelConfig, MoEConfig, Transformer
from moe.ops.rotary import apply_rotary, rotary_angles

pytestmark = pytest.mark.unit


def build(**options: object) -> Transformer:
    moe = MoEConfig(num_experts=4, hidden_dim=16)
    base = {"vocab_size": 40, "dim": 16, "num_layers": 2, "num_heads": 4, "max_seq_len": 24, "init_std": 0.2}
    model = Transformer(ModelConfig.model_validate({**base, "moe": moe.model_dump(), **options}))
    model.init_weights(0)
    return model.eval()


@pytest.mark.parametrize("options", [{}, {"num_kv_heads": 2, "qk_norm": True}, {"num_kv_heads": 1, "head_dim": 6}])
@pytest.mark.parametrize("pieces", [[20], [1] * 20, [7, 1, 1, 8, 3], [19, 1]], ids=str)
@torch.no_grad()
def test_cache_equals_full_pass(options: dict[str, object], pieces: list[int]) -> None:
    model = build(**options)
    ids_BT = torch.randint(0, 40, (3, 20), generator=torch.Generator().manual_seed(0))
    cache = KVCache(model.config, batch=3)
    logits = [model(part, cache=cache).logits_BTV for part in ids_BT.split(pieces, 1)]
    assert cache.length == 20
    torch.testing.assert_close(torch.cat(logits, 1), model(ids_BT).logits_BTV, atol=2e-6, rtol=1e-5)


@torch.no_grad()
def test_cache_can_be_cut_back() -> None:
    model = build()
    ids_BT = torch.randint(0, 40, (1, 12), generator=torch.Generator().manual_seed(0))
    cache = KVCache(model.config)
    model(ids_BT[:, :10], cache=cache)
    cache.truncate(4)
    again = model(ids_BT[:, 4:], cache=cache).logits_BTV
    torch.testing.assert_close(again, model(ids_BT).logits_BTV[:, 4:], atol=2e-6, rtol=1e-5)
    with pytest.raises(ValueError, match="cannot cut a cache of 12 positions to 13"):
        cache.truncate(13)


@torch.no_grad()
def test_cache_that_is_full_says_so_and_stays_as_it_was() -> None:
    model = build()
    cache = KVCache(model.config, capacity=5)
    model(torch.zeros(1, 4, dtype=torch.int64), cache=cache)
    with pytest.raises(ValueError, match="cache holds 4 of 5 positions; 2 more do not fit"):
        model(torch.zeros(1, 2, dtype=torch.int64), cache=cache)
    assert cache.length == 4
    assert KVCache(model.config, capacity=1000).capacity == model.config.max_seq_len


def test_rotary_scores_depend_on_distance_alone() -> None:
    rng = torch.Generator().manual_seed(0)
    q, k = torch.randn(1, 1, 1, 8, generator=rng), torch.randn(1, 1, 1, 8, generator=rng)

    def score(query_position: int, key_position: int) -> float:
        at = [rotary_angles(torch.tensor([[p]]), 8, 100.0) for p in (query_position, key_position)]
        return float((apply_rotary(q, at[0]) * apply_rotary(k, at[1])).sum())

    assert score(9, 4) == pytest.approx(score(105, 100), abs=1e-4)
    assert score(9, 4) != pytest.approx(score(9, 5), abs=1e-3)
    assert score(0, 0) == pytest.approx(float((q * k).sum()), abs=1e-6)


def test_rotary_angles_stay_exact_in_half_precision() -> None:
    # In bf16 the positions 1000 and 1001 would be one.
    rotary = rotary_angles(torch.tensor([[1000, 1001]]), 4, 10_000.0)
    assert rotary.cos.dtype == torch.float32
    x = torch.ones(1, 2, 1, 4, dtype=torch.bfloat16)
    rotated = apply_rotary(x, rotary)
    assert rotated.dtype == torch.bfloat16
    assert not torch.equal(rotated[0, 0, 0], rotated[0, 0, 1])


def test_rotary_takes_other_positions_for_each_sequence() -> None:
    positions = torch.tensor([[0, 1], [5, 6]])
    both = rotary_angles(positions, 4, 10.0)
    assert both.cos.shape == (2, 1, 2, 2)
    x = torch.randn(2, 2, 3, 4, generator=torch.Generator().manual_seed(0))
    alone = apply_rotary(x[1:], rotary_angles(positions[1:], 4, 10.0))
    torch.testing.assert_close(apply_rotary(x, both)[1:], alone)
