"""How an engine multiplies: the layout of experts' weights and who computes the products, decided once at start.

On the CPU experts are packed for few rows (:mod:`moe.ops.packed_experts`) and native ops compute them and the
projections where there are any (:mod:`moe.ops.native`); elsewhere everything stays as it was trained. In
batch-invariant mode experts are packed only for native ops, whose rows do not depend on each other: torch's products
are made so by tiles (:mod:`moe.ops.batch_invariant`), which know the layout of training.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moe.ops.native import NativeOps, choose_native_ops_for
from moe.ops.packed_experts import pack_experts
from moe.ops.packed_linear import row_linear, use_linear
from moe.transformer import Transformer


@dataclass(frozen=True)
class Products:
    """What :func:`choose_products` chose.

    Attributes:
        native: what was asked for; see :func:`choose_products`.
        ops: native ops, or None: torch computes.
        packed: experts are packed.
        batch_invariant: no row's result depends on the rows beside it.
        reason: why native ops compute, or do not.
    """

    native: bool | None
    ops: NativeOps | None
    packed: bool
    batch_invariant: bool
    reason: str

    def prepare(self, model: Transformer) -> None:
        """Let ``model`` compute this way from now on. Once packed, it cannot be saved or trained."""
        if self.packed:
            pack_experts(model, self.native, batch_invariant=self.batch_invariant)
        if self.ops is not None:
            use_linear(model, row_linear(self.ops, batch_invariant=self.batch_invariant))


def choose_products(
    native: bool | None, dtype: torch.dtype, device: torch.device | str, *, batch_invariant: bool = False
) -> Products:
    """How to compute in ``dtype`` on ``device``.

    Args:
        native: whether native ops compute; None: where there are some.

    Raises:
        UserError: ``native`` is True and they cannot.
    """
    found = choose_native_ops_for(dtype, device, native)
    packed = torch.device(device).type == "cpu" and (found.ops is not None or not batch_invariant)
    return Products(native, found.ops, packed, batch_invariant, found.reason)
