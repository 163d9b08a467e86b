"""After NaN: the first bad place is named, whether it is a weight, a layer, a gate or a gradient."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from launch.nan_watch import first_bad_gradient, first_bad_module

pytestmark = pytest.mark.unit


class Explode(nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, int]:
        return x / 0.0, 3


def test_names_the_first_module_whose_output_is_bad() -> None:
    model = nn.Sequential(nn.Linear(2, 2), Explode(), nn.Linear(2, 2))
    model[2].forward = lambda pair: pair[0]
    text = first_bad_module(model, lambda: model(torch.ones(1, 2)))
    assert text == "the output of 1 (Explode) is the first that is not finite"


def test_names_a_bad_parameter_before_any_output() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    with torch.no_grad():
        model[1].bias[0] = float("inf")
    assert first_bad_module(model, lambda: model(torch.ones(1, 2))) == "parameter 1.bias holds NaN or infinity"


def test_finite_forward_says_nothing_and_leaves_no_hooks() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    assert first_bad_module(model, lambda: model(torch.ones(1, 2))) is None
    assert not model[0]._forward_hooks


def test_bad_gradient_nearest_the_loss_is_named() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
    assert first_bad_gradient(model) is None
    model[0].weight.grad[0, 0] = float("nan")
    model[1].weight.grad[0, 0] = float("nan")
    assert "gradient of 1.weight" in str(first_bad_gradient(model))
