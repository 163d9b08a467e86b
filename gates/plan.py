"""The routing plan: which expert sees which token, with what weight.

A plan is CSR by token, so fixed k, variable k, expert choice, dense probing and dropped tokens are one type.

Shape suffixes: T tokens, E experts, N chosen (token, expert) pairs, K experts per token.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum

import torch
from torch import Tensor


class PlanKind(Enum):
    """What a dispatcher may assume beyond the CSR arrays, which are valid for every kind."""

    SPARSE = "sparse"
    DENSE = "dense"  # every token goes to every expert, N = T * E, experts in index order
    SLOTS = "slots"  # as dense, but experts see the plan's slots instead of tokens


@dataclass(frozen=True)
class Slots:
    """Rows for experts that are mixtures of tokens (Soft MoE).

    Attributes:
        dispatch_TS: (T, S) differentiable weight of each token in each slot; a slot's add up to 1.
        combine_TS: (T, S) differentiable weight of each slot's output in each token's.
        slots_per_expert: S / E; an expert's slots are neighbours.
    """

    dispatch_TS: Tensor
    combine_TS: Tensor
    slots_per_expert: int

    def detach(self) -> Slots:
        return Slots(self.dispatch_TS.detach(), self.combine_TS.detach(), self.slots_per_expert)


@dataclass(frozen=True)
class RoutingPlan:
    """Chosen (token, expert) pairs in canonical order: by token, then by rank within the token.

    Attributes:
        row_ptr_T1: (T + 1,) int64; token t owns pairs ``row_ptr[t]:row_ptr[t + 1]``.
        expert_N: (N,) int64 expert index of each pair; no expert twice in one row.
        weight_N: (N,) fp32 (fp64 where all of the gate is), differentiable combine weight of each pair.
        num_experts: E.
        load_E: (E,) int64 kept pairs of each expert on this rank; equals ``bincount(expert_N)``.
        offered_E: (E,) int64 pairs of each expert before capacity dropped any.
        uniform_k: K when every row has exactly K pairs, else None.
        residual_T: (T,) fp32 weight of the identity path (y += residual * x), or None for no such path.
        kind: see :class:`PlanKind`.
        before_drop: the selection before pairs were dropped, detached; None when no pair was.
        kept_M: (M,) bool, which of the M pairs of ``before_drop`` this plan keeps; a replay repeats the drop with it.
        undispatched: pairs with experts that the gate itself computes (zero-computation experts), numbered from 0;
            None for a gate without. They count in no load.
        slots: what experts see where ``kind`` is SLOTS; the pairs then say how much of each expert a token gets.
    """

    row_ptr_T1: Tensor
    expert_N: Tensor
    weight_N: Tensor
    num_experts: int
    load_E: Tensor
    offered_E: Tensor
    uniform_k: int | None = None
    residual_T: Tensor | None = None
    kind: PlanKind = PlanKind.SPARSE
    before_drop: RoutingPlan | None = None
    kept_M: Tensor | None = None
    undispatched: RoutingPlan | None = None
    slots: Slots | None = None

    @property
    def num_tokens(self) -> int:
        return self.row_ptr_T1.numel() - 1

    @property
    def num_pairs(self) -> int:
        return self.expert_N.numel()

    @property
    def dropped(self) -> Tensor:
        """0-d int64: pairs that capacity dropped."""
        return (self.offered_E - self.load_E).sum()

    def token_N(self) -> Tensor:
        """(N,) int64 token index of each pair."""
        token_T = torch.arange(self.num_tokens, device=self.row_ptr_T1.device)
        if self.uniform_k is not None:
            return token_T.repeat_interleave(self.uniform_k)
        return token_T.repeat_interleave(self.row_ptr_T1.diff(), output_size=self.num_pairs)

    def expert_order_N(self) -> Tensor:
        """(N,) int64 stable permutation that sorts the pairs by expert, tokens ascending within an expert."""
        return torch.argsort(self.expert_N, stable=True)

    def pick(self, value_TE: Tensor) -> Tensor:
        """(N,) the entry of ``value_TE`` (T, E) for each pair; differentiable."""
        if self.uniform_k is not None and self.num_tokens:
            return value_TE.gather(1, self.expert_N.view(self.num_tokens, -1)).reshape(-1)
        return value_TE[self.token_N(), self.expert_N]

    def sum_rows(self, value_N: Tensor) -> Tensor:
        """(T,) sum over the pairs of each token; differentiable, 0 for a token without pairs."""
        return value_N.new_zeros(self.num_tokens).index_add(0, self.token_N(), value_N)

    def softmax_rows(self, logit_N: Tensor) -> Tensor:
        """(N,) softmax over the pairs of each token; differentiable, and no row can underflow as a whole."""
        # No other path for uniform rows: a replay, which may not know of them, must give the same bits.
        token_N = self.token_N()
        top_T = logit_N.new_full((self.num_tokens,), -torch.inf).scatter_reduce(0, token_N, logit_N.detach(), "amax")
        mass_N = (logit_N - top_T[token_N]).exp()
        return mass_N / self.sum_rows(mass_N)[token_N]

    def dense_weight_TE(self) -> Tensor:
        """(T, E) weights with zeros where a token does not visit an expert. For tests and analysis, not for speed."""
        weight_TE = self.weight_N.new_zeros(self.num_tokens, self.num_experts)
        return weight_TE.index_put((self.token_N(), self.expert_N), self.weight_N)

    def detach(self) -> RoutingPlan:
        """The same plan without autograd history: what a replay (recompute, second pass) keeps."""
        residual_T = None if self.residual_T is None else self.residual_T.detach()
        undispatched = None if self.undispatched is None else self.undispatched.detach()
        slots = None if self.slots is None else self.slots.detach()
        return replace(
            self, weight_N=self.weight_N.detach(), residual_T=residual_T, undispatched=undispatched, slots=slots
        )

    def with_weight(self, weight_N: Tensor) -> RoutingPlan:
        """The same selection with other weights."""
        if weight_N.shape != self.expert_N.shape:
            raise ValueError(f"weight_N has shape {tuple(weight_N.shape)}, the plan has {self.num_pairs} pairs")
        return replace(self, weight_N=weight_N)

    @staticmethod
    def from_topk(expert_TK: Tensor, weight_TK: Tensor, num_experts: int, valid_T: Tensor | None = None) -> RoutingPlan:
        """Plan with K pairs for every valid token and none for padding.

        Args:
            expert_TK: (T, K) int64, distinct within a row.
            weight_TK: (T, K) differentiable weights.
            num_experts: E.
            valid_T: (T,) bool, False for padding; None means all valid.
        """
        num_tokens, k = expert_TK.shape
        if valid_T is not None and bool(valid_T.all()):
            valid_T = None
        if valid_T is None:
            row_ptr_T1 = torch.arange(num_tokens + 1, device=expert_TK.device) * k
            expert_N, weight_N = expert_TK.reshape(-1), weight_TK.reshape(-1)
        else:
            row_ptr_T1 = torch.zeros(num_tokens + 1, dtype=torch.int64, device=expert_TK.device)
            row_ptr_T1[1:] = torch.cumsum(valid_T.long() * k, 0)
            expert_N, weight_N = expert_TK[valid_T].reshape(-1), weight_TK[valid_T].reshape(-1)
        load_E = torch.bincount(expert_N, minlength=num_experts)
        return RoutingPlan(
            row_ptr_T1, expert_N, _at_least_fp32(weight_N), num_experts, load_E, load_E, k if valid_T is None else None
        )

    @staticmethod
    def from_mask(mask_TE: Tensor, weight_TE: Tensor, offered_E: Tensor | None = None) -> RoutingPlan:
        """Plan with any number of experts per token; pairs of a row stand in expert order.

        Args:
            mask_TE: (T, E) bool, True where the token visits the expert.
            weight_TE: (T, E) differentiable weights, read where the mask is True.
            offered_E: (E,) int64 load before drops; None when nothing was dropped.
        """
        num_tokens, num_experts = mask_TE.shape
        dense = num_tokens > 0 and bool(mask_TE.all())
        if dense:
            row_ptr_T1 = torch.arange(num_tokens + 1, device=mask_TE.device) * num_experts
            expert_N = torch.arange(num_experts, device=mask_TE.device).repeat(num_tokens)
            weight_N = _at_least_fp32(weight_TE.reshape(-1))
            load_E = torch.full((num_experts,), num_tokens, device=mask_TE.device)
        else:
            row_ptr_T1 = torch.zeros(num_tokens + 1, dtype=torch.int64, device=mask_TE.device)
            row_ptr_T1[1:] = torch.cumsum(mask_TE.sum(1), 0)
            token_N, expert_N = mask_TE.nonzero(as_tuple=True)
            weight_N = _at_least_fp32(weight_TE[token_N, expert_N])
            load_E = torch.bincount(expert_N, minlength=num_experts)
        return RoutingPlan(
            row_ptr_T1,
            expert_N,
            weight_N,
            num_experts,
            load_E,
            load_E if offered_E is None else offered_E,
            num_experts if dense else None,
            kind=PlanKind.DENSE if dense else PlanKind.SPARSE,
        )


def keep_pairs(plan: RoutingPlan, keep_N: Tensor) -> RoutingPlan:
    """Drop the pairs where ``keep_N`` (N,) bool is False; ``offered_E`` and ``before_drop`` still have them."""
    expert_N = plan.expert_N[keep_N]
    if expert_N.numel() == plan.num_pairs:
        return plan
    kept_before_N1 = torch.zeros(plan.num_pairs + 1, dtype=torch.int64, device=keep_N.device)
    kept_before_N1[1:] = torch.cumsum(keep_N.long(), 0)
    before_drop: RoutingPlan | None
    if plan.kept_M is None:
        before_drop, kept_M = plan.detach(), keep_N
    else:  # dropped from before: say it in terms of the first selection
        before_drop, kept_M = plan.before_drop, plan.kept_M.clone()
        kept_M[plan.kept_M] = keep_N
    return replace(
        plan,
        row_ptr_T1=kept_before_N1[plan.row_ptr_T1],
        expert_N=expert_N,
        weight_N=plan.weight_N[keep_N],
        load_E=torch.bincount(expert_N, minlength=plan.num_experts),
        uniform_k=None,
        kind=PlanKind.SPARSE,
        before_drop=before_drop,
        kept_M=kept_M,
    )


def insert_padding(plan: RoutingPlan, valid_T: Tensor) -> RoutingPlan:
    """Plan of the valid tokens alone -> plan of all T tokens, in which padding has empty rows.

    Args:
        plan: over the tokens where ``valid_T`` is True, in order.
        valid_T: (T,) bool.
    """
    size_T = torch.zeros(valid_T.numel() + 1, dtype=torch.int64, device=valid_T.device)
    size_T[1:][valid_T] = plan.row_ptr_T1.diff()
    residual_T = None
    if plan.residual_T is not None:
        residual_T = plan.residual_T.new_zeros(valid_T.numel()).masked_scatter(valid_T, plan.residual_T)
    slots = plan.slots
    if slots is not None:
        dispatch_TS, combine_TS = (
            part.new_zeros(valid_T.numel(), part.shape[1]).index_put((valid_T,), part)
            for part in (slots.dispatch_TS, slots.combine_TS)
        )
        slots = Slots(dispatch_TS, combine_TS, slots.slots_per_expert)
    return replace(
        plan,
        row_ptr_T1=size_T.cumsum(0),
        uniform_k=None,
        kind=PlanKind.SPARSE if slots is None else PlanKind.SLOTS,
        slots=slots,
        residual_T=residual_T,
        before_drop=None if plan.before_drop is None else insert_padding(plan.before_drop, valid_T),
        undispatched=None if plan.undispatched is None else insert_padding(plan.undispatched, valid_T),
    )


def remove_padding(plan: RoutingPlan, valid_T: Tensor) -> RoutingPlan:
    """Plan of all T tokens -> plan of the valid ones alone, in order: undoes :func:`insert_padding`.

    Raises:
        ValueError: a token of padding has pairs.
    """
    size_T = plan.row_ptr_T1.diff()
    if bool(size_T[~valid_T].any()):
        raise ValueError("the plan routes tokens that are padding")
    size_U = size_T[valid_T]
    row_ptr_U1 = torch.zeros(size_U.numel() + 1, dtype=torch.int64, device=size_U.device)
    torch.cumsum(size_U, 0, out=row_ptr_U1[1:])
    slots = plan.slots
    if slots is not None:
        slots = Slots(slots.dispatch_TS[valid_T], slots.combine_TS[valid_T], slots.slots_per_expert)
    return replace(
        plan,
        row_ptr_T1=row_ptr_U1,
        slots=slots,
        residual_T=None if plan.residual_T is None else plan.residual_T[valid_T],
        before_drop=None if plan.before_drop is None else remove_padding(plan.before_drop, valid_T),
        undispatched=None if plan.undispatched is None else remove_padding(plan.undispatched, valid_T),
    )


def apply_permutation(plan: RoutingPlan, expert_of_E: Tensor) -> RoutingPlan:
    """Relabel experts: what went to e goes to ``expert_of_E[e]``. The inverse permutation undoes it.

    Args:
        expert_of_E: (E,) int64 permutation of 0..E-1.

    Raises:
        ValueError: experts of the plan see slots, whose order is that of the experts.
    """
    if plan.slots is not None:
        raise ValueError("a plan whose experts see slots cannot be permuted")
    load_E, offered_E = torch.empty_like(plan.load_E), torch.empty_like(plan.offered_E)
    load_E[expert_of_E] = plan.load_E
    offered_E[expert_of_E] = plan.offered_E
    before_drop = None if plan.before_drop is None else apply_permutation(plan.before_drop, expert_of_E)
    return replace(
        plan,
        expert_N=expert_of_E[plan.expert_N],
        load_E=load_E,
        offered_E=offered_E,
        before_drop=before_drop,
        kind=PlanKind.SPARSE,  # experts no longer stand in index order
    )


def _at_least_fp32(weight_N: Tensor) -> Tensor:
    return weight_N if weight_N.dtype == torch.float64 else weight_N.float()
