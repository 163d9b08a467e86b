"""The relaxed permutation and its implicit gradient against Sinkhorn iterations that autograd records."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gates.solvers.assignment import hungarian
from gates.solvers.relaxed_permutation import SPARSE_FROM, relaxed_permutation, solve

pytestmark = pytest.mark.unit


def scores(size: int, spread: float = 0.3, seed: int = 0) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return spread * torch.randn(size, size, generator=rng, dtype=torch.float64)


def by_sinkhorn(score_EE: Tensor, tau: float, iterations: int = 3000) -> Tensor:
    """The readable reference."""
    log_EE = score_EE / tau
    for _ in range(iterations):
        log_EE = log_EE - log_EE.logsumexp(0, keepdim=True)
        log_EE = log_EE - log_EE.logsumexp(1, keepdim=True)
    return log_EE.exp()


@pytest.mark.parametrize(("size", "tau"), [(1, 0.1), (2, 1.0), (3, 0.05), (6, 0.3), (8, 0.1), (17, 0.2)])
def test_values_and_gradient_are_those_of_sinkhorn_in_the_limit(size: int, tau: float) -> None:
    upstream_EE = scores(size, 1.0, seed=1)
    found, expected = (scores(size).requires_grad_() for _ in range(2))
    p_EE, q_EE = relaxed_permutation(found, tau), by_sinkhorn(expected, tau)
    torch.testing.assert_close(p_EE, q_EE, rtol=1e-7, atol=1e-9)
    (p_EE * upstream_EE).sum().backward()
    (q_EE * upstream_EE).sum().backward()
    torch.testing.assert_close(found.grad, expected.grad, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("size", "tau"), [(2, 0.3), (5, 0.1), (7, 1.0)])
def test_gradcheck(size: int, tau: float) -> None:
    score_EE = scores(size).requires_grad_()
    assert torch.autograd.gradcheck(lambda a: relaxed_permutation(a, tau), (score_EE,), atol=1e-5)


@pytest.mark.parametrize("tau", [1e-1, 1e-2, 1e-3, 1e-4])
@pytest.mark.parametrize("size", [8, 64, SPARSE_FROM])
def test_rows_and_columns_add_up_at_low_temperatures(size: int, tau: float) -> None:
    score_EE = scores(size, 0.05)
    p_EE = relaxed_permutation(score_EE, tau)
    torch.testing.assert_close(p_EE.sum(0), torch.ones(size, dtype=torch.float64), rtol=0, atol=1e-6)
    torch.testing.assert_close(p_EE.sum(1), torch.ones(size, dtype=torch.float64), rtol=0, atol=1e-6)
    if size == 8 and tau <= 1e-3:  # near a vertex
        assert torch.equal(hungarian(p_EE), hungarian(score_EE))


def test_a_vertex_has_no_gradient_and_nothing_overflows() -> None:
    score_EE = (torch.eye(6)[torch.tensor([3, 1, 0, 5, 2, 4])] * 5).requires_grad_()
    p_EE = relaxed_permutation(score_EE, 1e-3)
    assert p_EE.dtype == torch.float32
    assert p_EE.argmax(1).tolist() == [3, 1, 0, 5, 2, 4]
    (p_EE * torch.arange(36.0).view(6, 6)).sum().backward()
    assert score_EE.grad is not None
    assert float(score_EE.grad.abs().max()) < 1e-6


def test_levels_of_rows_and_columns_change_nothing() -> None:
    score_EE = scores(5)
    moved_EE = score_EE + torch.arange(5.0)[:, None] - torch.arange(5.0).square()
    torch.testing.assert_close(relaxed_permutation(moved_EE, 0.2), relaxed_permutation(score_EE, 0.2))
    assert solve(moved_EE, 0.2).marginal_error < 1e-10
