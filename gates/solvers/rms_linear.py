"""A linear map of tokens divided by their root mean square, without ever making the divided tokens.

Dividing afterwards is the same and touches one number a token; autograd through ``rms_norm`` costs as much as the map
itself where the map is as narrow as a gate's.

Shape suffixes: T tokens, D width, O outputs.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_linear(x_TD: Tensor, weight_OD: Tensor, bias_O: Tensor) -> Tensor:
    """(O, T) ``weight @ (x / rms(x))^T + bias``: outputs stand before tokens."""
    result: Tensor = _RMSLinear.apply(x_TD, weight_OD, bias_O)
    return result


def rms_linear_reference(x_TD: Tensor, weight_OD: Tensor, bias_O: Tensor) -> Tensor:
    """The same by ``F.rms_norm`` and ``F.linear``."""
    return F.linear(F.rms_norm(x_TD, x_TD.shape[-1:]), weight_OD, bias_O).t()


class _RMSLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_OD: Tensor, bias_O: Tensor) -> Tensor:
        dim = x_TD.shape[1]
        square_T = torch.linalg.vector_norm(x_TD, dim=1).square_() / dim
        inverse_T = (square_T + torch.finfo(x_TD.dtype).eps).rsqrt_()
        out_OT = (weight_OD @ x_TD.t()).mul_(inverse_T).add_(bias_O.unsqueeze(1))
        ctx.save_for_backward(x_TD, weight_OD, inverse_T)
        return out_OT

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x_TD, weight_OD, inverse_T = ctx.saved_tensors
        grad_OT = grads[0]
        grad_TD = grad_OT.t() @ weight_OD
        # How the loss changes with the length of a token: along the token itself.
        along_T = torch.bmm(x_TD.unsqueeze(1), grad_TD.unsqueeze(2)).flatten()
        grad_TD.mul_(inverse_T.unsqueeze(1))
        grad_TD.addcmul_(x_TD, (along_T * inverse_T.pow(3) / x_TD.shape[1]).unsqueeze(1), value=-1)
        return grad_TD, (grad_OT * inverse_T) @ x_TD, grad_OT.sum(1)
