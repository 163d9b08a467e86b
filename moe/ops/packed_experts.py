"""Experts laid out for generating text: few rows for each of many experts, so reading weights is what takes time.

Training's layout (stacked (E, D, F) matrices, see :mod:`moe.experts`) suits many rows. Here gate and up projection are
one matrix, and each matrix stands as (columns out, columns in), so that ``W @ x^T`` reads it once from front to back;
experts without rows are not looked at. Reference: :func:`moe.experts.swiglu_experts` on the weights that were packed.

Shape suffixes: E experts, N rows sorted by expert, n rows of one expert, D width, F hidden width, G = 2 F.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe.experts import ExpertBank, Experts
from moe.ops.grouped_mm import ExpertOp


class PackedExperts(ExpertBank):
    """The weights of an :class:`moe.experts.Experts`, for inference only.

    Args:
        experts: is emptied while it is packed, so that only one expert is held twice.
    """

    def __init__(self, experts: Experts) -> None:
        super().__init__()
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

    def op_choice(self, dtype: torch.dtype | None = None, device: torch.device | None = None) -> tuple[ExpertOp, str]:
        """See :meth:`ExpertBank.op_choice`."""
        return "loop", "weights are packed for generating text"

    def expert_views(self, name: str, tensor: Tensor) -> Iterator[tuple[int | None, str, Tensor]]:
        """Packed weights are never saved."""
        raise NotImplementedError("packed experts cannot be saved; save the model before packing it")

    def forward(self, rows_ND: Tensor, load_E: Tensor) -> Tensor:
        """(N, D) rows sorted by expert, ``load_E[e]`` of them for expert e -> (N, D)."""
        y_ND = torch.empty_like(rows_ND)
        start = 0
        for expert, count in enumerate(load_E.tolist()):
            if count:
                stop = start + count
                y_ND[start:stop] = self._expert(expert, rows_ND[start:stop])
                start = stop
        return y_ND

    def _expert(self, expert: int, x_nD: Tensor) -> Tensor:
        hidden_Gn = self.w_gate_up_EGD[expert] @ x_nD.t()
        gate_Fn, up_Fn = hidden_Gn.split(self.hidden_dim)
        return (self.w_down_EDF[expert] @ F.silu(gate_Fn).mul_(up_Fn)).t()


def pack_experts(model: nn.Module) -> None:
    """Pack every bank of plain experts in ``model`` where it stands."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, Experts):
                setattr(module, name, PackedExperts(child))
