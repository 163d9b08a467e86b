"""COMET: k trees whose leaves are the experts; a token descends, softly first, and in the end to one leaf of each tree.

Ibrahim et al., "COMET: Learning Cardinality Constrained Mixture of Experts with Trees and Local Search", KDD 2023
(arXiv:2306.02824). Split i of tree j sends a token left with probability S(z_ij . x + c_ij), S the smooth step of width
gamma, which is exactly 0 or 1 outside it. v_ij, the product along the path to leaf i, adds up to 1 over the leaves of a
tree; each leaf has a weight logit of its own, and one softmax over all k E entries of v_ij exp(a_ij) weighs the
experts. Only experts with some v above 0 are computed. Three things drive and tame it:

* an entropy loss on v makes splits decide; it is turned up over ``entropy_warmup``, so that experts differ before they
  are chosen among;
* a balance loss on the soft leaf mass, without which experts die as soon as the gate becomes sparse (not in the paper);
* tokens are RMS-normalised first, so that one gamma suits every model.

Trees are heaps: node i has children 2i + 1 and 2i + 2, nodes 0 to E - 2 split, and node E - 1 + e is the leaf of expert
e. So every number of experts has a tree, of depth ceil(log2 E), in which each leaf can be reached. Local search over
which leaf is which expert is the gate ``local_search``.

Shape suffixes: T tokens, D width, E experts (leaves), S = E - 1 splits, K trees.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from gates.base import Gate, GateConfig, GateInput, GateOutput, Steps, check_finite, schedule_steps
from gates.linear import draw_uniform_
from gates.metrics import plan_metrics
from gates.plan import RoutingPlan
from gates.registry import register_gate
from gates.solvers.rms_linear import rms_linear
from gates.solvers.soft_tree import mix_leaves


class COMETConfig(GateConfig):
    """Options of COMET."""

    name: Literal["comet"] = "comet"
    k: int = Field(2, ge=1, description="trees, and with them experts per token once all splits have decided")
    gamma: float = Field(1.0, gt=0, description="width of the smooth step; the best was from 0.001 to 10 in the paper")
    entropy_coef: float = Field(
        0.01, ge=0, description="weight of the entropy of the leaf probabilities, summed over trees; large: sparse soon"
    )
    entropy_warmup: Steps = Field(
        0.1, description="how long that weight grows from 0: steps, or below 1 a share of training"
    )
    balance_coef: float = Field(
        0.01, ge=0, description="weight of E * sum_e (mean soft mass of e)^2, which is 1 at perfect balance"
    )
    normalise: bool = Field(True, description="divide a token by its root mean square first; the paper does not")

    def num_params(self, dim: int, num_experts: int) -> int:
        """Splits and leaves of each tree, with biases."""
        return self.k * (2 * num_experts - 1) * (dim + 1)

    def experts_per_token(self, num_experts: int) -> float:
        """k, where training ends; it begins with all E."""
        return float(min(self.k, num_experts))

    def check(self, num_experts: int) -> list[str]:
        """See :meth:`GateConfig.check`."""
        return [f"k: {self.k} trees, but there are only {num_experts} experts"] if self.k > num_experts else []


@register_gate("comet")
class COMETGate(Gate):
    """k trees over E leaves. See the module. ``warmth`` is how far the entropy loss has been turned up."""

    config_type = COMETConfig
    config: COMETConfig
    interchangeable_experts = False
    weight_sum = "at_most_one"  # a replayed expert may no longer be reached
    warmth: Tensor

    def __init__(self, config: COMETConfig, dim: int, num_experts: int) -> None:
        super().__init__(config, dim, num_experts)
        splits, trees = num_experts - 1, config.k
        self.split_weight = nn.Parameter(torch.empty(trees * splits, dim))
        self.split_bias = nn.Parameter(torch.empty(trees * splits))
        self.leaf_weight = nn.Parameter(torch.empty(trees * num_experts, dim))
        self.leaf_bias = nn.Parameter(torch.empty(trees * num_experts))
        self.register_buffer("warmth", torch.tensor(0.0, dtype=torch.float32))
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Splits within the cubic part of the smooth step: U(-gamma/100, gamma/100); leaves U(-0.05, 0.05)."""
        for split in (self.split_weight, self.split_bias):
            draw_uniform_(split, self.config.gamma / 100, generator)
        for leaf in (self.leaf_weight, self.leaf_bias):
            draw_uniform_(leaf, 0.05, generator)

    def begin_step(self, step: int, total_steps: int | None = None) -> None:
        """See :meth:`Gate.begin_step`."""
        length = schedule_steps(self.config.entropy_warmup, total_steps, "entropy_warmup")
        self.warmth.fill_(1.0 if step >= length else step / length)

    def route(self, inp: GateInput) -> GateOutput:
        """See :meth:`Gate.route`."""
        config, num_experts = self.config, self.num_experts
        split_KST, logit_KET = self._scores(inp.x_TD)
        mixture = mix_leaves(split_KST, logit_KET, config.gamma)
        weight_TE = mixture.weight_ET.t()
        if inp.replay is None:
            plan = RoutingPlan.from_mask(mixture.open_ET.t(), weight_TE)
        else:
            plan = inp.replay.with_weight(inp.replay.pick(weight_TE))
        logits_TE = logit_KET.mean(0).t()
        if not inp.with_losses:
            return GateOutput(plan, logits_TE=logits_TE)
        num_tokens = max(1, plan.num_tokens)
        aux: dict[str, Tensor] = {}
        metrics = plan_metrics(plan)
        entropy = mixture.entropy / num_tokens
        metrics["split_entropy"] = entropy.detach()
        if config.entropy_coef:
            aux["entropy"] = self.warmth.to(entropy.dtype) * entropy
        if config.balance_coef:
            share_E = mixture.mass_E / (num_tokens * config.k)
            aux["balance"] = num_experts * share_E.square().sum()
        return GateOutput(plan, aux, metrics, logits_TE)

    def _scores(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """(K, S, T) what each split decides by, and (K, E, T) the weight logit of each leaf."""
        config, num_experts = self.config, self.num_experts
        weight = torch.cat([self.split_weight, self.leaf_weight]).to(x_TD.dtype)
        bias = torch.cat([self.split_bias, self.leaf_bias]).to(x_TD.dtype)
        both = rms_linear(x_TD, weight, bias) if config.normalise else torch.addmm(bias.unsqueeze(1), weight, x_TD.t())
        check_finite(both.t(), config.name)
        # By split, not by slices: their gradients are put together in one go.
        split_ST, leaf_LT = both.split([config.k * (num_experts - 1), config.k * num_experts])
        split_KST = split_ST.view(config.k, num_experts - 1, both.shape[1])
        return split_KST, leaf_LT.view(config.k, num_experts, both.shape[1])
