"""Experts: many SwiGLU feed-forward networks of one shape, held as stacked weights.

Shape suffixes: E experts held here, N rows sorted by expert, D width, F hidden width.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe.ops.grouped_mm import ExpertOp, choose_expert_op, grouped_mm
from moe.ops.packed_linear import Linear


class ExpertBank(nn.Module, ABC):
    """Experts' parameters, however they are laid out and whichever of the layer's experts are here."""

    @abstractmethod
    def op_choice(self, dtype: torch.dtype | None = None, device: torch.device | None = None) -> tuple[ExpertOp, str]:
        """(name, reason) of the op that multiplies rows of ``dtype`` on ``device``; None means the weights'.

        Raises:
            ConfigError: grouped_mm was asked for by name and cannot run here.
        """

    @abstractmethod
    def expert_views(self, name: str, tensor: Tensor) -> Iterator[tuple[int | None, str, Tensor]]:
        """What is in parameter ``name`` of this module, or in optimizer state like it.

        Yields:
            (expert, name, view of its part): the expert's index among all of the layer, and the name that the parameter
            has where all experts are stacked (``w_gate_EDF``). State without an expert dimension (a 0-d step count)
            comes whole, with None for the expert. Checkpoints and initial weights find experts this way.
        """


class Experts(ExpertBank):
    """E SwiGLU networks (arXiv:2002.05202): ``y = (silu(x @ w_gate) * (x @ w_up)) @ w_down``, without biases.

    The weights may be of another dtype than the rows (fp32 masters); they are cast to the rows' dtype.

    Args:
        num_experts: E.
        dim: D.
        hidden_dim: F.
        op: how stacked matrices are multiplied; see :func:`moe.ops.grouped_mm.choose_expert_op`.
        device: where the weights are; "meta" for a bank that ``parallel`` is about to spread over ranks.
    """

    def __init__(
        self,
        num_experts: int,
        dim: int,
        hidden_dim: int,
        op: Literal["auto", "grouped_mm", "loop"] = "auto",
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.num_experts, self.dim, self.hidden_dim, self.requested_op = num_experts, dim, hidden_dim, op
        self.w_gate_EDF = nn.Parameter(torch.empty(num_experts, dim, hidden_dim, device=device))
        self.w_up_EDF = nn.Parameter(torch.empty(num_experts, dim, hidden_dim, device=device))
        self.w_down_EFD = nn.Parameter(torch.empty(num_experts, hidden_dim, dim, device=device))
        self._choices: dict[tuple[torch.device, torch.dtype], tuple[ExpertOp, str]] = {}
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weights as nn.Linear has them, from torch's global generator."""
        for weight, fan_in in (
            (self.w_gate_EDF, self.dim),
            (self.w_up_EDF, self.dim),
            (self.w_down_EFD, self.hidden_dim),
        ):
            nn.init.uniform_(weight, -1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in))

    def op_choice(self, dtype: torch.dtype | None = None, device: torch.device | None = None) -> tuple[ExpertOp, str]:
        """See :meth:`ExpertBank.op_choice`."""
        key = (device or self.w_gate_EDF.device, dtype or self.w_gate_EDF.dtype)
        if key not in self._choices:
            self._choices[key] = choose_expert_op(self.requested_op, *key, (self.dim, self.hidden_dim))
        return self._choices[key]

    @property
    def op(self) -> str:
        """Name of the op for rows in the weights' dtype."""
        return self.op_choice()[0]

    @property
    def op_reason(self) -> str:
        """Why that op was chosen."""
        return self.op_choice()[1]

    def forward(self, rows_ND: Tensor, load_E: Tensor) -> Tensor:
        """(N, D) rows sorted by expert, ``load_E[e]`` of them for expert e -> (N, D).

        An expert without rows still takes part in autograd: its gradient exists and is zero.

        Raises:
            ValueError: ``load_E`` has another length than E.
        """
        if load_E.shape != (self.num_experts,):
            raise ValueError(f"load_E has shape {tuple(load_E.shape)}, there are {self.num_experts} experts")
        weights = (self.w_gate_EDF, self.w_up_EDF, self.w_down_EFD)
        return swiglu_experts(rows_ND, weights, load_E, self.op_choice(rows_ND.dtype)[0])

    def expert_views(self, name: str, tensor: Tensor) -> Iterator[tuple[int | None, str, Tensor]]:
        """Parts of parameter ``name``, or of optimizer state like it; see :meth:`ExpertBank.expert_views`."""
        if tensor.dim() == 0:
            yield None, name, tensor
            return
        for expert in range(self.num_experts):
            yield expert, name, tensor[expert]

    def extra_repr(self) -> str:
        return f"num_experts={self.num_experts}, dim={self.dim}, hidden_dim={self.hidden_dim}, op={self.requested_op}"


def swiglu_experts(rows_ND: Tensor, weights: Sequence[Tensor], load_E: Tensor, op: ExpertOp) -> Tensor:
    """(N, D) rows sorted by expert through the stacked (w_gate_EDF, w_up_EDF, w_down_EFD) -> (N, D).

    Weights of another dtype than the rows are cast to it.
    """
    w_gate_EDF, w_up_EDF, w_down_EFD = (weight.to(rows_ND.dtype) for weight in weights)
    gate_NF = grouped_mm(rows_ND, w_gate_EDF, load_E, op)
    up_NF = grouped_mm(rows_ND, w_up_EDF, load_E, op)
    return grouped_mm(F.silu(gate_NF) * up_NF, w_down_EFD, load_E, op)


class SwiGLU(nn.Module):
    """One SwiGLU feed-forward network that every token visits: a dense block, or the shared experts of an MoE block.

    S shared experts of width F that are summed are exactly one network of width S * F.

    Attributes:
        linear: how projections are computed; see :func:`moe.ops.packed_linear.use_linear`.
    """

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.w_gate = nn.Linear(dim, hidden_dim, bias=False)
        self.w_up = nn.Linear(dim, hidden_dim, bias=False)
        self.w_down = nn.Linear(hidden_dim, dim, bias=False)
        self.linear: Linear = F.linear

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D), in the dtype of ``x``."""
        dtype = x.dtype
        hidden = F.silu(self.linear(x, self.w_gate.weight.to(dtype))) * self.linear(x, self.w_up.weight.to(dtype))
        return self.linear(hidden, self.w_down.weight.to(dtype))
