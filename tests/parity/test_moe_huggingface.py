"""Exported models in transformers: the same logits, and back again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moe import ModelConfig, Tokenizer, Transformer, load_model, save_model

pytestmark = pytest.mark.peer

transformers = pytest.importorskip("transformers", reason="pip install 'transformers>=5' to compare with it")

CONFIGS = {
    "renormalised": ({"num_kv_heads": 2}, {"k": 2}),
    "not renormalised, untied": ({"tie_embeddings": False, "head_dim": 6}, {"k": 2, "renormalise": False}),
    "dense first": ({"num_dense_layers": 2, "dense_hidden_dim": 20, "rope_theta": 300.0}, {"k": 3}),
    "softmax after top-k": ({}, {"k": 2, "order": "topk_then_score", "renormalise": False}),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    options, gate = CONFIGS[name]
    base = {"vocab_size": 264, "dim": 16, "num_layers": 3, "num_heads": 4, "max_seq_len": 64, "init_std": 0.2}
    moe = {"num_experts": 5, "hidden_dim": 12}
    model = Transformer(
        ModelConfig.model_validate({**base, "qk_norm": True, "moe": moe, **options}), {"name": "topk", **gate}
    )
    model.init_weights(0)
    for param_name, param in model.named_parameters():
        if param_name.endswith("norm.weight"):
            torch.nn.init.uniform_(param, 0.5, 1.5)
    ids_BT = torch.randint(0, 264, (2, 40), generator=torch.Generator().manual_seed(0))
    expected = model.eval()(ids_BT).logits_BTV
    save_model(tmp_path / "ours", model, Tokenizer.bytes(), max_shard_bytes=20_000)

    peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32)
    assert type(peer).__name__ == "Qwen3MoeForCausalLM"
    with torch.no_grad():
        for implementation in ("eager", "grouped_mm"):
            peer.set_experts_implementation(implementation)
            torch.testing.assert_close(peer(ids_BT).logits, expected, atol=2e-5, rtol=1e-4)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "ours")
    text = "Naïve café"
    assert tokenizer(text).input_ids == Tokenizer.bytes().encode(text)

    peer.save_pretrained(tmp_path / "theirs")
    tokenizer.save_pretrained(tmp_path / "theirs")
    back = load_model(tmp_path / "theirs").model
    for key, value in model.state_dict().items():
        assert torch.equal(back.state_dict()[key], value), key


def test_gradients_are_those_of_transformers(tmp_path: Path) -> None:
    moe = {"num_experts": 4, "hidden_dim": 12}
    base = {"vocab_size": 264, "dim": 16, "num_layers": 2, "num_heads": 4, "max_seq_len": 64, "init_std": 0.2}
    model = Transformer(ModelConfig.model_validate({**base, "qk_norm": True, "moe": moe}))
    model.init_weights(0)
    save_model(tmp_path / "ours", model, Tokenizer.bytes())
    ids_BT = torch.randint(0, 264, (2, 40), generator=torch.Generator().manual_seed(0))
    peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32)
    for logits in (model(ids_BT).logits_BTV, peer(ids_BT).logits):
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids_BT[:, 1:].flatten()).backward()
    torch.testing.assert_close(peer.model.embed_tokens.weight.grad, model.embed.weight.grad, atol=1e-5, rtol=1e-3)
    torch.testing.assert_close(
        peer.model.layers[1].mlp.gate.weight.grad, model.blocks[1].moe.gate.weight.grad, atol=1e-5, rtol=1e-3
    )
    theirs = peer.model.layers[0].mlp.experts.down_proj.grad
    torch.testing.assert_close(theirs.mT, model.blocks[0].moe.experts.w_down_EFD.grad, atol=1e-5, rtol=1e-3)
