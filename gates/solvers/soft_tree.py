"""Leaf probabilities of soft decision trees with smooth-step splits, and their gradients, level by level.

Hazimeh et al., "The Tree Ensemble Layer", ICML 2020 (arXiv:2002.07772). Trees are heaps: node i has children 2i + 1 and
2i + 2, nodes 0 to E - 2 split, nodes E - 1 to 2E - 2 are the leaves, in order. So every number of leaves has a tree.

Nodes stand before tokens, so that what a level computes lies together in memory.

Shape suffixes: ... any leading dimensions, E leaves, S = E - 1 splits, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

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


def leaf_probabilities_reference(split: Tensor, gamma: float) -> Tensor:
    """The same, leaf by leaf from its path; autograd finds the gradients."""
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


def _levels(splits: int) -> Iterator[tuple[slice, slice, slice]]:
    """Splits of each level, their left children and their right ones, from the root on."""
    first, width = 0, 1
    while first < splits:
        end = min(first + width, splits)
        yield slice(first, end), slice(2 * first + 1, 2 * end + 1, 2), slice(2 * first + 2, 2 * end + 2, 2)
        first, width = first + width, 2 * width


def _rise(split: Tensor, gamma: float) -> Tensor:
    return (split / gamma).add_(0.5).clamp_(0, 1)


def _step(rise: Tensor) -> Tensor:
    return (3 - 2 * rise).mul_(rise).mul_(rise)


class _LeafProbabilities(torch.autograd.Function):
    """Each level costs two products forward and three backward, in place; autograd would keep and copy each level."""

    @staticmethod
    def forward(ctx: Any, split: Tensor, gamma: float) -> Tensor:
        splits = split.shape[-2]
        rise = _rise(split, gamma)
        left, right = _step(rise), _step(1 - rise)
        reach = split.new_ones(*split.shape[:-2], 2 * splits + 1, split.shape[-1])
        for here, to_left, to_right in _levels(splits):
            torch.mul(reach[..., here, :], left[..., here, :], out=reach[..., to_left, :])
            torch.mul(reach[..., here, :], right[..., here, :], out=reach[..., to_right, :])
        ctx.save_for_backward(rise, left, right, reach)
        ctx.gamma = gamma
        return reach[..., splits:, :].clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        rise, left, right, reach = ctx.saved_tensors
        splits = rise.shape[-2]
        # The gradient of a node is that of its probability: what its leaves would gain.
        gain = torch.empty_like(reach)
        gain[..., splits:, :] = grads[0]
        difference = torch.empty_like(rise)
        for here, to_left, to_right in reversed(list(_levels(splits))):
            torch.mul(gain[..., to_left, :], left[..., here, :], out=gain[..., here, :])
            gain[..., here, :].addcmul_(gain[..., to_right, :], right[..., here, :])
            torch.sub(gain[..., to_left, :], gain[..., to_right, :], out=difference[..., here, :])
        slope = (1 - rise).mul_(rise).mul_(6 / ctx.gamma)
        return difference.mul_(reach[..., :splits, :]).mul_(slope), None
