"""Matrix products whose rows do not depend on the rows beside them.

A GEMM library picks its kernel, and with it the order in which products are added, by the number of rows. So a token's
logits change in their last bits with what else is in the batch, and a seed gives another text beside other requests.
Inside :class:`BatchInvariant` every product of rows with a matrix is computed in tiles of one fixed number of rows,
the last one filled up with zeros: one shape, one kernel, and a row's place in its tile is of no account. That last
property is the library's, not ours: :func:`tile_is_invariant` tests it on this machine.

What is gained is exactness, what is lost is time: few rows are computed as a full tile. (The idea of fixing the
reduction instead of the batch: He et al., "Defeating Nondeterminism in LLM Inference", 2025.)

Shape suffixes: M rows, K inner width, N columns, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

TILE = 16
_VECTOR = 64  # elements; more than any machine's vector of the narrowest dtype that is computed with
_aten = torch.ops.aten


def tiled_mm(x_MK: Tensor, product: Callable[[Tensor], Tensor]) -> Tensor:
    """``product`` of (M, K) rows, at most ``TILE`` at a time and always on ``TILE`` rows."""
    missing = -x_MK.shape[0] % TILE
    padded = F.pad(x_MK, (0, 0, 0, missing)) if missing else x_MK
    tiles = [product(tile) for tile in padded.split(TILE)]
    return (tiles[0] if len(tiles) == 1 else torch.cat(tiles))[: x_MK.shape[0]]


def _mm(x_MK: Tensor, w_KN: Tensor) -> Tensor:
    if not x_MK.shape[0]:
        return x_MK.new_empty(0, w_KN.shape[1])
    return tiled_mm(x_MK, lambda tile: _aten.mm.default(tile, w_KN))


def _linear(x: Tensor, w_NK: Tensor, bias: Tensor | None = None) -> Tensor:
    y = _mm(x.reshape(-1, x.shape[-1]), w_NK.t()).view(*x.shape[:-1], w_NK.shape[0])
    return y if bias is None else y + bias


def _addmm(bias: Tensor, x_MK: Tensor, w_KN: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    return beta * bias + alpha * _mm(x_MK, w_KN)


def _grouped_mm(x_MK: Tensor, w_EKN: Tensor, offs: Tensor | None = None, *_: Any, **__: Any) -> Tensor:
    if offs is None or x_MK.dim() != 2:
        raise NotImplementedError("only rows sorted by expert are grouped here")
    ends = offs.tolist()
    parts = [_mm(x_MK[a:b], w_EKN[e]) for e, (a, b) in enumerate(zip([0, *ends], ends, strict=False)) if b > a]
    return torch.cat(parts) if parts else x_MK.new_empty(0, w_EKN.shape[2])


def _matmul(x: Tensor, w: Tensor) -> Tensor:
    if w.dim() != 2 or x.dim() < 2:
        return _aten.matmul.default(x, w)
    return _mm(x.reshape(-1, x.shape[-1]), w).view(*x.shape[:-1], w.shape[1])


def _whole_vectors(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``function`` of every element, none of them in a vector loop's scalar tail, which rounds otherwise."""

    def computed(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        missing = -x.numel() % _VECTOR
        if not missing:
            return function(x.contiguous(), *args, **kwargs)
        return function(F.pad(x.reshape(-1), (0, missing)), *args, **kwargs)[: x.numel()].view(x.shape)

    return computed


_TRANSCENDENTAL = [
    getattr(_aten, name).default
    for name in ("silu", "sigmoid", "exp", "log", "tanh", "gelu", "softplus", "log_sigmoid", "erf")
]


class BatchInvariant(TorchDispatchMode):
    """While it is entered, ``linear``, ``mm``, ``addmm``, ``matmul`` and ``grouped_mm`` work in fixed tiles.

    Transcendental functions work on whole vectors.
    """

    _replaced: Mapping[Any, Callable[..., Tensor]] = {
        _aten.mm.default: _mm,
        _aten.linear.default: _linear,
        _aten.addmm.default: _addmm,
        _aten.matmul.default: _matmul,
        _aten._grouped_mm.default: _grouped_mm,
        **{op: _whole_vectors(op) for op in _TRANSCENDENTAL},
    }

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return self._replaced.get(func, func)(*args, **(kwargs or {}))


def tile_is_invariant(width: int, columns: int, dtype: torch.dtype, device: torch.device | str = "cpu") -> bool:
    """Whether a row's product is the same bits at every place of a tile, whatever the other rows are."""
    rng = torch.Generator(device).manual_seed(0)
    w_KN = torch.randn(width, columns, generator=rng, device=device).to(dtype)
    x_K = torch.randn(width, generator=rng, device=device).to(dtype)
    wanted_N = _aten.mm.default(F.pad(x_K[None], (0, 0, 0, TILE - 1)), w_KN)[0]
    for place in range(TILE):
        tile_MK = torch.randn(TILE, width, generator=rng, device=device).to(dtype)
        tile_MK[place] = x_K
        if not torch.equal(_aten.mm.default(tile_MK, w_KN)[place], wanted_N):
            return False
    return True
