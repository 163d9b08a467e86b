"""Grouped-query attention with rotary positions, and the contiguous key-value cache for generation.

Shape suffixes: B sequences, T new positions, S positions attended to, D width, H query heads, G key-value heads,
d head width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe.config import ModelConfig
from moe.ops.causal_attention import causal_attention, choose_attention_op
from moe.ops.packed_linear import Linear
from moe.ops.rms_norm import rms_norm
from moe.ops.rotary import Rotary, apply_rotary

Attend: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(q_BHTd, k_BGTd, v_BGTd) of the new positions -> (B, H, T, d) attention over everything before and including them."""


class RMSNorm(nn.Module):
    """Root-mean-square normalisation with a learned scale; see :func:`moe.ops.rms_norm.rms_norm`."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """(..., D) -> (..., D) in ``dtype``, or in that of ``x``."""
        return rms_norm(x, self.weight, self.eps, dtype)


class AttentionCache(Protocol):
    """Keys and values of positions that were computed before; decides how attention reads them.

    The contiguous :class:`KVCache` is one; a paged cache is another. A forward pass asks for ``positions`` once, calls
    ``attend`` once per layer, then ``advance``.
    """

    def positions(self, length: int) -> Tensor:
        """(B or 1, T) int64 positions of the next ``length`` tokens."""
        ...

    def attend(self, layer: int, q_BHTd: Tensor, k_BGTd: Tensor, v_BGTd: Tensor) -> Tensor:
        """Store the new keys and values of ``layer`` and attend over old and new ones, causally."""
        ...

    def advance(self, length: int) -> None:
        """Every layer has seen these ``length`` tokens; they are old ones from now on."""
        ...


class KVCache:
    """Contiguous cache for B sequences of equal length.

    Args:
        config: gives layers, heads and head width.
        batch: B.
        capacity: most positions; None means ``config.max_seq_len``.
        dtype, device: of the cached keys and values: the model's compute dtype and device.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch: int = 1,
        capacity: int | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.capacity = min(capacity or config.max_seq_len, config.max_seq_len)
        shape = (config.num_layers, batch, config.kv_heads, self.capacity, config.width_per_head)
        # Zeros, not uninitialised memory: nothing reads past `length`, but garbage must not look like data either.
        self._k_LBGSd = torch.zeros(shape, dtype=dtype, device=device)
        self._v_LBGSd = torch.zeros(shape, dtype=dtype, device=device)
        self.length = 0

    def positions(self, length: int) -> Tensor:
        """(1, T) positions of the next ``length`` tokens.

        Raises:
            ValueError: they do not fit.
        """
        if self.length + length > self.capacity:
            raise ValueError(f"cache holds {self.length} of {self.capacity} positions; {length} more do not fit")
        return torch.arange(self.length, self.length + length, device=self._k_LBGSd.device).unsqueeze(0)

    def attend(self, layer: int, q_BHTd: Tensor, k_BGTd: Tensor, v_BGTd: Tensor) -> Tensor:
        """See :meth:`AttentionCache.attend`."""
        past, new = self.length, q_BHTd.shape[2]
        end = past + new
        self._k_LBGSd[layer, :, :, past:end] = k_BGTd
        self._v_LBGSd[layer, :, :, past:end] = v_BGTd
        k_BGSd, v_BGSd = self._k_LBGSd[layer, :, :, :end], self._v_LBGSd[layer, :, :, :end]
        grouped = q_BHTd.shape[1] != k_BGTd.shape[1]
        if new == 1:
            return F.scaled_dot_product_attention(q_BHTd, k_BGSd, v_BGSd, enable_gqa=grouped)
        if past == 0:
            return F.scaled_dot_product_attention(q_BHTd, k_BGSd, v_BGSd, is_causal=True, enable_gqa=grouped)
        mask_TS = torch.ones(new, end, dtype=torch.bool, device=q_BHTd.device).tril_(past)
        return F.scaled_dot_product_attention(q_BHTd, k_BGSd, v_BGSd, attn_mask=mask_TS, enable_gqa=grouped)

    def advance(self, length: int) -> None:
        """See :meth:`AttentionCache.advance`."""
        self.length += length

    def truncate(self, length: int) -> None:
        """Forget all positions from ``length`` on."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot cut a cache of {self.length} positions to {length}")
        self.length = length


class Attention(nn.Module):
    """Causal self-attention with grouped key-value heads (arXiv:2305.13245) and optional QK-norm (Qwen3).

    Projections have no biases. Query head h reads key-value head ``h // (H / G)``.

    Attributes:
        linear: how projections are computed; see :func:`moe.ops.packed_linear.use_linear`.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim = config.width_per_head
        q_width, kv_width = config.num_heads * self.head_dim, config.kv_heads * self.head_dim
        self.wq = nn.Linear(config.dim, q_width, bias=False)
        self.wk = nn.Linear(config.dim, kv_width, bias=False)
        self.wv = nn.Linear(config.dim, kv_width, bias=False)
        self.wo = nn.Linear(q_width, config.dim, bias=False)
        self.q_norm = RMSNorm(self.head_dim, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(self.head_dim, config.norm_eps) if config.qk_norm else None
        self.linear: Linear = F.linear

    def forward(self, x_BTD: Tensor, rotary: Rotary, attend: Attend | None = None) -> Tensor:
        """(B, T, D) -> (B, T, D), in the dtype of the input.

        Args:
            x_BTD: normalised tokens.
            rotary: angles of their positions.
            attend: attention that knows earlier positions; None attends within ``x_BTD`` alone.
        """
        length, dtype = x_BTD.shape[1], x_BTD.dtype
        heads = (-1, self.head_dim)
        q_BTHd = self.linear(x_BTD, self.wq.weight.to(dtype)).unflatten(-1, heads)
        k_BTGd = self.linear(x_BTD, self.wk.weight.to(dtype)).unflatten(-1, heads)
        v_BTGd = self.linear(x_BTD, self.wv.weight.to(dtype)).unflatten(-1, heads)
        if self.q_norm is not None and self.k_norm is not None:
            q_BTHd, k_BTGd = self.q_norm(q_BTHd), self.k_norm(k_BTGd)
        q_BHTd = apply_rotary(q_BTHd, rotary)
        k_BGTd = apply_rotary(k_BTGd, rotary)
        v_BGTd = v_BTGd.transpose(1, 2)
        if attend is not None:
            out_BHTd = attend(q_BHTd, k_BGTd, v_BGTd)
        else:
            op = choose_attention_op(x_BTD.device, dtype, length, q_BHTd.requires_grad)
            out_BHTd = causal_attention(q_BHTd, k_BGTd, v_BGTd, op.name)
        return self.linear(out_BHTd.transpose(1, 2).flatten(2), self.wo.weight.to(dtype))
