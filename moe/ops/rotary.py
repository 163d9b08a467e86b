"""Rotary position embedding (arXiv:2104.09864) in the half-rotation layout that Hugging Face models use.

The pair (x_i, x_{i + d/2}) at position p turns by the angle p * theta^(-2 i / d). Its transpose, which is its gradient,
turns back by the same angle.

Shape suffixes: B sequences, T positions, H heads, d head width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class Rotary(NamedTuple):
    """cos and sin of every position's angles, each (B or 1, 1, T, d / 2) fp32."""

    cos: Tensor
    sin: Tensor


def rotary_angles(position_BT: Tensor, head_dim: int, theta: float) -> Rotary:
    """Angles of the positions (B or 1, T) int64.

    They are fp32 whatever the model computes in: in bf16 neighbouring positions beyond 256 would coincide.
    """
    exponent = torch.arange(0, head_dim, 2, device=position_BT.device, dtype=torch.int64).float() / head_dim
    angle_B1Td = (position_BT.float().unsqueeze(-1) * (1.0 / theta**exponent)).unsqueeze(1)
    return Rotary(angle_B1Td.cos(), angle_B1Td.sin())


def apply_rotary(x_BTHd: Tensor, rotary: Rotary) -> Tensor:
    """(B, T, H, d) heads as a projection gives them -> rotated (B, H, T, d), contiguous as attention wants them.

    Computed in fp32 at least, returned in the dtype of ``x_BTHd``.
    """
    wide_BTHd = x_BTHd.to(torch.promote_types(x_BTHd.dtype, torch.float32))
    # Outside of training the detour over an autograd function would cost more than the maths of a single token.
    rotate = _rotate_heads if torch.is_grad_enabled() else _rotated
    return rotate(wide_BTHd, rotary.cos, rotary.sin).to(x_BTHd.dtype)


def apply_rotary_reference(x_BTHd: Tensor, rotary: Rotary) -> Tensor:
    """The same as the formula says."""
    first, second = x_BTHd.transpose(1, 2).chunk(2, -1)
    cos, sin = rotary
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def _turn(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor, direction: int) -> None:
    half = x.shape[-1] // 2
    first, second, out_first, out_second = x[..., :half], x[..., half:], out[..., :half], out[..., half:]
    torch.mul(first, cos, out=out_first)
    out_first.addcmul_(second, sin, value=-direction)
    torch.mul(second, cos, out=out_second)
    out_second.addcmul_(first, sin, value=direction)


def _rotated(x_BTHd: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    x_BHTd = x_BTHd.transpose(1, 2)
    out_BHTd = torch.empty(x_BHTd.shape, dtype=x_BTHd.dtype, device=x_BTHd.device)
    _turn(x_BHTd, cos, sin, out_BHTd, 1)
    return out_BHTd


class _RotateHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BTHd: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x_BTHd, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BHTd: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        grad_BTHd = torch.empty_like(grad_BHTd.transpose(1, 2), memory_format=torch.contiguous_format)
        _turn(grad_BHTd, cos, sin, grad_BTHd.transpose(1, 2), -1)
        return grad_BTHd, None, None


# Function.apply is untyped; this says what comes back.
_rotate_heads: Callable[[Tensor, Tensor, Tensor], Tensor] = _RotateHeads.apply
