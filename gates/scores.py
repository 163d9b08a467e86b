"""What a linear gate does to its logits: score functions, exact top-k, group limits. Pure functions.

Shape suffixes: T tokens, E experts, K experts per token, G groups of experts.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

ScoreFunction = Literal["softmax", "sigmoid", "sqrt_softplus"]

# Below it log(softplus(h)) is h to the last bit of fp64, while softplus itself soon underflows.
_SOFTPLUS_LINEAR_BELOW = -40.0
# Up to here k passes of max beat torch.topk on a CPU for every E (measured for T = 2,048).
_MAX_PASSES = 4


def log_score(logits: Tensor, function: ScoreFunction) -> Tensor:
    """Logarithm of the positive score of each logit, up to a constant per row; finite for every finite logit.

    A softmax over these gives scores normalised to 1 that cannot underflow. Normalising sigmoids by their sum can:
    the router learns to push all of them under the epsilon (Megatron-LM issue 1545).
    """
    if function == "softmax":
        return logits
    if function == "sigmoid":
        return F.logsigmoid(logits)
    # Both branches must have finite gradients, hence the clamp inside of the one that is not taken.
    log_softplus = F.softplus(logits.clamp_min(_SOFTPLUS_LINEAR_BELOW)).log()
    return 0.5 * torch.where(logits < _SOFTPLUS_LINEAR_BELOW, logits, log_softplus)


def score(logits_TE: Tensor, function: ScoreFunction) -> Tensor:
    """(T, E) positive scores: softmax over the experts, or each logit's own sigmoid or sqrt(softplus)."""
    if function == "softmax":
        return logits_TE.softmax(-1)
    return logits_TE.sigmoid() if function == "sigmoid" else log_score(logits_TE, function).exp()


def top_k(score_TE: Tensor, k: int) -> Tensor:
    """(T, K) int64 indices of the k largest scores of each row, largest first, ties to the lower index.

    torch.topk leaves the order of ties open, and with it which expert a tied token visits. Not differentiable.
    """
    score_TE = score_TE.detach()
    if k == 1:
        return score_TE.max(-1, keepdim=True).indices  # documented: the first of equal maxima
    if score_TE.device.type == "cpu" and k <= _MAX_PASSES:
        rest_TE, found = score_TE.clone(), []
        for rank in range(k):
            found.append(rest_TE.max(-1, keepdim=True).indices)
            if rank < k - 1:
                rest_TE.scatter_(1, found[-1], -torch.inf)
        index_TK = torch.cat(found, 1)
        if bool((score_TE.gather(1, index_TK[:, -1:]) > -torch.inf).all()):
            return index_TK
    elif score_TE.device.type == "cpu":
        # A tie shows as equal neighbours among the first k + 1; without one the order is already the only one.
        values_TK1, index_TK1 = torch.topk(score_TE, min(k + 1, score_TE.shape[1]))
        if not bool((values_TK1[:, 1:] == values_TK1[:, :-1]).any()):
            return index_TK1[:, :k]
    return torch.sort(score_TE, dim=-1, descending=True, stable=True).indices[:, :k]


def limit_groups(score_TE: Tensor, num_groups: int, topk_groups: int, group_top: int) -> Tensor:
    """Scores with -inf outside the best groups of experts (DeepSeek-V3, section 2.1.2: node-limited routing).

    Experts stand in ``num_groups`` groups of neighbours. A group's score is the sum of its ``group_top`` best; the best
    ``topk_groups`` groups stay. The mask is -inf, not 0: a negative selection bias must not let a masked expert win.
    """
    num_tokens, num_experts = score_TE.shape
    width = num_experts // num_groups
    score_TGe = score_TE.view(num_tokens, num_groups, width)
    best_TG = score_TGe.topk(min(group_top, width), dim=-1).values.sum(-1)
    kept_TG = torch.zeros_like(best_TG, dtype=torch.bool).scatter_(1, top_k(best_TG, topk_groups), True)
    return score_TGe.masked_fill(~kept_TG.unsqueeze(-1), -torch.inf).view(num_tokens, num_experts)
