"""Every differentiable function of gates/ against finite differences in float64, each by itself.

The conformance suite checks weights and losses of whole gates, in which an error of one factor can hide behind a
softmax; and it does not look at what else a gate returns: logits, slots, residuals, the output of free experts.

Shape suffixes: T tokens, D width, E experts, N chosen pairs, K experts per token or trees, S splits, b bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from gates import Gate, GateInput, GateOutput, Mode, RoutingPlan, gate_names
from gates.balance import balance_loss, cv_squared, importance, sequence_balance_loss, smooth_load, z_loss
from gates.capacity import normalise_rows
from gates.dselect_k import code_probabilities
from gates.scores import ScoreFunction, log_score, score
from gates.solvers.plan_gradient import row_weights
from gates.solvers.rms_linear import rms_linear
from gates.solvers.smooth_step import smooth_step
from gates.solvers.soft_tree import mix_leaves
from tests.gate_conformance import Case, cases, tokens

pytestmark = pytest.mark.unit
T, E = 6, 5
SCORES: tuple[ScoreFunction, ...] = get_args(ScoreFunction)


def draw(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    values = torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return (values * scale).requires_grad_()


def holds(function: Callable[..., Any], *arguments: Tensor) -> bool:
    """Central differences of every output by every input entry; eps is 1e-6, so that kinks must be farther away."""
    return bool(torch.autograd.gradcheck(function, arguments, eps=1e-6, atol=1e-6, rtol=1e-4))


def away_from(value: Tensor, *borders: float, by: float = 1e-3) -> Tensor:
    """Push entries that are near a border off it: a second derivative jumps there."""
    value = value.detach()
    for border in borders:
        value = torch.where((value - border).abs() < by, border + 2 * by, value)
    return value.requires_grad_()


def plan_of(*rows: Sequence[int], num_experts: int = E) -> RoutingPlan:
    """A plan that visits these experts, in this order within a row; its weights are ones."""
    expert_N = torch.tensor([e for row in rows for e in row], dtype=torch.int64)
    row_ptr_T1 = torch.tensor([0, *map(len, rows)]).cumsum(0)
    load_E = torch.bincount(expert_N, minlength=num_experts)
    lengths = {len(row) for row in rows}
    uniform_k = lengths.pop() if len(lengths) == 1 else None
    weight_N = torch.ones(expert_N.numel(), dtype=torch.float64)
    return RoutingPlan(row_ptr_T1, expert_N, weight_N, num_experts, load_E, load_E, uniform_k)


PLANS = {
    "ragged": plan_of([3, 0], [], [1, 4, 2, 0, 3], [2], [0, 4], []),
    "uniform": plan_of([3, 0], [1, 2], [4, 1], [0, 2], [2, 4], [1, 3]),
    "dense": RoutingPlan.from_mask(torch.ones(T, E, dtype=torch.bool), torch.ones(T, E, dtype=torch.float64)),
    "single": plan_of([3], [1], [4], [0], [2], [1]),
}
every_plan = pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS.keys())


# ----------------------------------------------------------------------------------------------------------------------
# Solvers


@pytest.mark.parametrize("gamma", [0.3, 1.0, 10.0])
def test_smooth_step(gamma: float) -> None:
    value = away_from(torch.linspace(-1.2, 1.2, 41, dtype=torch.float64) * gamma, -gamma / 2, gamma / 2)
    assert holds(lambda v: smooth_step(v, gamma), value)
    (slope,) = torch.autograd.grad(smooth_step(value, gamma).sum(), value)
    assert bool((slope[value.abs() > gamma / 2] == 0).all())
    assert bool((slope[value.abs() < gamma / 2] > 0).all())


@pytest.mark.parametrize("leaves", [2, 3, 5, 8])
@pytest.mark.parametrize("gamma", [0.4, 2.0, 12.0])
def test_mix_leaves(leaves: int, gamma: float) -> None:
    """Weights, mass and entropy at once: the three share one backward. Narrow steps close most leaves."""
    split_KST = away_from(draw(3, leaves - 1, 4, seed=leaves), -gamma / 2, gamma / 2, by=5e-3 * gamma)
    logit_KET = draw(3, leaves, 4, seed=1, scale=2.0)
    assert holds(lambda split, logit: mix_leaves(split, logit, gamma)[:3], split_KST, logit_KET)


@pytest.mark.parametrize("output", ["weight_ET", "mass_E", "entropy"])
def test_mix_leaves_when_one_output_alone_is_used(output: str) -> None:
    """As with a coefficient of 0: autograd hands zeros for the others."""
    split_KST = away_from(draw(2, 4, 3), -1.0, 1.0, by=0.01)
    logit_KET = draw(2, 5, 3, seed=1)

    def one(split: Tensor, logit: Tensor) -> Tensor:
        found: Tensor = getattr(mix_leaves(split, logit, 2.0), output)
        return found

    assert holds(one, split_KST, logit_KET)


@pytest.mark.parametrize(("tokens_", "dim", "outputs"), [(1, 1, 1), (1, 5, 3), (4, 3, 1), (5, 7, 6)])
@pytest.mark.parametrize("scale", [0.03, 1.0, 30.0])
def test_rms_linear(tokens_: int, dim: int, outputs: int, scale: float) -> None:
    x_TD = draw(tokens_, dim, scale=scale)
    assert holds(rms_linear, x_TD, draw(outputs, dim, seed=1), draw(outputs, seed=2))


@pytest.mark.parametrize("wanted", [0, 1, 2])
def test_rms_linear_with_one_input_that_learns(wanted: int) -> None:
    """Frozen gates and frozen tokens: the other inputs want no gradient."""
    arguments = [draw(4, 3).detach(), draw(2, 3, seed=1).detach(), draw(2, seed=2).detach()]
    arguments[wanted].requires_grad_()
    assert holds(rms_linear, *arguments)


@every_plan
@pytest.mark.parametrize("gamma", [0.5, 20.0])
def test_row_weights(plan: RoutingPlan, gamma: float) -> None:
    """Small gamma clamps entries to 0, large gamma none; what is near 0 is not differentiable."""
    score_TE = draw(T, E, seed=3)
    weight_N = row_weights(score_TE, plan, gamma, row_sum=1.5).detach()
    assert not bool(((weight_N > 0) & (weight_N < 1e-4)).any()), "an entry next to the kink: take another seed"
    assert holds(lambda s: row_weights(s, plan, gamma, row_sum=1.5), score_TE)


@pytest.mark.parametrize("bits", [1, 2, 3])
@pytest.mark.parametrize("gamma", [0.5, 4.0])
def test_code_probabilities(bits: int, gamma: float) -> None:
    bit_TKb = away_from(draw(4, 2, bits), -gamma / 2, gamma / 2, by=5e-3 * gamma)
    assert holds(lambda b: code_probabilities(b, gamma), bit_TKb)


# ----------------------------------------------------------------------------------------------------------------------
# Scores


@pytest.mark.parametrize("kind", SCORES)
@pytest.mark.parametrize("function", [log_score, score])
def test_scores(kind: ScoreFunction, function: Callable[[Tensor, ScoreFunction], Tensor]) -> None:
    assert holds(lambda logits: function(logits, kind), draw(T, E, scale=3.0))


@pytest.mark.parametrize("kind", SCORES)
def test_log_scores_of_extreme_logits(kind: ScoreFunction) -> None:
    """Below -40 sqrt_softplus takes another formula; the slope must be that of the same function."""
    logits = torch.tensor([[-300.0, -45.0, -40.5, -39.5, -30.0, 0.0, 30.0, 300.0]], dtype=torch.float64)
    assert holds(lambda value: log_score(value, kind), logits.requires_grad_())


# ----------------------------------------------------------------------------------------------------------------------
# Plans


@every_plan
def test_what_a_plan_makes_of_values(plan: RoutingPlan) -> None:
    value_TE, value_N = draw(T, E), draw(plan.num_pairs, seed=1)
    assert holds(plan.pick, value_TE)
    assert holds(plan.sum_rows, value_N)
    assert holds(plan.softmax_rows, value_N)
    assert holds(lambda w: plan.with_weight(w).dense_weight_TE(), value_N)


@every_plan
def test_softmax_rows_of_logits_far_apart(plan: RoutingPlan) -> None:
    """The row's maximum is subtracted without gradient, which must not show."""
    logit_N = draw(plan.num_pairs, scale=4.0).detach() + 700 * torch.arange(plan.num_pairs)
    assert holds(plan.softmax_rows, logit_N.requires_grad_())


