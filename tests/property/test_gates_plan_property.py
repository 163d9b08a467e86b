"""Routing plans and their transforms for any mask, weight and padding, against loops over lists.

Shape suffixes: T tokens, U tokens that are no padding, E experts, S slots, N and M pairs, K experts per token.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gates import GateInput, Mode, PlanKind, RoutingPlan, Slots, gate_names
from gates.capacity import DropPolicy, apply_capacity
from gates.plan import apply_permutation, insert_padding, keep_pairs, remove_padding
from tests.gate_conformance import Case, assert_legal, cases, tokens

pytestmark = pytest.mark.unit
POLICIES: list[DropPolicy] = ["position", "choice", "probs", "random"]
quick = settings(max_examples=80, deadline=None)
Rows = list[list[tuple[int, float]]]


def rows_of(plan: RoutingPlan) -> Rows:
    """(expert, weight) of every token, in order."""
    pairs = list(zip(plan.expert_N.tolist(), plan.weight_N.tolist(), strict=True))
    return [pairs[begin:end] for begin, end in itertools.pairwise(plan.row_ptr_T1.tolist())]


def count(rows: Rows, num_experts: int) -> list[int]:
    return [sum(e == expert for row in rows for e, _ in row) for expert in range(num_experts)]


def assert_is(plan: RoutingPlan, rows: Rows, num_experts: int) -> None:
    """The plan holds these rows, and everything that follows from them."""
    assert rows_of(plan) == rows
    assert plan.row_ptr_T1.tolist() == [sum(map(len, rows[:t])) for t in range(len(rows) + 1)]
    assert plan.num_experts == num_experts
    assert plan.load_E.tolist() == count(rows, num_experts)
    assert plan.token_N().tolist() == [t for t, row in enumerate(rows) for _ in row]
    dense = [[dict(row).get(e, 0.0) for e in range(num_experts)] for row in rows]
    assert plan.dense_weight_TE().tolist() == dense
    assert plan.uniform_k is None or all(len(row) == plan.uniform_k for row in rows)


def assert_same(plan: RoutingPlan | None, other: RoutingPlan | None) -> None:
    """Equal in every array, those of the plans within too."""
    if plan is None or other is None:
        assert plan is other
        return
    assert plan.num_experts == other.num_experts
    for name in ("row_ptr_T1", "expert_N", "weight_N", "load_E", "offered_E", "residual_T", "kept_M"):
        value, wanted = getattr(plan, name), getattr(other, name)
        assert (value is None) == (wanted is None), name
        assert value is None or torch.equal(value, wanted), name
    assert_same(plan.before_drop, other.before_drop)
    assert_same(plan.undispatched, other.undispatched)


def weights(draw: st.DrawFn, *shape: int) -> Tensor:
    rng = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    return torch.rand(*shape, generator=rng, dtype=torch.float64) + 0.01


def booleans(draw: st.DrawFn, *shape: int) -> Tensor:
    """Of any density, all False and all True among them."""
    size = torch.Size(shape).numel()
    dense = draw(st.sampled_from([None, True, False]))
    drawn = draw(st.lists(st.booleans(), min_size=size, max_size=size)) if dense is None else [dense] * size
    return torch.tensor(drawn, dtype=torch.bool).view(shape)


@st.composite
def masks(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """(T, E) bool, and weights of the same shape."""
    num_tokens, num_experts = draw(st.integers(0, 8)), draw(st.integers(1, 5))
    return booleans(draw, num_tokens, num_experts), weights(draw, num_tokens, num_experts)


@st.composite
def choices(draw: st.DrawFn) -> tuple[Tensor, Tensor, int]:
    """(T, K) distinct experts of each token in any order, their weights, and E."""
    num_tokens, num_experts = draw(st.integers(0, 8)), draw(st.integers(1, 5))
    k = draw(st.integers(1, num_experts))
    order_TE = [draw(st.permutations(range(num_experts))) for _ in range(num_tokens)]
    expert_TK = torch.tensor(order_TE, dtype=torch.int64).view(num_tokens, num_experts)[:, :k]
    return expert_TK, weights(draw, num_tokens, k), num_experts


@st.composite
def plans(draw: st.DrawFn) -> RoutingPlan:
    """With or without drops, a residual, and pairs that need no dispatch."""
    by_mask = draw(st.booleans())
    plan = RoutingPlan.from_mask(*draw(masks())) if by_mask else RoutingPlan.from_topk(*draw(choices()))
    if draw(st.booleans()):
        plan = replace(plan, residual_T=weights(draw, plan.num_tokens))
    if draw(st.booleans()):
        free = booleans(draw, plan.num_tokens, 2)
        plan = replace(plan, undispatched=RoutingPlan.from_mask(free, weights(draw, plan.num_tokens, 2)))
    return keep_pairs(plan, booleans(draw, plan.num_pairs)) if draw(st.booleans()) else plan


@st.composite
def paddings(draw: st.DrawFn, num_valid: int) -> Tensor:
    """(T,) bool with so many True."""
    return torch.tensor(draw(st.permutations([True] * num_valid + [False] * draw(st.integers(0, 4)))), dtype=torch.bool)


# ----------------------------------------------------------------------------------------------------------------------
# Plans that are made


@quick
@given(masks())
def test_from_mask_against_a_loop(drawn: tuple[Tensor, Tensor]) -> None:
    mask_TE, weight_TE = drawn
    plan = RoutingPlan.from_mask(mask_TE, weight_TE)
    num_experts = mask_TE.shape[1]
    rows: Rows = [
        [(e, weight) for e, (visits, weight) in enumerate(zip(mask, weight_E, strict=True)) if visits]
        for mask, weight_E in zip(mask_TE.tolist(), weight_TE.tolist(), strict=True)
    ]
    assert_is(plan, rows, num_experts)
    assert plan.offered_E.tolist() == plan.load_E.tolist()
    every = bool(rows) and all(len(row) == num_experts for row in rows)
    assert plan.kind is (PlanKind.DENSE if every else PlanKind.SPARSE)
    assert plan.uniform_k == (num_experts if every else None)


@quick
@given(choices(), st.data())
def test_from_topk_against_a_loop(drawn: tuple[Tensor, Tensor, int], data: st.DataObject) -> None:
    expert_TK, weight_TK, num_experts = drawn
    num_tokens, k = expert_TK.shape
    valid = data.draw(st.none() | st.lists(st.booleans(), min_size=num_tokens, max_size=num_tokens))
    valid_T = None if valid is None else torch.tensor(valid, dtype=torch.bool)
    plan = RoutingPlan.from_topk(expert_TK, weight_TK, num_experts, valid_T)
    rows: Rows = [
        list(zip(experts, weight_K, strict=True)) if valid is None or valid[t] else []
        for t, (experts, weight_K) in enumerate(zip(expert_TK.tolist(), weight_TK.tolist(), strict=True))
    ]
    assert_is(plan, rows, num_experts)
    assert plan.offered_E.tolist() == plan.load_E.tolist()
    assert plan.uniform_k == (k if valid is None or all(valid) else None)


@quick
@given(plans(), st.integers(0, 2**32))
def test_what_a_plan_makes_of_values_against_loops(plan: RoutingPlan, seed: int) -> None:
    """pick, sum_rows, softmax_rows and the order by expert."""
    rng = torch.Generator().manual_seed(seed)
    value_TE = torch.randn(plan.num_tokens, plan.num_experts, generator=rng, dtype=torch.float64)
    rows = rows_of(plan)
    picked = [value_TE[t, e].item() for t, row in enumerate(rows) for e, _ in row]
    assert plan.pick(value_TE).tolist() == picked
    sums = [sum(value_TE[t, e].item() for e, _ in row) for t, row in enumerate(rows)]
    value_N = torch.tensor(picked, dtype=torch.float64)
    assert plan.sum_rows(value_N).tolist() == pytest.approx(sums)
    soft = [p for t, row in enumerate(rows) for p in value_TE[t, [e for e, _ in row]].softmax(0).tolist()]
    assert plan.softmax_rows(value_N).tolist() == pytest.approx(soft)
    pairs = sorted((e, pair) for pair, e in enumerate(plan.expert_N.tolist()))
    assert plan.expert_order_N().tolist() == [pair for _, pair in pairs]


# ----------------------------------------------------------------------------------------------------------------------
# Padding


@quick
@given(plans(), st.data())
def test_padding_goes_in_and_out_again(plan: RoutingPlan, data: st.DataObject) -> None:
    valid_T = data.draw(paddings(plan.num_tokens))
    padded = insert_padding(plan, valid_T)
    rows = iter(rows_of(plan))
    assert_is(padded, [next(rows) if valid else [] for valid in valid_T.tolist()], plan.num_experts)
    if plan.residual_T is not None:
        assert padded.residual_T is not None
        residual = iter(plan.residual_T.tolist())
        assert padded.residual_T.tolist() == [next(residual) if valid else 0.0 for valid in valid_T.tolist()]
    assert_same(remove_padding(padded, valid_T), plan)
    assert_same(insert_padding(remove_padding(padded, valid_T), valid_T), padded)


@quick
@given(st.integers(0, 5), st.integers(1, 3), st.integers(1, 2), st.data())
def test_padding_goes_in_and_out_of_slots_again(
    num_tokens: int, num_experts: int, slots_per_expert: int, data: st.DataObject
) -> None:
    draw, shape = data.draw, (num_tokens, num_experts * slots_per_expert)
    rng = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    slots = Slots(torch.rand(shape, generator=rng), torch.rand(shape, generator=rng), slots_per_expert)
    everyone = torch.ones(num_tokens, num_experts, dtype=torch.bool)
    plan = replace(RoutingPlan.from_mask(everyone, everyone.double()), kind=PlanKind.SLOTS, slots=slots)
    valid_T = draw(paddings(num_tokens))
    padded = insert_padding(plan, valid_T)
    assert padded.slots is not None
    for part, whole in ((slots.dispatch_TS, padded.slots.dispatch_TS), (slots.combine_TS, padded.slots.combine_TS)):
        assert torch.equal(whole[valid_T], part)
        assert not bool(whole[~valid_T].any())
    back = remove_padding(padded, valid_T)
    assert_same(back, plan)
    assert back.slots is not None
    assert torch.equal(back.slots.dispatch_TS, slots.dispatch_TS)
    assert torch.equal(back.slots.combine_TS, slots.combine_TS)


@quick
@given(masks(), st.data())
def test_padding_that_is_routed_is_refused(drawn: tuple[Tensor, Tensor], data: st.DataObject) -> None:
    mask_TE, weight_TE = drawn
    plan = RoutingPlan.from_mask(mask_TE, weight_TE)
    valid = data.draw(st.lists(st.booleans(), min_size=plan.num_tokens, max_size=plan.num_tokens))
    if all(ok or not any(row) for ok, row in zip(valid, mask_TE.tolist(), strict=True)):
        remove_padding(plan, torch.tensor(valid, dtype=torch.bool))
        return
    with pytest.raises(ValueError, match="the plan routes tokens that are padding"):
        remove_padding(plan, torch.tensor(valid, dtype=torch.bool))


# ----------------------------------------------------------------------------------------------------------------------
# Permutations


@quick
@given(plans(), st.data())
def test_relabelling_and_back(plan: RoutingPlan, data: st.DataObject) -> None:
    expert_of = data.draw(st.permutations(range(plan.num_experts)))
    moved = apply_permutation(plan, torch.tensor(expert_of))
    rows: Rows = [[(expert_of[e], weight) for e, weight in row] for row in rows_of(plan)]
    assert_is(moved, rows, plan.num_experts)
    columns = {expert_of[e]: column for e, column in enumerate(plan.dense_weight_TE().t().tolist())}
    assert moved.dense_weight_TE().t().tolist() == [columns[e] for e in range(plan.num_experts)]
    assert moved.offered_E[torch.tensor(expert_of)].tolist() == plan.offered_E.tolist()
    if moved.before_drop is not None:
        assert moved.kept_M is not None
        assert moved.before_drop.expert_N[moved.kept_M].tolist() == moved.expert_N.tolist()
        assert moved.before_drop.load_E.tolist() == moved.offered_E.tolist()
    assert_same(apply_permutation(moved, torch.tensor([expert_of.index(e) for e in range(plan.num_experts)])), plan)


@quick
@given(plans(), st.data())
def test_relabelling_does_not_mind_padding_and_drops(plan: RoutingPlan, data: st.DataObject) -> None:
    valid_T = data.draw(paddings(plan.num_tokens))
    order_E = torch.tensor(data.draw(st.permutations(range(plan.num_experts))))
    keep_N = torch.tensor(data.draw(st.lists(st.booleans(), min_size=plan.num_pairs, max_size=plan.num_pairs)))
    keep_N = keep_N.bool()
    one = insert_padding(keep_pairs(apply_permutation(plan, order_E), keep_N), valid_T)
    other = apply_permutation(keep_pairs(insert_padding(plan, valid_T), keep_N), order_E)
    assert_same(one, other)


# ----------------------------------------------------------------------------------------------------------------------
# Drops


@quick
@given(masks() | choices(), st.data())
def test_dropping_twice_is_dropping_once(
    drawn: tuple[Tensor, Tensor] | tuple[Tensor, Tensor, int], data: st.DataObject
) -> None:
    plan = RoutingPlan.from_mask(*drawn) if len(drawn) == 2 else RoutingPlan.from_topk(*drawn)
    first = data.draw(st.lists(st.booleans(), min_size=plan.num_pairs, max_size=plan.num_pairs))
    second = data.draw(st.lists(st.booleans(), min_size=sum(first), max_size=sum(first)))
    left = iter(second)
    both = [stays and next(left) for stays in first]
    once = keep_pairs(plan, torch.tensor(first, dtype=torch.bool))
    remembered = None if once.kept_M is None else once.kept_M.tolist()
    twice = keep_pairs(once, torch.tensor(second, dtype=torch.bool))
    at_once = keep_pairs(plan, torch.tensor(both, dtype=torch.bool))
    assert_same(twice, at_once)
    assert twice.uniform_k == at_once.uniform_k
    assert twice.kind is at_once.kind
    assert remembered == (None if once.kept_M is None else once.kept_M.tolist()), "the plan before is left alone"

    stays = iter(both)
    rows: Rows = [[pair for pair in row if next(stays)] for row in rows_of(plan)]
    assert_is(twice, rows, plan.num_experts)
    assert twice.offered_E.tolist() == plan.load_E.tolist()
    assert int(twice.dropped) == both.count(False)
    if all(both):
        assert twice is plan
    else:
        assert twice.kept_M is not None
        assert twice.kept_M.tolist() == both
        assert_same(twice.before_drop, plan)


@pytest.mark.parametrize("policy", POLICIES)
@quick
@given(plan=plans(), capacity=st.integers(0, 4), seed=st.integers(0, 99), data=st.data())
def test_capacity(policy: DropPolicy, plan: RoutingPlan, capacity: int, seed: int, data: st.DataObject) -> None:
    """On plans that have lost pairs before, too: whoever is dropped stood behind everyone whom that expert kept."""
    order = data.draw(st.permutations(range(plan.num_pairs)))
    score_N = torch.tensor(order, dtype=torch.float64)

    def limited() -> RoutingPlan:
        return apply_capacity(plan, capacity, policy, score_N, torch.Generator().manual_seed(seed))

    got = limited()
    assert_same(got, limited())
    assert got.load_E.tolist() == [min(load, capacity) for load in plan.load_E.tolist()]
    assert got.offered_E.tolist() == plan.offered_E.tolist()
    assert int(got.dropped) == int(plan.dropped) + plan.num_pairs - got.num_pairs
    assert (got is plan) == (plan.load_E.tolist() == got.load_E.tolist())
    if got.kept_M is None:
        return
    first = got.before_drop
    assert first is not None
    assert first.before_drop is None
    assert first.expert_N[got.kept_M].tolist() == got.expert_N.tolist()
    assert first.token_N()[got.kept_M].tolist() == got.token_N().tolist()
    kept = got.kept_M.tolist() if plan.kept_M is None else got.kept_M[plan.kept_M].tolist()
    assert_is(got, [[pair for pair, stays in row if stays] for row in zipped(rows_of(plan), kept)], plan.num_experts)
    if policy == "random":
        return  # a random order has no other rule than the counts
    token, begins = plan.token_N().tolist(), plan.row_ptr_T1.tolist()

    def place(pair: int) -> tuple[int, int]:
        before = {"position": 0, "choice": pair - begins[token[pair]], "probs": -order[pair]}
        return before[policy], pair

    for expert in range(plan.num_experts):
        mine = [pair for pair in range(plan.num_pairs) if int(plan.expert_N[pair]) == expert]
        served = [place(pair) for pair in mine if kept[pair]]
        refused = [place(pair) for pair in mine if not kept[pair]]
        assert not served or not refused or max(served) < min(refused)


def zipped(rows: Rows, kept: list[bool]) -> list[list[tuple[tuple[int, float], bool]]]:
    """Each row's pairs beside whether they stay."""
    stays = iter(kept)
    return [[(pair, next(stays)) for pair in row] for row in rows]


