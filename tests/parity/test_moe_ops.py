"""Every fast operation of moe.ops against its readable reference: values and all gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from gates import RoutingPlan
from moe.dispatch import LocalDispatcher
from moe.errors import ConfigError
from moe.ops import causal_attention as attention
from moe.ops import token_permute
from moe.ops.causal_attention import causal_attention_reference, choose_attention_op
from moe.ops.grouped_mm import choose_expert_op, grouped_mm, grouped_mm_reference
from moe.ops.rms_norm import rms_norm, rms_norm_reference
from moe.ops.rotary import apply_rotary, apply_rotary_reference, rotary_angles

pytestmark = pytest.mark.unit

# Largest error allowed, relative to the largest value: a few roundings of sums over at most some hundred terms.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}


def value_and_grads(function: Callable[..., Tensor], inputs: Sequence[Tensor], grad: Tensor) -> list[Tensor]:
    """Output and gradients; the output without gradients, which may take another path, must agree with it."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = function(*leaves)
    with torch.no_grad():
        torch.testing.assert_close(function(*leaves), out)
    return [out, *torch.autograd.grad(out, leaves, grad.to(out.dtype))]


def assert_same(fast: Sequence[Tensor], reference: Sequence[Tensor], tolerance: float) -> None:
    for i, (a, b) in enumerate(zip(fast, reference, strict=True)):
        assert a.shape == b.shape
        if not a.numel():
            continue
        error, size = (a - b).abs().max().item(), b.abs().max().item()
        assert error <= tolerance * max(size, 1.0), f"output {i}: error {error} of {size}"


