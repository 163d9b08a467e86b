"""Options of the language model and what follows from them alone: parameters, FLOPs, bytes.

Nothing here builds a module, so a 1-trillion-parameter config is counted as fast as a tiny one.

Names: L layers, D width, E experts, F expert hidden width, K experts per token, V vocabulary, S sequence length.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from gates import GateConfig


class MoEConfig(BaseModel):
    """The expert bank of one layer; the gate that feeds it is a config value of its own."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    num_experts: int = Field(8, ge=1, description="routed experts per layer (E)")
    hidden_dim: int = Field(256, ge=1, description="hidden width of each routed expert (F)")
    num_shared_experts: int = Field(0, ge=0, description="experts of the same width that every token visits")
    expert_op: Literal["auto", "grouped_mm", "loop"] = Field(
        "auto", description="how stacked experts are multiplied; auto takes grouped_mm wherever it runs"
    )


class ModelConfig(BaseModel):
    """A decoder-only transformer with mixture-of-experts feed-forward layers."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    vocab_size: int | None = Field(None, ge=2, description="rows of the embedding; null takes the tokenizer's")
    dim: int = Field(128, ge=1, description="width of the residual stream (D)")
    num_layers: int = Field(4, ge=1, description="transformer blocks (L)")
    num_heads: int = Field(4, ge=1, description="query heads")
    num_kv_heads: int | None = Field(None, ge=1, description="key and value heads; null: as many as query heads")
    head_dim: int | None = Field(None, ge=2, description="width of one head; null: dim / num_heads")
    max_seq_len: int = Field(256, ge=1, description="longest sequence, in tokens")
    rope_theta: float = Field(10_000.0, gt=0, description="base of the rotary position embedding")
    norm_eps: float = Field(1e-5, gt=0)
    qk_norm: bool = Field(False, description="RMSNorm on each query and key head (Qwen3)")
    tie_embeddings: bool = Field(True, description="use the embedding as output head too")
    init_std: float = Field(0.02, gt=0, description="standard deviation of the initial weights")
    embedding_init_std: float | None = Field(
        None, gt=0, description="that of the embedding; null: init_std. 1 suits an untied embedding"
    )
    num_dense_layers: int = Field(0, ge=0, description="first blocks that have one dense FFN instead of experts")
    dense_hidden_dim: int | None = Field(None, ge=1, description="hidden width of a dense FFN; null: K * F")
    moe: MoEConfig = MoEConfig()
    recompute: Literal["none", "block"] = Field(
        "none", description="block: recompute activations in backward, replaying the routing of forward"
    )

    @property
    def kv_heads(self) -> int:
        return self.num_kv_heads or self.num_heads

    @property
    def width_per_head(self) -> int:
        return self.head_dim or self.dim // self.num_heads

    @property
    def num_moe_layers(self) -> int:
        return self.num_layers - self.num_dense_layers

    def moe_layer_indices(self) -> range:
        """Blocks whose feed-forward is a mixture of experts."""
        return range(self.num_dense_layers, self.num_layers)

    def check(self) -> list[str]:
        """Everything wrong with the combination of options, as ``"field: message"``."""
        problems = []
        if self.head_dim is None and self.dim % self.num_heads:
            problems.append(
                f"num_heads: {self.num_heads} does not divide dim {self.dim}; set head_dim or another count"
            )
        if self.width_per_head % 2:
            problems.append(f"head_dim: rotary embedding needs an even head width, got {self.width_per_head}")
        if self.num_heads % self.kv_heads:
            problems.append(f"num_kv_heads: {self.kv_heads} does not divide num_heads {self.num_heads}")
        if self.num_dense_layers > self.num_layers:
            problems.append(f"num_dense_layers: {self.num_dense_layers} is more than num_layers {self.num_layers}")
        return problems

    def dense_width(self, gate: GateConfig) -> int:
        """Hidden width of a dense FFN: as wide as the experts that one token visits unless set."""
        experts = round(gate.experts_per_token(self.moe.num_experts)) + self.moe.num_shared_experts
        return self.dense_hidden_dim or max(1, experts) * self.moe.hidden_dim


@dataclass(frozen=True)
class ParamCounts:
    """Trainable parameters by part. ``active`` is what one token uses (embedding rows looked up count as one row)."""

    embedding: int
    head: int
    attention: int
    norm: int
    dense_ffn: int
    gate: int
    shared_experts: int
    experts: int
    active: int

    @property
    def total(self) -> int:
        return (
            self.embedding
            + self.head
            + self.attention
            + self.norm
            + self.dense_ffn
            + self.gate
            + self.shared_experts
            + self.experts
        )


def swiglu_params(dim: int, hidden_dim: int) -> int:
    """Parameters of one SwiGLU feed-forward: gate, up and down projections without biases."""
    return 3 * dim * hidden_dim


def count_params(model: ModelConfig, gate: GateConfig, vocab_size: int | None = None) -> ParamCounts:
    """Parameters of the model by part.

    Args:
        vocab_size: overrides ``model.vocab_size``; needed when that is null.

    Raises:
        ValueError: when neither says how many rows the embedding has.
    """
    vocab = vocab_size or model.vocab_size
    if vocab is None:
        raise ValueError("model.vocab_size is null and no tokenizer was given to take it from")
    head_width, moe = model.width_per_head, model.moe
    embedding = vocab * model.dim
    head = 0 if model.tie_embeddings else embedding
    attention = model.num_layers * 2 * model.dim * head_width * (model.num_heads + model.kv_heads)
    norm = model.dim * (2 * model.num_layers + 1) + (2 * head_width * model.num_layers if model.qk_norm else 0)
    dense_ffn = model.num_dense_layers * swiglu_params(model.dim, model.dense_width(gate))
    gates = model.num_moe_layers * gate.num_params(model.dim, moe.num_experts)
    one_expert = swiglu_params(model.dim, moe.hidden_dim)
    shared = model.num_moe_layers * moe.num_shared_experts * one_expert
    experts = model.num_moe_layers * moe.num_experts * one_expert
    visited = round(model.num_moe_layers * gate.experts_per_token(moe.num_experts) * one_expert)
    active = model.dim + embedding + attention + norm + dense_ffn + gates + shared + visited
    return ParamCounts(embedding, head, attention, norm, dense_ffn, gates, shared, experts, active)


def flops_per_token(model: ModelConfig, gate: GateConfig, seq_len: int, vocab_size: int | None = None) -> float:
    """Training FLOPs (forward and backward) per token: 6 per active matmul parameter, plus causal attention.

    PaLM, appendix B, counts attention as 12 * L * D * S without the causal half; here only the half that is used.
    """
    counts = count_params(model, gate, vocab_size)
    matmul_params = counts.active - model.dim - counts.norm
    attention = 6 * model.num_layers * model.num_heads * model.width_per_head * seq_len
    return 6 * matmul_params + attention
