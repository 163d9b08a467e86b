"""Fast paths of gates/solvers beside their readable references, values and all gradients; bugs that were found."""

from __future__ import annotations

import pytest
import torch

from gates.solvers.assignment import balanced_assignment
from gates.solvers.rms_linear import rms_linear, rms_linear_reference
from gates.solvers.soft_tree import (
    leaf_probabilities,
    leaf_probabilities_reference,
    mix_leaves,
    mix_leaves_reference,
)
from gates.solvers.sparse_ot import solve_semi_dual

pytestmark = pytest.mark.unit


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).requires_grad_()


@pytest.mark.parametrize("tokens", [0, 1, 7])
def test_rms_linear(tokens: int) -> None:
    arguments = (random(tokens, 5), random(6, 5, seed=1), random(6, seed=2))
    torch.testing.assert_close(rms_linear(*arguments), rms_linear_reference(*arguments), rtol=1e-12, atol=1e-12)
    upstream = random(6, tokens, seed=3).detach()
    for found, expected in zip(
        torch.autograd.grad(rms_linear(*arguments), arguments, upstream),
        torch.autograd.grad(rms_linear_reference(*arguments), arguments, upstream),
        strict=True,
    ):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    assert torch.autograd.gradcheck(rms_linear, arguments) if tokens else True


def test_rms_linear_of_a_token_of_zeros_is_the_bias() -> None:
    weight_OD, bias_O = random(6, 5, seed=1), random(6, seed=2)
    out_OT = rms_linear(torch.zeros(2, 5, dtype=torch.float64), weight_OD, bias_O)
    assert torch.equal(out_OT, bias_O.detach().unsqueeze(1).expand(6, 2))


@pytest.mark.parametrize("leaves", [1, 2, 3, 5, 6, 7, 8, 16, 33])
@pytest.mark.parametrize("gamma", [0.1, 1.0, 10.0])
def test_leaf_probabilities(leaves: int, gamma: float) -> None:
    split = random(2, leaves - 1, 4)
    found, expected = leaf_probabilities(split, gamma), leaf_probabilities_reference(split, gamma)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(found.sum(-2), torch.ones(2, 4, dtype=torch.float64))
    if leaves == 1:
        return  # nothing splits: nothing to learn
    upstream = random(2, leaves, 4, seed=1).detach()
    (grad,), (wanted,) = (torch.autograd.grad(value, split, upstream) for value in (found, expected))
    torch.testing.assert_close(grad, wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("leaves", [2, 3, 6, 8, 17])
@pytest.mark.parametrize("gamma", [0.1, 1.0, 10.0])
def test_mixture_of_leaves(leaves: int, gamma: float) -> None:
    split, logit = random(3, leaves - 1, 5), (random(3, leaves, 5, seed=1) * 4).detach().requires_grad_()
    found, expected = mix_leaves(split, logit, gamma), mix_leaves_reference(split, logit, gamma)
    for value, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(found.weight_ET.sum(0), torch.ones(5, dtype=torch.float64))
    upstream = [random(leaves, 5, seed=2).detach(), random(leaves, seed=3).detach(), torch.tensor(0.7).double()]
    grads, wanted_grads = (torch.autograd.grad(m[:3], (split, logit), upstream) for m in (found, expected))
    for grad, wanted in zip(grads, wanted_grads, strict=True):
        torch.testing.assert_close(grad, wanted, rtol=1e-9, atol=1e-12)


def test_a_mixture_of_leaves_far_apart_is_finite() -> None:
    """The largest logit stands on a leaf that is closed, or all but closed."""
    split = torch.tensor([[[-1.0, 0.499999]]]).double().requires_grad_()
    logit = torch.tensor([[[1e4, 0.0], [0.0, 1e4]]]).double().requires_grad_()
    mixture = mix_leaves(split, logit, 1.0)
    assert mixture.weight_ET.tolist() == [[0.0, 0.0], [1.0, 1.0]]
    mixture.weight_ET.square().sum().backward()
    assert bool(torch.isfinite(split.grad).all())  # type: ignore[arg-type]
    assert bool(torch.isfinite(logit.grad).all())  # type: ignore[arg-type]


@pytest.mark.parametrize("gamma", [1e-4, 1e-3, 3e-3, 1e-2])
def test_newton_is_no_worse_than_lbfgs_where_columns_hardly_curve(gamma: float) -> None:
    """It once gave up at its first step where nearly all columns have a single entry, and returned zeros."""
    score_BN = random(96, 6).detach().softmax(-1)
    newton, lbfgs = (
        solve_semi_dual(score_BN, 2, gamma, row_mass=16.0, column_mass=1.0, solver=solver, iterations=200)  # type: ignore[arg-type]
        for solver in ("newton", "lbfgs")
    )
    assert newton.objective >= lbfgs.objective - 1e-6
    assert newton.violation < 0.1


def test_prices_of_experts_without_tokens_keep_tokens_away() -> None:
    """With fewer tokens than experts some experts have no token that could bound their price."""
    for seed in range(20):
        score_TE = random(5, 8, seed=seed).detach()
        capacity_E = torch.tensor([1, 1, 1, 1, 1, 0, 0, 0])
        expert_T, bonus_E = balanced_assignment(score_TE, capacity_E)
        assert torch.equal(torch.bincount(expert_T, minlength=8), capacity_E)
        assert torch.equal((score_TE + bonus_E).argmax(1), expert_T)
