"""Dense projections (attention, the output head) of few rows at the speed of reading their weights.

Reference: :func:`torch.nn.functional.linear`. Weights stay as ``nn.Linear`` holds them.

Shape suffixes: D width, O outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch.nn.functional as F
from torch import Tensor, nn

from moe.ops.native import NativeOps, runs_native

Linear: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""((..., D) rows, (O, D) weights) -> (..., O): how a module computes its projections; ``F.linear`` is one."""


def row_linear(ops: NativeOps, *, batch_invariant: bool = False) -> Linear:
    """A projection that is computed natively where that is possible and fast, and by torch otherwise.

    Args:
        ops: the native ops.
        batch_invariant: many rows are computed natively too, so that a row's result is the same bits whatever rows
            stand beside it.
    """

    def linear(x: Tensor, w_OD: Tensor) -> Tensor:
        if not runs_native(x, w_OD):
            return F.linear(x, w_OD)
        rows_ND = x.reshape(-1, x.shape[-1])
        if not batch_invariant and rows_ND.shape[0] > ops.few_rows(x.dtype):
            return F.linear(x, w_OD)
        return ops.linear_rows(rows_ND, w_OD).view(*x.shape[:-1], w_OD.shape[0])

    return linear


def use_linear(model: nn.Module, linear: Linear) -> None:
    """Let every part of ``model`` that computes projections do so with ``linear``."""
    for module in model.modules():
        if "linear" in vars(module):  # a submodule of that name is not there
            module.linear = linear  # type: ignore[assignment]