@every_plan
@pytest.mark.parametrize("total", [1.0, 2.5])
def test_normalise_rows(plan: RoutingPlan, total: float) -> None:
    weight_N = (draw(plan.num_pairs).detach().abs() + 0.1).requires_grad_()
    assert holds(lambda w: normalise_rows(plan.with_weight(w), total).weight_N, weight_N)


def test_weights_of_plans_that_are_made() -> None:
    """from_topk and from_mask carry the gradient to the pairs that they keep, and to no other."""
    weight_TE, expert_TK = draw(T, E), torch.tensor([[3, 0], [1, 2], [4, 1], [0, 2], [2, 4], [1, 3]])
    valid_T = torch.tensor([True, False, True, True, False, True])
    mask_TE = draw(T, E, seed=1).detach() > 0
    assert holds(lambda w: RoutingPlan.from_topk(expert_TK, w.gather(1, expert_TK), E).weight_N, weight_TE)
    assert holds(lambda w: RoutingPlan.from_topk(expert_TK, w.gather(1, expert_TK), E, valid_T).weight_N, weight_TE)
    assert holds(lambda w: RoutingPlan.from_mask(mask_TE, w).weight_N, weight_TE)
    (grad_TE,) = torch.autograd.grad(RoutingPlan.from_mask(mask_TE, weight_TE).weight_N.sum(), weight_TE)
    assert torch.equal(grad_TE, mask_TE.double())


