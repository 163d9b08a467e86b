"""Published variants of top-k by name: the options of ``topk`` with other defaults.

``switch``       k=1, weights before renormalisation, jitter, capacity 1.25 (Fedus et al., arXiv:2101.03961)
``gshard``       k=2, random second choice, capacity 1, weights of survivors renormalised (arXiv:2006.16668)
``noisy_topk``   k=2, learned Gaussian noise, importance and load losses (Shazeer et al., arXiv:1701.06538)
``deepseek_v3``  sigmoid scores, groups, balance by bias, weights times 2.5 (arXiv:2412.19437); theirs has k=8,
                 num_groups=8, topk_groups=4 of 256 experts, and a sequence balance loss of 1e-4
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from gates.capacity import DropPolicy
from gates.registry import register_gate
from gates.scores import ScoreFunction
from gates.topk import TopKConfig, TopKGate


class SwitchConfig(TopKConfig):
    """Options of ``topk`` with the defaults of the Switch Transformer."""

    name: Literal["switch"] = "switch"  # type: ignore[assignment]
    k: int = Field(1, ge=1, description="experts per token")
    renormalise: bool = Field(False, description="divide the weights of a token by their sum; never with k=1")
    jitter: float = Field(0.01, ge=0, lt=1, description="in training the gate sees x * U(1 - jitter, 1 + jitter)")
    capacity_factor: float | None = Field(1.25, gt=0, description="in training an expert keeps at most this share")
    balance_scope: Literal["micro_batch", "sequence", "global"] = Field(
        "micro_batch", description="tokens whose load must be even"
    )


@register_gate("switch")
class SwitchGate(TopKGate):
    """Top-1 routing of the Switch Transformer."""

    config_type = SwitchConfig


class GShardConfig(TopKConfig):
    """Options of ``topk`` with the defaults of GShard."""

    name: Literal["gshard"] = "gshard"  # type: ignore[assignment]
    noise: Literal["none", "learned", "fixed", "second_choice"] = Field(
        "second_choice", description="in training; second_choice: Gumbel noise on all choices but the first"
    )
    capacity_factor: float | None = Field(1.0, gt=0, description="in training an expert keeps at most this share")
    drop_policy: DropPolicy = Field("choice", description="who is kept; choice: first choices, then earlier tokens")
    renormalise_kept: bool = Field(True, description="renormalise again over the pairs that capacity kept")
    balance_scope: Literal["micro_batch", "sequence", "global"] = Field(
        "micro_batch", description="tokens whose load must be even"
    )


@register_gate("gshard")
class GShardGate(TopKGate):
    """Top-2 routing of GShard."""

    config_type = GShardConfig


class NoisyTopKConfig(TopKConfig):
    """Options of ``topk`` with the defaults of the first sparsely-gated layer."""

    name: Literal["noisy_topk"] = "noisy_topk"  # type: ignore[assignment]
    noise: Literal["none", "learned", "fixed", "second_choice"] = Field(
        "learned", description="in training; learned: Gaussian of width softplus(x W_n)"
    )
    balance_coef: float = Field(0.0, ge=0, description="weight of the balance loss, which is 1 at perfect balance")
    importance_coef: float = Field(0.1, ge=0, description="weight of CV^2 over experts of the summed weights")
    load_coef: float = Field(0.1, ge=0, description="weight of CV^2 of the smooth load; needs noise learned or fixed")


@register_gate("noisy_topk")
class NoisyTopKGate(TopKGate):
    """Noisy top-k routing."""

    config_type = NoisyTopKConfig


class DeepSeekV3Config(TopKConfig):
    """Options of ``topk`` with the method of DeepSeek-V3, at sizes that suit few experts."""

    name: Literal["deepseek_v3"] = "deepseek_v3"  # type: ignore[assignment]
    score: ScoreFunction = Field("sigmoid", description="how a logit becomes a score")
    scale: float = Field(2.5, gt=0, description="factor on all weights")
    balance: Literal["aux", "bias", "quantile", "frozen"] = Field("bias", description="what keeps loads even; see topk")
    num_groups: int = Field(4, ge=1, description="experts stand in this many groups of neighbours (DeepSeek-V3: 8)")
    topk_groups: int = Field(2, ge=1, description="a token may use this many groups (DeepSeek-V3: 4)")
    balance_coef: float = Field(1e-4, ge=0, description="weight of the balance loss by sequence")


@register_gate("deepseek_v3")
class DeepSeekV3Gate(TopKGate):
    """Sigmoid routing within groups, balanced by a bias."""

    config_type = DeepSeekV3Config
