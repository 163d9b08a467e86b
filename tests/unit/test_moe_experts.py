"""Stacked experts: implementations agree, idle experts keep gradients, no uninitialised memory is ever read."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from moe import ForwardContext, ModelConfig, MoEConfig, Transformer, next_token_loss
from moe.experts import Experts, SwiGLU

pytestmark = pytest.mark.unit


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Every new tensor that nobody has written yet is full of NaN."""
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.isnan(torch.empty(3)).all()
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = before


def grads(experts: Experts, rows: torch.Tensor, load: list[int]) -> list[torch.Tensor]:
    rows = rows.clone().requires_grad_()
    y = experts(rows, torch.tensor(load))
    return [y, *torch.autograd.grad(y.square().sum(), [rows, *experts.parameters()])]


@pytest.mark.parametrize("load", [[4, 0, 6], [0, 0, 10], [0, 0, 0]])
def test_grouped_mm_and_loop_agree(load: list[int]) -> None:
    torch.manual_seed(0)
    experts = {op: Experts(3, 16, 24, op) for op in ("grouped_mm", "loop")}
    experts["loop"].load_state_dict(experts["grouped_mm"].state_dict())
    rows = torch.randn(sum(load), 16)
    for fast, reference in zip(*(grads(experts[op], rows, load) for op in experts), strict=True):
        torch.testing.assert_close(fast, reference, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("op", ["grouped_mm", "loop"])
def test_pain_1_expert_without_tokens_has_a_zero_gradient(op: str) -> None:
    """A missing gradient would make a data-parallel reducer wait for ever (DeepSpeed #4808, #5066)."""
    experts = Experts(3, 8, 8, op)
    experts(torch.randn(5, 8), torch.tensor([5, 0, 0])).sum().backward()
    for weight in experts.parameters():
        assert weight.grad is not None
        assert weight.grad[0].abs().sum() > 0
        assert weight.grad[1:].eq(0).all()
    experts.zero_grad()
    experts(torch.randn(0, 8), torch.tensor([0, 0, 0])).sum().backward()
    assert all(weight.grad is not None and weight.grad.eq(0).all() for weight in experts.parameters())


def test_rows_decide_the_compute_dtype() -> None:
    experts = Experts(2, 16, 16)
    y = experts(torch.randn(4, 16, dtype=torch.bfloat16), torch.tensor([1, 3]))
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert experts.w_gate_EDF.grad is not None
    assert experts.w_gate_EDF.grad.dtype == torch.float32
    assert SwiGLU(16, 8)(torch.randn(4, 16, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_op_and_reason_are_visible() -> None:
    assert Experts(2, 16, 16).op == "grouped_mm"
    odd = Experts(2, 6, 16)
    assert odd.op == "loop"
    assert odd.op_reason == "grouped_mm cannot run: width 6 is not a multiple of 4 (16 bytes of float32)"
    assert odd(torch.randn(4, 6), torch.tensor([1, 3])).shape == (4, 6)
    double = Experts(2, 16, 16).double()
    assert double.op == "loop"
    assert double(torch.randn(4, 16).double(), torch.tensor([1, 3])).dtype == torch.float64


def test_load_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match=r"load_E has shape \(3,\), there are 2 experts"):
        Experts(2, 8, 8)(torch.zeros(4, 8), torch.tensor([1, 1, 2]))


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("expert_op", ["grouped_mm", "loop"])
@pytest.mark.parametrize("gate", [{"k": 2}, {"k": 1, "renormalise": False}, {"k": 2, "capacity_factor": 0.6}])
def test_pain_7_no_uninitialised_row_reaches_the_loss_or_a_gradient(expert_op: str, gate: dict[str, object]) -> None:
    """NaN from padding rows that a kernel never wrote: transformers #48205, torchtitan #1237."""
    moe = MoEConfig(num_experts=6, hidden_dim=16, num_shared_experts=1, expert_op=expert_op)
    config = ModelConfig(vocab_size=40, dim=16, num_layers=2, num_heads=2, num_kv_heads=1, qk_norm=True, moe=moe)
    model = Transformer(config, {"name": "topk", **gate})
    model.init_weights(0)
    model.train()
    ids_BT = torch.randint(0, 40, (2, 70), generator=torch.Generator().manual_seed(0))
    valid_BT = torch.arange(70) < torch.tensor([[70], [30]])
    for _, layer in model.moe_layers():
        layer.gate.weight.data[1:] = 0  # most tokens to few experts, some experts idle
    output = model(ids_BT, context=ForwardContext(valid_BT=valid_BT))
    nats, count = next_token_loss(output.logits_BTV, ids_BT, valid_BT)
    (nats / count + output.aux_loss()).backward()
    assert torch.isfinite(output.logits_BTV).all()
    for name, param in model.named_parameters():
        assert param.grad is not None, name
        assert torch.isfinite(param.grad).all(), name
