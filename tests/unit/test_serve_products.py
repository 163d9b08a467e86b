"""Who multiplies in a served model: chosen once, told, and the same after other weights."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from moe import ModelConfig, MoEConfig, Transformer
from moe.attention import Attention
from moe.checkpoint import save_model
from moe.errors import UserError
from moe.experts import SwiGLU
from moe.ops.native import choose_native_ops
from moe.ops.packed_experts import PackedExperts
from moe.tokenizer import Tokenizer
from serve.engine.engine import AsyncEngine
from serve.engine.load import load_engine
from serve.engine.products import choose_products
from serve.engine.settings import EngineSettings

pytestmark = pytest.mark.unit

TOKENIZER = Tokenizer.bytes()


def made(seed: int = 0) -> Transformer:
    """A dense block, and two with experts of which some are shared."""
    config = ModelConfig(
        vocab_size=TOKENIZER.vocab_size,
        dim=16,
        num_layers=3,
        num_dense_layers=1,
        num_heads=2,
        max_seq_len=64,
        moe=MoEConfig(num_experts=4, hidden_dim=16, num_shared_experts=1),
    )
    model = Transformer(config)
    model.init_weights(seed)
    return model.eval()


def who_multiplies(model: Transformer) -> set[bool]:
    """Whether projections are torch's, of every place that has some."""
    places = [m for m in model.modules() if isinstance(m, Attention | SwiGLU | Transformer)]
    assert len(places) == 3 + 3 + 1
    return {place.linear is F.linear for place in places}


def needs_native() -> None:
    found = choose_native_ops()
    if found.ops is None:
        pytest.skip(f"{found.reason}: install g++ and leave MOEYARD_NATIVE unset to run this")


def test_native_ops_compute_everything_with_many_weights() -> None:
    needs_native()
    model = made()
    ids_BT = torch.tensor([[5, 6, 7, 8]])
    with torch.inference_mode():
        wanted = model(ids_BT).logits_BTV
        products = choose_products(None, torch.float32, "cpu")
        products.prepare(model)
        assert who_multiplies(model) == {False}
        assert [layer.experts.op_choice()[0] for _, layer in model.moe_layers()] == ["native"] * 2
        torch.testing.assert_close(model(ids_BT).logits_BTV, wanted, rtol=0, atol=1e-5)


def test_without_them_only_experts_are_packed() -> None:
    model = made()
    products = choose_products(False, torch.float32, "cpu")
    products.prepare(model)
    assert (products.ops, products.reason) == (None, "turned off by name")
    assert who_multiplies(model) == {True}
    assert all(isinstance(layer.experts, PackedExperts) for _, layer in model.moe_layers())


def test_where_nothing_is_gained_the_model_stays_as_it_is() -> None:
    for products in (
        choose_products(False, torch.float32, "cpu", batch_invariant=True),
        choose_products(None, torch.float32, "meta"),
    ):
        model = made()
        products.prepare(model)
        assert who_multiplies(model) == {True}
        assert not any(isinstance(layer.experts, PackedExperts) for _, layer in model.moe_layers())


def test_native_ops_that_are_asked_for_and_impossible_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="native ops cannot compute here: they take float32 and bfloat16 on cpu, not"):
        choose_products(True, torch.float64, "cpu")
    save_model(tmp_path / "model", made(), TOKENIZER)
    monkeypatch.setenv("MOEYARD_NATIVE", "0")
    with pytest.raises(UserError, match="native ops cannot compute here: disabled by MOEYARD_NATIVE=0"):
        load_engine(tmp_path / "model", model_id="m", settings=EngineSettings(native=True))
    engine = load_engine(tmp_path / "model", model_id="m")
    assert engine.products_line().startswith("experts by loop: ")
    assert engine.products_line().endswith("disabled by MOEYARD_NATIVE=0")


def test_other_weights_are_computed_as_the_first_ones(tmp_path: Path) -> None:
    needs_native()
    save_model(tmp_path / "one", made(0), TOKENIZER)
    save_model(tmp_path / "two", made(1), TOKENIZER)

    async def swapped() -> AsyncEngine:
        engine = load_engine(tmp_path / "one", model_id="m", settings=EngineSettings(threads=1))
        await engine.start()
        try:
            await engine.swap_weights("m", str(tmp_path / "two"))
        finally:
            await engine.stop()
        return engine

    engine = asyncio.run(swapped())
    model = engine.core.runner.model
    assert torch.equal(model.embed.weight, made(1).embed.weight)
    assert who_multiplies(model) == {False}
    assert engine.products_line().startswith("experts by native: C++ for ")
