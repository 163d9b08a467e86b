"""A gang's dispatcher against the local one on any plan, its workers being functions in this process."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from gates import RoutingPlan
from moe.config import ModelConfig, MoEConfig
from moe.dispatch import LocalDispatcher
from moe.experts import ExpertBank
from moe.transformer import Transformer
from parallel.gang_experts import HeldExperts, sub_bank
from parallel.gang_link import HEADER_INTS, GangLink
from parallel.gang_rows import rows_in
from parallel.gang_split import HolderTable
from parallel.placement import Placement, even_owners
from parallel.serving_gang import ServingGang

pytestmark = pytest.mark.unit

E, D, F, W = 6, 16, 24, 3


class Done:
    def wait(self) -> None: ...


class InProcess:
    """A link whose workers answer at once."""

    message = staticmethod(GangLink.message)
    rank, world_size, device = 0, W, torch.device("cpu")

    def __init__(self, whole: ExpertBank, placement: Placement) -> None:
        self.banks: list[HeldExperts] = []
        for rank in range(W):
            held = HeldExperts(sub_bank(whole, placement.owned_by(rank)))
            held.copies = sub_bank(whole, placement.copied_to(rank)) if placement.copied_to(rank) else None
            self.banks.append(held)
        self.held_We = [placement.held_by(rank) for rank in range(W)]
        self.answers: dict[int, Tensor] = {}

    def send(self, message: Tensor, rank: int) -> Done:
        _, _, inline, _, count, *_ = message[: HEADER_INTS * 8].view(torch.int64).tolist()
        assert inline
        load_e, rows_ND = rows_in(message[HEADER_INTS * 8 :], len(self.held_We[rank]), count, D, torch.float32)
        self.answers[rank] = self.banks[rank](rows_ND, load_e)
        return Done()

    def receive(self, tensor: Tensor, rank: int) -> Done:
        tensor.copy_(self.answers.pop(rank))
        return Done()


@pytest.mark.parametrize("copies", [[], [(0, 1), (0, 2), (3, 0), (5, 1)]])
@pytest.mark.parametrize("tokens", [0, 1, 23])
@torch.inference_mode()
def test_any_plan_gives_what_the_local_dispatcher_gives(tokens: int, copies: list[tuple[int, int]]) -> None:
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=9, dim=D, num_layers=1, num_heads=2, max_seq_len=8, moe=MoEConfig(num_experts=E, hidden_dim=F)
    )
    model = Transformer(config, "topk").eval()
    model.init_weights(0)
    _, layer = model.moe_layers()[0]
    # Some tokens with many experts, some with one, some with none; and an identity path.
    mask_TE = torch.rand(tokens, E) < torch.rand(tokens, 1)
    x_TD = torch.randn(tokens, D)
    plan = replace(RoutingPlan.from_mask(mask_TE, torch.rand(tokens, E)), residual_T=torch.rand(tokens))
    local = LocalDispatcher()
    rows_ND, load_e, local_ticket = local.dispatch(x_TD, plan)
    wanted_TD = local.combine(layer.experts(rows_ND, load_e), local_ticket)

    placement = Placement(even_owners(1, E, W)[0], world_size=W).with_copies(copies)
    link: Any = InProcess(layer.experts, placement)
    gang = ServingGang(link, None, placement.owner_E[None])  # type: ignore[arg-type]
    gang.attach(model)
    layer.experts = link.banks[0]
    gang._tables = [HolderTable(placement)]
    rows_ND, load_e, ticket = layer.dispatcher.dispatch(x_TD, plan)
    y_TD = layer.dispatcher.combine(layer.experts(rows_ND, load_e), ticket)
    if copies:  # an expert's rows may be in two products
        torch.testing.assert_close(y_TD, wanted_TD, rtol=1e-5, atol=1e-6)
    else:
        assert torch.equal(y_TD, wanted_TD)
    assert int(gang.rows().sum()) == plan.load_E.sum()
    assert link.answers == {}
    with pytest.raises(ValueError, match="plan routes"):
        layer.dispatcher.dispatch(torch.randn(tokens + 1, D), plan)
