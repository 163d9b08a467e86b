"""Experts laid out for generating text: few rows for each of many experts, so reading weights is what takes time.

Training's layout (stacked (E, D, F) matrices, see :mod:`moe.experts`) suits many rows. Here gate and up projection are
one matrix, and each matrix stands as (columns out, columns in), so that ``W @ x^T`` reads it once from front to back;
experts without rows are not looked at. References: :func:`moe.experts.swiglu_experts` on the weights that were packed,
and :func:`packed_experts_reference` on the packed ones, which is also what computes where there are no native ops
(:mod:`moe.ops.native`). The native op is batch-invariant: a row's result does not depend on the other rows.

Shape suffixes: E experts, N rows sorted by expert, n rows of one expert, D width, F hidden width, G = 2 F.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe.experts import ExpertBank, Experts
from moe.ops.grouped_mm import ExpertOpChoice
from moe.ops.native import choose_native_ops_for, obstacle_to_native, runs_native


class PackedExperts(ExpertBank):
    """The weights of an :class:`moe.experts.Experts`, for inference only.

    Args:
        experts: is emptied while it is packed, so that only one expert is held twice.
        native: whether to compute with the native ops. None: where they are built or can be, which takes some ten
            seconds the first time; True: they must be there.
        batch_invariant: the native ops compute all rows. Otherwise they leave many rows an expert to torch, which is
            faster then, and a row's last bits depend on how many there are.

    Raises:
        UserError: ``native`` is True and there are no native ops.
    """

    def __init__(self, experts: Experts, native: bool | None = None, *, batch_invariant: bool = False) -> None:
        super().__init__()
        self.batch_invariant = batch_invariant
        self._native = choose_native_ops_for(experts.w_gate_EDF.dtype, experts.w_gate_EDF.device, native)
        self.num_experts, self.dim, self.hidden_dim = experts.num_experts, experts.dim, experts.hidden_dim
        like = experts.w_gate_EDF
        shape_EGD = (self.num_experts, 2 * self.hidden_dim, self.dim)
        self.w_gate_up_EGD = nn.Parameter(like.new_empty(shape_EGD), requires_grad=False)
        with torch.no_grad():
            self.w_gate_up_EGD[:, : self.hidden_dim] = experts.w_gate_EDF.transpose(1, 2)
            self.w_gate_up_EGD[:, self.hidden_dim :] = experts.w_up_EDF.transpose(1, 2)
            del experts.w_gate_EDF, experts.w_up_EDF
            self.w_down_EDF = nn.Parameter(experts.w_down_EFD.transpose(1, 2).contiguous(), requires_grad=False)
            del experts.w_down_EFD

    def op_choice(self, dtype: torch.dtype | None = None, device: torch.device | None = None) -> ExpertOpChoice:
        """See :meth:`ExpertBank.op_choice`."""
        dtype, device = dtype or self.w_down_EDF.dtype, device or self.w_down_EDF.device
        obstacle = obstacle_to_native(dtype, device) or (None if self._native.ops else self._native.reason)
        if obstacle:
            return ExpertOpChoice("loop", f"weights are packed for generating text; no native ops: {obstacle}")
        assert self._native.ops is not None
        limit = "" if self.batch_invariant else f", up to {self._native.ops.few_rows(dtype)} rows an expert"
        return ExpertOpChoice("native", self._native.reason + limit)

    def expert_views(self, name: str, tensor: Tensor) -> Iterator[tuple[int | None, str, Tensor]]:
        """Packed weights are never saved."""
        raise NotImplementedError("packed experts cannot be saved; save the model before packing it")

    def forward(self, rows_ND: Tensor, load_E: Tensor) -> Tensor:
        """(N, D) rows sorted by expert, ``load_E[e]`` of them for expert e -> (N, D)."""
        ops = self._native.ops
        if ops is not None and runs_native(rows_ND, self.w_gate_up_EGD, self.w_down_EDF):
            few = ops.few_rows(rows_ND.dtype)
            if self.batch_invariant or len(rows_ND) <= few or len(rows_ND) <= few * int(load_E.count_nonzero()):
                return ops.expert_mlp(rows_ND, self.w_gate_up_EGD, self.w_down_EDF, load_E)
        return packed_experts_reference(rows_ND, self.w_gate_up_EGD, self.w_down_EDF, load_E)


def packed_experts_reference(rows_ND: Tensor, w_gate_up_EGD: Tensor, w_down_EDF: Tensor, load_E: Tensor) -> Tensor:
    """(N, D) rows sorted by expert, ``load_E[e]`` of them for expert e -> (N, D), one expert after another."""
    y_ND = torch.empty_like(rows_ND)
    start = 0
    for expert, count in enumerate(load_E.tolist()):
        if count:
            x_nD = rows_ND[start : start + count]
            gate_Fn, up_Fn = (w_gate_up_EGD[expert] @ x_nD.t()).chunk(2)
            y_ND[start : start + count] = (w_down_EDF[expert] @ F.silu(gate_Fn).mul_(up_Fn)).t()
            start += count
    return y_ND


def pack_experts(model: nn.Module, native: bool | None = None, *, batch_invariant: bool = False) -> None:
    """Pack every bank of plain experts in ``model`` where it stands; options as in :class:`PackedExperts`."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, Experts):
                setattr(module, name, PackedExperts(child, native, batch_invariant=batch_invariant))
