"""Grouped matrix product: each expert's rows times that expert's matrix.

``torch.nn.functional.grouped_mm`` is one kernel in bf16 on CUDA devices of compute capability 9.0 and later, and a loop
of GEMMs elsewhere; the reference is a loop in Python. On CPU both call the same GEMM, give the same bits and take the
same time: one matrix for gate and up, or a hand-written backward for the whole network, was measured to be no faster.

Shape suffixes: E experts, N rows sorted by expert, D columns in, F columns out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moe.errors import ConfigError

ExpertOp = Literal["grouped_mm", "loop", "native"]
"""Names of implementations; "native" is only chosen for packed experts, see :mod:`moe.ops.packed_experts`."""
_ALIGNMENT_BYTES = 16


class ExpertOpChoice(NamedTuple):
    """Which implementation multiplies, and why."""

    name: ExpertOp
    reason: str


def choose_expert_op(
    requested: Literal["auto", "grouped_mm", "loop"], device: torch.device, dtype: torch.dtype, widths: tuple[int, ...]
) -> ExpertOpChoice:
    """Pick the implementation once, for matrices whose sides are ``widths``.

    Args:
        requested: "auto" takes grouped_mm wherever it runs.
        device: where the experts live.
        dtype: compute dtype.
        widths: D and F; a row of each must be a multiple of 16 bytes for grouped_mm.

    Raises:
        ConfigError: grouped_mm was asked for by name and cannot run.
    """
    if requested == "loop":
        return ExpertOpChoice("loop", "asked for by name")
    obstacle = _grouped_mm_obstacle(device, dtype, widths)
    if obstacle is None:
        reason = "asked for by name" if requested == "grouped_mm" else f"runs on {device.type} in {_name(dtype)}"
        return ExpertOpChoice("grouped_mm", reason)
    if requested == "grouped_mm":
        raise ConfigError([f"model.moe.expert_op: grouped_mm cannot run: {obstacle}; use auto or loop"])
    return ExpertOpChoice("loop", f"grouped_mm cannot run: {obstacle}")


def _grouped_mm_obstacle(device: torch.device, dtype: torch.dtype, widths: tuple[int, ...]) -> str | None:
    if not hasattr(F, "grouped_mm"):
        return f"torch {torch.__version__} does not have it"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"it does not take {_name(dtype)}"
    if device.type not in ("cpu", "cuda"):
        return f"it does not run on {device.type}"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return "it needs compute capability 8.0"
    odd = [width for width in widths if width * dtype.itemsize % _ALIGNMENT_BYTES]
    if odd:
        step = _ALIGNMENT_BYTES // dtype.itemsize
        return f"width {odd[0]} is not a multiple of {step} ({_ALIGNMENT_BYTES} bytes of {_name(dtype)})"
    return None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def grouped_mm(x_ND: Tensor, w_EDF: Tensor, load_E: Tensor, op: ExpertOp) -> Tensor:
    """(N, D) rows, the first ``load_E[0]`` of them times ``w_EDF[0]`` and so on -> (N, F).

    Args:
        x_ND: rows sorted by expert; ``load_E`` must sum to N, so no row is left unwritten.
        w_EDF: one matrix per expert, in the dtype of the rows.
        load_E: (E,) int64 rows of each expert, zeros included; an expert without rows gets a zero gradient.
        op: from :func:`choose_expert_op`.
    """
    if op == "loop":
        return grouped_mm_reference(x_ND, w_EDF, load_E)
    y_NF = F.grouped_mm(x_ND, w_EDF, offs=load_E.cumsum(0, dtype=torch.int32))
    if y_NF.requires_grad:
        on_gradient: Callable[[Callable[[Tensor], Tensor]], object] = y_NF.register_hook
        on_gradient(_with_strides)
    return y_NF


def _with_strides(grad_NF: Tensor) -> Tensor:
    # The backward kernel refuses expanded gradients, which a plain .sum() makes; an empty one counts as contiguous.
    if grad_NF.is_contiguous() and grad_NF.numel():
        return grad_NF
    return grad_NF.clone(memory_format=torch.contiguous_format)


def grouped_mm_reference(x_ND: Tensor, w_EDF: Tensor, load_E: Tensor) -> Tensor:
    """The same product, one expert after another. Zero rows are multiplied too, so every matrix gets a gradient."""
    return torch.cat([x_nD @ w_DF for x_nD, w_DF in zip(x_ND.split_with_sizes(load_E.tolist()), w_EDF, strict=True)])
