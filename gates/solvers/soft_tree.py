"""Soft decision trees with smooth-step splits: leaf probabilities, and the mixture of leaves that COMET weighs by.

Hazimeh et al., "The Tree Ensemble Layer", ICML 2020 (arXiv:2002.07772); Ibrahim et al., "COMET", KDD 2023
(arXiv:2306.02824, section 3.2). Trees are heaps: node i has children 2i + 1 and 2i + 2, nodes 0 to E - 2 split, nodes
E - 1 to 2E - 2 are the leaves, in order. So every number of leaves has a tree. Nodes stand before tokens, so that what
a level computes lies together in memory; gradients are written out, because autograd would keep and copy every level.

Shape suffixes: ... any leading dimensions, K trees, E leaves, S = E - 1 splits, V = 2 E - 1 nodes, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gates.solvers.smooth_step import smooth_step


def leaf_probabilities(split: Tensor, gamma: float) -> Tensor:
    """(..., E, T) probability of reaching each leaf; they add up to 1, exact zeros where a split has decided.

    Args:
        split: (..., S, T) what each split's smooth step gets; positive goes left.
        gamma: width of the smooth step.
    """
    result: Tensor = _LeafProbabilities.apply(split, gamma)
    return result


class Mixture(NamedTuple):
    """What COMET makes of its trees.

    Attributes:
        weight_ET: (E, T) sum over trees of v exp(a), divided by its sum over leaves: adds up to 1 for each token.
        mass_E: (E,) sum over trees and tokens of v.
        entropy: 0-d sum over all of -v log v.
        open_ET: (E, T) bool, whether some tree reaches the leaf.
    """

    weight_ET: Tensor
    mass_E: Tensor
    entropy: Tensor
    open_ET: Tensor


def mix_leaves(split_KST: Tensor, logit_KET: Tensor, gamma: float) -> Mixture:
    """One softmax over all K E entries of log v + a, v the leaf probabilities and a the logits of the leaves."""
    return Mixture(*_MixLeaves.apply(split_KST, logit_KET, gamma))


# --- readable references ----------------------------------------------------------------------------------------------


def leaf_probabilities_reference(split: Tensor, gamma: float) -> Tensor:
    """:func:`leaf_probabilities`, leaf by leaf from its path; autograd finds the gradients."""
    splits = split.shape[-2]
    left, right = smooth_step(split, gamma), smooth_step(-split, gamma)
    leaves = []
    for leaf in range(splits, 2 * splits + 1):
        reached, node = split.new_ones(*split.shape[:-2], 1, split.shape[-1]), leaf
        while node:
            parent = (node - 1) // 2
            went = left if node == 2 * parent + 1 else right
            reached, node = reached * went[..., parent : parent + 1, :], parent
        leaves.append(reached)
    return torch.cat(leaves, -2)


def mix_leaves_reference(split_KST: Tensor, logit_KET: Tensor, gamma: float) -> Mixture:
    """:func:`mix_leaves`, as its docstring says; autograd finds the gradients."""
    v_KET = leaf_probabilities_reference(split_KST, gamma)
    log_KET = torch.where(v_KET > 0, v_KET.clamp_min(torch.finfo(v_KET.dtype).tiny).log(), -torch.inf)
    weight_ET = (log_KET + logit_KET).flatten(0, 1).softmax(0).view_as(v_KET).sum(0)
    entropy = -torch.where(v_KET > 0, v_KET * log_KET.clamp_min(-1e4), 0).sum()
    return Mixture(weight_ET, v_KET.sum((0, 2)), entropy, (v_KET > 0).any(0))


# --- level by level ---------------------------------------------------------------------------------------------------


def _levels(splits: int) -> Iterator[tuple[slice, slice, slice]]:
    """Splits of each level, their left children and their right ones, from the root on."""
    first, width = 0, 1
    while first < splits:
        end = min(first + width, splits)
        yield slice(first, end), slice(2 * first + 1, 2 * end + 1, 2), slice(2 * first + 2, 2 * end + 2, 2)
        first, width = first + width, 2 * width


def _step(rise: Tensor) -> Tensor:
    return (3 - 2 * rise).mul_(rise).mul_(rise)


def _descend(split: Tensor, gamma: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """How far each split has risen from 0 to 1, probabilities of going left and right, and (..., V, T) of each node."""
    splits = split.shape[-2]
    rise = (split / gamma).add_(0.5).clamp_(0, 1)
    left, right = _step(rise), _step(1 - rise)
    reach = split.new_empty(*split.shape[:-2], 2 * splits + 1, split.shape[-1])
    reach[..., 0, :] = 1
    for here, to_left, to_right in _levels(splits):
        torch.mul(reach[..., here, :], left[..., here, :], out=reach[..., to_left, :])
        torch.mul(reach[..., here, :], right[..., here, :], out=reach[..., to_right, :])
    return rise, left, right, reach


def _ascend(gain: Tensor, rise: Tensor, left: Tensor, right: Tensor, reach: Tensor, gamma: float) -> Tensor:
    """Gradient of the splits. ``gain`` (..., V, T) holds that of the leaves, and gets that of all nodes."""
    splits = rise.shape[-2]
    difference = torch.empty_like(rise)
    for here, to_left, to_right in reversed(list(_levels(splits))):
        torch.mul(gain[..., to_left, :], left[..., here, :], out=gain[..., here, :])
        gain[..., here, :].addcmul_(gain[..., to_right, :], right[..., here, :])
        torch.sub(gain[..., to_left, :], gain[..., to_right, :], out=difference[..., here, :])
    slope = (1 - rise).mul_(rise).mul_(6 / gamma)
    return difference.mul_(reach[..., :splits, :]).mul_(slope)


class _LeafProbabilities(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, split: Tensor, gamma: float) -> Tensor:
        rise, left, right, reach = _descend(split, gamma)
        ctx.save_for_backward(rise, left, right, reach)
        ctx.gamma = gamma
        return reach[..., split.shape[-2] :, :].clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        rise, left, right, reach = ctx.saved_tensors
        gain = torch.empty_like(reach)
        gain[..., rise.shape[-2] :, :] = grads[0]
        return _ascend(gain, rise, left, right, reach, ctx.gamma), None


class _MixLeaves(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, split_KST: Tensor, logit_KET: Tensor, gamma: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        rise, left, right, reach = _descend(split_KST, gamma)
        v_KET = reach[:, split_KST.shape[1] :]
        closed_KET = v_KET == 0
        power_KET = logit_KET.masked_fill(closed_KET, -torch.inf)
        power_KET.sub_(power_KET.amax((0, 1))).exp_()
        part_KET = v_KET * power_KET
        weight_ET = part_KET.sum(0)
        total_T = weight_ET.sum(0)
        weight_ET.div_(total_T)
        log_KET = v_KET.clamp_min(torch.finfo(v_KET.dtype).tiny).log_()
        entropy = -(v_KET * log_KET).sum()
        open_ET = ~closed_KET.all(0)
        ctx.save_for_backward(rise, left, right, reach, power_KET, part_KET, log_KET, weight_ET, total_T)
        ctx.gamma = gamma
        ctx.mark_non_differentiable(open_ET)
        return weight_ET, v_KET.sum((0, 2)), entropy, open_ET

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        rise, left, right, reach, power_KET, part_KET, log_KET, weight_ET, total_T = ctx.saved_tensors
        grad_weight_ET, grad_mass_E, grad_entropy = grads[:3]
        grad_part_ET = (grad_weight_ET - (grad_weight_ET * weight_ET).sum(0)).div_(total_T)
        gain = torch.empty_like(reach)
        grad_v_KET = gain[:, rise.shape[1] :]
        torch.mul(power_KET, grad_part_ET, out=grad_v_KET)
        # d(-v log v) = -(log v + 1); where v is 0 it is finite, and the splits above have no slope to pass it to.
        grad_v_KET.addcmul_(log_KET, -grad_entropy).add_((grad_mass_E - grad_entropy).unsqueeze(1))
        return _ascend(gain, rise, left, right, reach, ctx.gamma), part_KET * grad_part_ET, None