@pytest.fixture
def rng() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("seq_len", [1, 2, 63, 64, 65, 130, 200])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 4, 8), (4, 2, 12), (6, 1, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_blocked_attention(
    seq_len: int, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, rng: torch.Generator
) -> None:
    def tensor(heads: int) -> Tensor:
        # As attention makes them: (B, S, H, d) in memory, seen as (B, H, S, d).
        return torch.randn(2, seq_len, heads, head_dim, dtype=dtype, generator=rng).transpose(1, 2)

    q, k, v, grad = tensor(heads), tensor(kv_heads), tensor(kv_heads), tensor(heads)
    fast = value_and_grads(lambda *x: attention.causal_attention(*x, "blocked"), [q, k, v], grad)
    assert_same(fast, value_and_grads(causal_attention_reference, [q, k, v], grad), TOLERANCE[dtype])


def test_blocked_attention_gradcheck(rng: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_BLOCK", 3)
    q = torch.randn(1, 2, 7, 2, dtype=torch.float64, generator=rng, requires_grad=True)
    k, v = (torch.randn(1, 1, 7, 2, dtype=torch.float64, generator=rng, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda *x: attention.causal_attention(*x, "blocked"), [q, k, v])


def test_attention_choice_names_its_reason() -> None:
    cpu = torch.device("cpu")
    assert choose_attention_op(cpu, torch.float32, 256, training=True).name == "blocked"
    assert choose_attention_op(cpu, torch.float32, 256, training=False).name == "sdpa"
    assert choose_attention_op(cpu, torch.float32, 128, training=True) == ("sdpa", "as fast at 128 positions")
    long = choose_attention_op(cpu, torch.float32, 4096, training=True)
    assert long.name == "sdpa"
    assert "4096 positions" in long.reason
    assert choose_attention_op(cpu, torch.bfloat16, 256, training=True).name == "sdpa"
    assert choose_attention_op(torch.device("cuda"), torch.float32, 256, training=True).name == "sdpa"


@pytest.mark.parametrize("shape", [(5, 16), (2, 3, 48), (2, 7, 4, 12), (0, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rms_norm(shape: tuple[int, ...], dtype: torch.dtype, rng: torch.Generator) -> None:
    x = 3 * torch.randn(shape, dtype=dtype, generator=rng)
    weight, grad = (torch.randn(s, dtype=dtype, generator=rng) for s in (shape[-1:], shape))
    fast = value_and_grads(lambda x, w: rms_norm(x, w, 1e-5), [x, weight], grad)
    reference = value_and_grads(lambda x, w: rms_norm_reference(x, w, 1e-5), [x, weight], grad)
    assert_same(fast, reference, TOLERANCE[dtype])


def test_rms_norm_gradcheck(rng: torch.Generator) -> None:
    x = torch.randn(3, 6, dtype=torch.float64, generator=rng, requires_grad=True)
    weight = torch.randn(6, dtype=torch.float64, generator=rng, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, 1e-5), [x, weight])


def test_rms_norm_is_fp32_inside(rng: torch.Generator) -> None:
    x = (300 * torch.randn(4, 64, generator=rng)).bfloat16()  # squares of these overflow nothing but lose all bits
    weight = torch.randn(64, generator=rng)
    expected = rms_norm_reference(x.double(), weight.double(), 1e-5)
    assert rms_norm(x, weight, 1e-5).dtype == torch.bfloat16
    error = (rms_norm(x, weight, 1e-5, torch.float32) - expected).abs().max()
    assert error < 1e-5
    # Rows of zeros stay zero with finite gradients.
    zeros = torch.zeros(2, 64, requires_grad=True)
    rms_norm(zeros, weight, 1e-5).sum().backward()
    assert zeros.grad is not None
    assert torch.isfinite(zeros.grad).all()


@pytest.mark.parametrize("batch_positions", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_rotary(batch_positions: int, dtype: torch.dtype, rng: torch.Generator) -> None:
    rotary = rotary_angles(torch.randint(0, 99, (batch_positions, 5), generator=rng), 8, 100.0)
    x = torch.randn(3, 5, 2, 8, generator=rng).to(dtype)
    grad = torch.randn(3, 2, 5, 8, generator=rng)
    fast = value_and_grads(lambda x: apply_rotary(x, rotary), [x], grad)
    assert fast[0].is_contiguous()
    assert fast[0].dtype == dtype
    reference = value_and_grads(lambda x: apply_rotary_reference(x, rotary).to(dtype), [x], grad)
    assert_same(fast, reference, TOLERANCE[dtype])


LOADS = [[3, 0, 5, 2], [0, 0, 0, 0], [0, 9, 0, 0], [1, 1, 1, 1], [0, 0, 0, 6]]


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grouped_mm(load: list[int], dtype: torch.dtype, rng: torch.Generator) -> None:
    x = torch.randn(sum(load), 16, generator=rng).to(dtype)
    w, grad = torch.randn(4, 16, 24, generator=rng).to(dtype), torch.randn(sum(load), 24, generator=rng).to(dtype)
    load_E = torch.tensor(load)
    fast = value_and_grads(lambda x, w: grouped_mm(x, w, load_E, "grouped_mm"), [x, w], grad)
    reference = value_and_grads(lambda x, w: grouped_mm_reference(x, w, load_E), [x, w], grad)
    assert_same(fast, reference, TOLERANCE[dtype])
    # An expert without rows has a gradient, and it is zero.
    assert fast[2][load_E == 0].eq(0).all()


def test_grouped_mm_takes_an_expanded_gradient() -> None:
    x, w = torch.ones(4, 8, requires_grad=True), torch.ones(2, 8, 8, requires_grad=True)
    grouped_mm(x, w, torch.tensor([1, 3]), "grouped_mm").sum().backward()
    assert x.grad is not None
    assert w.grad is not None
    assert x.grad.eq(8).all()
    assert w.grad[:, 0, 0].tolist() == [1.0, 3.0]


def test_expert_op_choice_names_its_reason() -> None:
    cpu = torch.device("cpu")
    assert choose_expert_op("auto", cpu, torch.float32, (16, 24)).name == "grouped_mm"
    assert choose_expert_op("loop", cpu, torch.float32, (16, 24)) == ("loop", "asked for by name")
    odd = choose_expert_op("auto", cpu, torch.float32, (16, 22))
    assert odd == ("loop", "grouped_mm cannot run: width 22 is not a multiple of 4 (16 bytes of float32)")
    assert choose_expert_op("auto", cpu, torch.bfloat16, (16, 20)).name == "loop"
    assert "float64" in choose_expert_op("auto", cpu, torch.float64, (16, 24)).reason
    message = r"model.moe.expert_op: grouped_mm cannot run: width 22 is not a multiple of 4 .*; use auto or loop"
    with pytest.raises(ConfigError, match=message):
        choose_expert_op("grouped_mm", cpu, torch.float32, (16, 22))


def ragged_plan(num_tokens: int, num_experts: int, rng: torch.Generator, dtype: torch.dtype) -> RoutingPlan:
    """Any number of experts per token, none included."""
    mask_TE = torch.rand(num_tokens, num_experts, generator=rng) < 0.4
    plan = RoutingPlan.from_mask(mask_TE, torch.rand(num_tokens, num_experts, generator=rng))
    return replace(plan, weight_N=plan.weight_N.to(dtype))


def uniform_plan(num_tokens: int, num_experts: int, k: int, rng: torch.Generator, dtype: torch.dtype) -> RoutingPlan:
    expert_TK = torch.rand(num_tokens, num_experts, generator=rng).argsort(1)[:, :k]
    plan = RoutingPlan.from_topk(expert_TK, torch.rand(num_tokens, k, generator=rng), num_experts)
    return replace(plan, weight_N=plan.weight_N.to(dtype))


@pytest.mark.parametrize("kind", ["ragged", "k=1", "k=2", "k=6", "as if ragged"])
@pytest.mark.parametrize("num_tokens", [0, 1, 17])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_gather_and_combine(kind: str, num_tokens: int, dtype: torch.dtype, rng: torch.Generator) -> None:
    weight_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    if kind == "ragged":
        plan = ragged_plan(num_tokens, 6, rng, weight_dtype)
    else:
        plan = uniform_plan(num_tokens, 6, 2 if "=" not in kind else int(kind[2:]), rng, weight_dtype)
    if kind == "as if ragged":  # the general path must agree with the fast one
        plan = replace(plan, uniform_k=None)
    x = torch.randn(num_tokens, 8, generator=rng).to(dtype)
    order = LocalDispatcher().dispatch(x, plan).ticket.order
    grad_ND = torch.randn(plan.num_pairs, 8, generator=rng).to(dtype)
    assert_same(
        value_and_grads(lambda x: token_permute.gather_rows(x, order), [x], grad_ND),
        value_and_grads(lambda x: token_permute.gather_rows_reference(x, order), [x], grad_ND),
        TOLERANCE[dtype],
    )
    y, grad_TD = torch.randn(plan.num_pairs, 8, generator=rng).to(dtype), torch.randn(num_tokens, 8, generator=rng)
    assert_same(
        value_and_grads(lambda y, w: token_permute.combine_rows(y, w, order), [y, plan.weight_N], grad_TD),
        value_and_grads(lambda y, w: token_permute.combine_rows_reference(y, w, order), [y, plan.weight_N], grad_TD),
        TOLERANCE[dtype],
    )


@pytest.mark.parametrize("kind", ["ragged", "uniform"])
def test_gather_and_combine_gradcheck(kind: str, rng: torch.Generator) -> None:
    plan = ragged_plan(5, 4, rng, torch.float64) if kind == "ragged" else uniform_plan(5, 4, 2, rng, torch.float64)
    x = torch.randn(5, 3, dtype=torch.float64, generator=rng, requires_grad=True)
    order = LocalDispatcher().dispatch(x.detach(), plan).ticket.order
    assert torch.autograd.gradcheck(lambda x: token_permute.gather_rows(x, order), [x])
    y = torch.randn(plan.num_pairs, 3, dtype=torch.float64, generator=rng, requires_grad=True)
    weight = plan.weight_N.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda y, w: token_permute.combine_rows(y, w, order), [y, weight])


def test_half_precision_sums_are_rounded_once() -> None:
    # 256 + 1 + 1 in bf16 steps of 2 would lose both ones if each partial sum were rounded.
    plan = RoutingPlan.from_topk(torch.tensor([[0, 1, 2]]), torch.ones(1, 3), 3)
    order = LocalDispatcher().dispatch(torch.zeros(1, 1), plan).ticket.order
    y = torch.tensor([[256.0], [1.0], [1.0]], dtype=torch.bfloat16)
    assert token_permute.combine_rows(y, plan.weight_N, order).item() == 258.0