# ----------------------------------------------------------------------------------------------------------------------
# Balance


def test_balance_losses() -> None:
    probs_TE = draw(T, E).detach().softmax(-1).requires_grad_()
    plan, segment_T = PLANS["ragged"], torch.tensor([0, 0, 0, 2, 2, 3])  # sequence 1 is empty
    assert holds(lambda p: balance_loss(p, plan.load_E), probs_TE)
    assert holds(lambda p: sequence_balance_loss(p, plan.expert_N, plan.token_N(), segment_T), probs_TE)


@pytest.mark.parametrize("scale", [0.1, 5.0])
def test_z_loss(scale: float) -> None:
    assert holds(z_loss, draw(T, E, scale=scale))


def test_cv_squared_and_importance() -> None:
    assert holds(cv_squared, (draw(E).detach().abs() + 0.2).requires_grad_())
    plan = PLANS["ragged"]
    weight_N = (draw(plan.num_pairs).detach().abs() + 0.1).requires_grad_()
    assert holds(lambda w: importance(plan.expert_N, w, E), weight_N)
    assert holds(lambda w: cv_squared(importance(plan.expert_N, w, E)), weight_N)


@pytest.mark.parametrize("exclude_self", [True, False])
@pytest.mark.parametrize("k", [1, 2, 4])
def test_smooth_load(k: int, exclude_self: bool) -> None:
    """Through the logits, the threshold among the noisy ones, and the width of the noise."""
    clean_TE, noisy_TE = draw(T, E), draw(T, E, seed=1)
    std_TE = (draw(T, E, seed=2).detach().abs() + 0.3).requires_grad_()
    assert holds(lambda c, n, std: smooth_load(c, n, std, k, exclude_self=exclude_self), clean_TE, noisy_TE, std_TE)
    assert holds(lambda c, n: smooth_load(c, n, 0.7, k, exclude_self=exclude_self), clean_TE, noisy_TE)


