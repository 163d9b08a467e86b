"""The models that serving is measured with, made on the spot: nothing is downloaded, nothing is kept in git."""

from __future__ import annotations

import random
from pathlib import Path

import torch

from moe.checkpoint import save_model
from moe.config import ModelConfig, MoEConfig
from moe.tokenizer import Tokenizer
from moe.transformer import Transformer

# Qwen3-MoE's shape in small: 461M parameters, 107M of them active, in bf16.
MEDIUM = ModelConfig(
    vocab_size=32_000,
    dim=1024,
    num_layers=8,
    num_heads=16,
    num_kv_heads=8,
    head_dim=64,
    max_seq_len=2048,
    qk_norm=True,
    tie_embeddings=True,
    moe=MoEConfig(num_experts=32, hidden_dim=512),
)
# The recipe `tiny` (launch/configs/tiny.yaml) with a longer context and without its training: speed is the same.
TINY = ModelConfig(
    vocab_size=1024, dim=128, num_layers=2, num_heads=4, max_seq_len=2048, moe=MoEConfig(num_experts=8, hidden_dim=128)
)


def make_model(folder: Path, name: str, *, words: bool = False) -> Path:
    """Random weights of ``name`` ("medium" or "tiny") as an exported model directory; made once.

    Args:
        words: every token stands for text, as a trained model's do, instead of the first few hundred alone. A server
            has something to send for each token then: what others' clients measure is right only so.
    """
    directory = folder / (f"{name}-words" if words else name)
    if not (directory / "config.json").exists():
        config, k, dtype = {"medium": (MEDIUM, 4, torch.bfloat16), "tiny": (TINY, 2, torch.float32)}[name]
        model = Transformer(config, {"name": "topk", "k": k})
        model.init_weights(0)
        tokenizer = _words(config.vocab_size or 0) if words else Tokenizer.bytes()
        save_model(directory, model.to(dtype).eval(), tokenizer)
    return directory


def _words(vocab_size: int) -> Tokenizer:
    """A tokenizer with that many tokens, of words drawn by chance."""
    rng = random.Random(0)
    tokenizer = Tokenizer.train_bpe(
        [" ".join("".join(rng.choices("etaoinshrdlu", k=8)) for _ in range(150_000))], vocab_size
    )
    assert tokenizer.vocab_size == vocab_size
    return tokenizer
