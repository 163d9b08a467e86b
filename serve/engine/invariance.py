"""Whether the same request gives the same text whatever is computed beside it: what is promised, and what is checked.

Three things can break it: products whose rows depend on their number (see :mod:`moe.ops.batch_invariant`), attention
over keys that are cut differently (attended alone in this mode), and a gate that looks at other tokens, or rounds
otherwise beside them. The first and the last depend on the machine and on the model, so both are tried out. A layer
whose gate does that is asked token by token.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from gates import GateOutput, Mode, RoutingPlan
from moe.errors import UserError
from moe.layer import MoELayer, RoutingContext
from moe.ops.batch_invariant import BatchInvariant, tile_is_invariant
from moe.transformer import Transformer

_TOKENS = 61  # no multiple of anything


def require_invariant_products(model: Transformer) -> None:
    """Tries the products of this model's shapes on this machine.

    Raises:
        UserError: a row's result depends on its place among others, so nothing can be promised here.
    """
    weight, config = model.embed.weight, model.config
    widths = [(config.dim, config.dim), (config.dim, config.moe.hidden_dim), (config.moe.hidden_dim, config.dim)]
    for width, columns in [*widths, (config.dim, config.moe.num_experts)]:
        if not tile_is_invariant(width, columns, weight.dtype, weight.device):
            raise UserError(
                f"batch-invariant mode is not possible here: on this machine a {width} x {columns} product in"
                f" {str(weight.dtype).removeprefix('torch.')} depends on where its row stands"
            )


def layers_that_mix_tokens(model: Transformer) -> list[tuple[int, MoELayer]]:
    """(block, layer) whose gate routes a token differently, be it in the last bit of a weight, beside others."""
    return [(index, layer) for index, layer in model.moe_layers() if _mixes(layer, model)]


@torch.inference_mode()
def _mixes(layer: MoELayer, model: Transformer) -> bool:
    weight = model.embed.weight
    rng = torch.Generator(weight.device).manual_seed(0)
    x_TD = torch.randn(_TOKENS, layer.dim, generator=rng, device=weight.device).to(weight.dtype)
    ids_T = torch.randint(model.embed.num_embeddings, (_TOKENS,), generator=rng, device=weight.device)
    position_T = torch.arange(_TOKENS, device=weight.device)
    with BatchInvariant():
        first = _route(layer, x_TD, ids_T, position_T, None)
        logits_TE = first.logits_TE
        together = _pairs(_route(layer, x_TD, ids_T, position_T, logits_TE).plan)
        alone = []
        for t in range(_TOKENS):
            one = slice(t, t + 1)
            before = None if logits_TE is None else logits_TE[one]
            alone += _pairs(_route(layer, x_TD[one], ids_T[one], position_T[one], before).plan)
    return together != alone


def _route(
    layer: MoELayer, x_TD: Tensor, ids_T: Tensor, position_T: Tensor, prev_logits_TE: Tensor | None
) -> GateOutput:
    context = RoutingContext(
        ids_T=ids_T,
        segment_T=torch.zeros_like(ids_T),
        position_T=position_T,
        prev_logits_TE=prev_logits_TE,
        mode=Mode.DECODE,
        causal=True,
    )
    output: GateOutput = layer.gate_for(Mode.DECODE)(context.gate_input(x_TD))
    return output


def _pairs(plan: RoutingPlan) -> list[list[tuple[int, float]]]:
    """Each token's experts and weights."""
    pairs = list(zip(plan.expert_N.tolist(), plan.weight_N.tolist(), strict=True))
    return [pairs[a:b] for a, b in pairwise(plan.row_ptr_T1.tolist())]