# ----------------------------------------------------------------------------------------------------------------------
# What gates return besides weights and losses, on a plan that is repeated


def default_case(name: str) -> Case:
    return next(case for case in cases() if case.name == name)


def gate_holds(gate: Gate, pick: Callable[[GateOutput], Any], *, padded: bool = False, mode: Mode = Mode.TRAIN) -> bool:
    """Finite differences by tokens, the previous layer's scores, and every parameter of the gate."""
    valid_T = torch.tensor([True, True, False, True, True, True]) if padded else None
    inp = tokens(6, gate.num_logits, mode=mode, dtype=torch.float64, noise_seed=2, valid_T=valid_T)
    plan = gate(inp).plan.detach()
    names, buffers = [name for name, _ in gate.named_parameters()], dict(gate.named_buffers())

    def outputs(x_TD: Tensor, prev_logits_TE: Tensor, *parameters: Tensor) -> Any:
        rng = torch.Generator().manual_seed(2)
        again: GateInput = replace(inp, x_TD=x_TD, prev_logits_TE=prev_logits_TE, replay=plan, rng=rng)
        state = {**dict(zip(names, parameters, strict=True)), **buffers}
        return pick(functional_call(gate, state, (again,)))

    assert inp.prev_logits_TE is not None
    inputs = [inp.x_TD, inp.prev_logits_TE, *gate.parameters()]
    return holds(outputs, *(value.detach().clone().requires_grad_() for value in inputs))


def test_output_of_zero_computation_experts() -> None:
    """By tokens, mixing map, constants, projection and residual map; tokens must visit every kind of free expert."""
    gate = default_case("zero_computation").gate(4, double=True)
    inp = tokens(6, gate.num_logits, mode=Mode.TRAIN, dtype=torch.float64, noise_seed=2)
    undispatched = gate(inp).plan.undispatched
    assert undispatched is not None
    assert set(undispatched.expert_N.tolist()) >= {1, 2, 3}, "copy and both constants: take another seed"
    for padded in (False, True):
        assert gate_holds(gate, lambda out: out.added_TD, padded=padded)

    added_TD = gate(inp).added_TD
    assert added_TD is not None
    grads = torch.autograd.grad(added_TD.square().sum(), [gate.get_parameter("mix"), gate.get_parameter("constant")])
    assert all(bool((grad.abs().sum(1) > 0).all()) for grad in grads), "a check of zeros says nothing"


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("mode", [Mode.TRAIN, Mode.EVAL])
def test_identity_path_of_base(mode: Mode, padded: bool) -> None:
    gate = default_case("base").gate(4, double=True)
    assert gate_holds(gate, lambda out: (out.plan.residual_T, out.plan.weight_N), padded=padded, mode=mode)


@pytest.mark.parametrize("slots", [1, 3])
@pytest.mark.parametrize("padded", [False, True])
def test_slots_of_soft(slots: int, padded: bool) -> None:
    """Dispatch mixes over tokens, so that padding must have no part in anybody's gradient."""
    gate = Case("soft", {"slots": slots}).gate(3, double=True)

    def parts(out: GateOutput) -> tuple[Tensor, Tensor]:
        assert out.plan.slots is not None
        return out.plan.slots.dispatch_TS, out.plan.slots.combine_TS

    assert gate_holds(gate, parts, padded=padded)


def has_logits(name: str) -> bool:
    gate = default_case(name).gate(double=True)
    return gate(tokens(3, gate.num_logits, dtype=torch.float64)).logits_TE is not None


@pytest.mark.parametrize("name", [name for name in gate_names() if has_logits(name)])
def test_logits(name: str) -> None:
    """They feed the next layer's gate, whose loss must reach this one's parameters."""
    case = default_case(name)
    gate = case.gate(case.few_experts, double=True)
    assert gate_holds(gate, lambda out: out.logits_TE)
    logits_TE = gate(tokens(6, gate.num_logits, dtype=torch.float64)).logits_TE
    assert logits_TE is not None
    assert logits_TE.requires_grad, "a check of constants says nothing"
