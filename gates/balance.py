"""Losses and controllers that keep experts evenly used: pure functions of scores and loads.

Every loss is unweighted; the coefficient belongs to the gate's config. Loads are counts and carry no gradient.

Shape suffixes: T tokens, E experts, N chosen pairs, S sequences, K experts per token.
"""

from __future__ import annotations

import torch
from torch import Tensor


def balance_loss(probs_TE: Tensor, load_E: Tensor) -> Tensor:
    """E * sum_e f_e * P_e: 1 when load and probability are spread evenly, E when one expert has all.

    Switch Transformer, equation 4, with f over all chosen pairs (as Megatron-LM and DeepSpeed's topkgating have it;
    Hugging Face's is k times this one). For the loss of the global batch hand in loads that are summed over all ranks:
    the mean over ranks of the result is then the loss of the whole batch, because f is the same for all.

    Args:
        probs_TE: (T, E) differentiable scores, each row adding up to 1. T may be 0, the loss is 0 then.
        load_E: (E,) int64 offered load, of these tokens or of the global batch.
    """
    num_tokens, num_experts = probs_TE.shape
    fraction_E = load_E.to(probs_TE.dtype) / load_E.sum().clamp_min(1)
    return (probs_TE.sum(0) * fraction_E).sum() * (num_experts / max(1, num_tokens))


def sequence_balance_loss(probs_TE: Tensor, expert_N: Tensor, token_N: Tensor, segment_T: Tensor) -> Tensor:
    """:func:`balance_loss` of each sequence by itself, averaged with the sequences' token counts as weights.

    DeepSeek-V3, equation 17. Weighing by tokens makes the result independent of how sequences are dealt to ranks and
    micro-batches, when these too are weighed by their tokens.

    Args:
        expert_N: (N,) int64 expert of each offered pair.
        token_N: (N,) int64 token of each offered pair.
        segment_T: (T,) int64 sequence of each token, ascending.
    """
    num_tokens, num_experts = probs_TE.shape
    if num_tokens == 0:
        return balance_loss(probs_TE, expert_N.new_zeros(num_experts))
    num_sequences = int(segment_T[-1]) + 1
    cell_N = segment_T[token_N] * num_experts + expert_N
    load_SE = torch.bincount(cell_N, minlength=num_sequences * num_experts).view(num_sequences, num_experts)
    fraction_SE = load_SE.to(probs_TE.dtype) / load_SE.sum(1, keepdim=True).clamp_min(1)
    # sum_s (T_s / T) * E * sum_e f_se * (sum_{t in s} p_te / T_s): the sequence lengths cancel.
    return (probs_TE * fraction_SE[segment_T]).sum() * (num_experts / num_tokens)


def z_loss(logits_TE: Tensor) -> Tensor:
    """mean_t logsumexp(logits_t)^2, which keeps logits small (ST-MoE, equation 5); 0 when T is 0."""
    return logits_TE.logsumexp(-1).square().sum() / max(1, logits_TE.shape[0])


def cv_squared(values_E: Tensor) -> Tensor:
    """Squared coefficient of variation, population variance / mean^2 (Shazeer et al. 2017, equation 7); 0 for zeros."""
    tiny = torch.finfo(values_E.dtype).tiny
    return values_E.var(correction=0) / values_E.mean().square().clamp_min(tiny)


def importance(expert_N: Tensor, weight_N: Tensor, num_experts: int) -> Tensor:
    """(E,) sum of each expert's combine weights over the batch (Shazeer et al. 2017, equation 6); differentiable."""
    return weight_N.new_zeros(num_experts).index_add(0, expert_N, weight_N)


def smooth_load(clean_TE: Tensor, noisy_TE: Tensor, std: Tensor | float, k: int, *, exclude_self: bool) -> Tensor:
    """(E,) expected load if the noise of each (token, expert) were drawn again: a differentiable count.

    Args:
        clean_TE: (T, E) logits before noise.
        noisy_TE: (T, E) logits that selected.
        std: standard deviation of the Gaussian noise, (T, E) or one number.
        k: experts per token, less than E.
        exclude_self: an expert must beat the k-th best of the others (Shazeer et al. 2017, equations 8 to 10);
            False: the k-th best of all (V-MoE, appendix A).
    """
    if not 0 < k < clean_TE.shape[1]:
        raise ValueError(f"k: {k} must be less than the {clean_TE.shape[1]} experts, or there is nothing to win")
    best_TK = noisy_TE.topk(k + 1, dim=-1).values
    threshold_TE = best_TK[:, k - 1 : k]
    if exclude_self:
        next_T1 = best_TK[:, k:]
        threshold_TE = torch.where(noisy_TE > next_T1, next_T1, threshold_TE)
    margin_TE = clean_TE - threshold_TE
    if isinstance(std, Tensor):
        std = std.clamp_min(torch.finfo(std.dtype).eps)
    passed_E: Tensor = torch.special.ndtr(margin_TE / std).sum(0)
    return passed_E


def quantile_bias(score_TE: Tensor, bias_E: Tensor, k: int) -> Tensor:
    """(E,) bias under which each expert would be among the k best of its share T k / E of these tokens, others staying.

    One round of block coordinate ascent on the dual of the balanced assignment: a token's threshold is its (k + 1)-th
    best score + bias, and an expert's bias puts its (T k / E)-th best margin just above 0 (Megatron-LM's quantile
    balancing).

    Args:
        score_TE: (T, E) scores that are compared; T >= 1, k < E.
        bias_E: (E,) bias that they were compared with.
        k: experts per token.
    """
    num_tokens, num_experts = score_TE.shape
    threshold_T1 = (score_TE + bias_E).topk(k + 1, -1).values[:, k:]
    margin_ET = (score_TE - threshold_T1).t().contiguous()
    wanted = max(1, min(num_tokens - 1, round(num_tokens * k / num_experts)))
    best_EC = margin_ET.topk(min(wanted + 1, num_tokens), -1).values
    middle_E = (best_EC[:, wanted - 1] + best_EC[:, -1]) / 2
    return -(middle_E - middle_E.mean())


def sign_bias_update(bias_E: Tensor, load_E: Tensor, rate: float) -> Tensor:
    """b_e + u * sign(mean load - load_e): balance without a loss (Wang et al. 2024, arXiv 2408.15664, algorithm 1).

    The sign comes from integers, so that all ranks agree to the bit.

    Args:
        bias_E: (E,) selection bias.
        load_E: (E,) int64 load of the optimizer step over all ranks.
        rate: u, in units of the score.
    """
    direction_E = torch.sign(load_E.sum() - load_E * load_E.numel())
    return bias_E + rate * direction_E.to(bias_E)