# ----------------------------------------------------------------------------------------------------------------------
# Plans of gates


def default_case(name: str) -> Case:
    return next(case for case in cases() if case.name == name)


@pytest.mark.parametrize("name", gate_names())
@settings(max_examples=12, deadline=None)
@given(
    num_tokens=st.integers(0, 40),
    seed=st.integers(0, 2**31),
    mode=st.sampled_from(list(Mode)),
    noisy=st.booleans(),
    padded=st.booleans(),
    data=st.data(),
)
def test_plans_of_gates_are_legal(
    name: str, num_tokens: int, seed: int, mode: Mode, noisy: bool, padded: bool, data: st.DataObject
) -> None:
    """And so are their replays, which hold the same pairs."""
    case = default_case(name)
    gate = case.gate(data.draw(st.sampled_from(case.expert_counts)), seed=seed % 997)
    valid_T = torch.rand(num_tokens, generator=torch.Generator().manual_seed(seed)) < 0.7 if padded else None

    def asked() -> GateInput:
        noise = seed if noisy else None
        return tokens(num_tokens, gate.num_logits, mode=mode, seed=seed, noise_seed=noise, valid_T=valid_T)

    plan = gate(asked()).plan
    assert_legal(plan, gate, asked())
    again = gate(replace(asked(), replay=plan.detach())).plan
    assert_legal(again, gate, asked())
    assert again.row_ptr_T1.tolist() == plan.row_ptr_T1.tolist()
    assert again.expert_N.tolist() == plan.expert_N.tolist()
    if plan.slots is not None:
        mixed_TS = plan.slots.dispatch_TS
        assert (
            mixed_TS.shape
            == plan.slots.combine_TS.shape
            == (num_tokens, plan.slots.slots_per_expert * gate.num_experts)
        )
        somebody = num_tokens and (valid_T is None or bool(valid_T.any()))
        assert mixed_TS.sum(0).tolist() == pytest.approx([1.0 if somebody else 0.0] * mixed_TS.shape[1], abs=1e-5)
