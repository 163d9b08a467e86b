"""What every gate must do, whatever its strategy. See tests/gate_conformance.py for the gates and options."""

from __future__ import annotations

import copy
import json
import re
import sys
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torch.func import functional_call

from gates import (
    Causality,
    Gate,
    GateInput,
    GateNumericsError,
    Mode,
    build_gate,
    gate_names,
    gate_type,
    parse_gate_config,
)
from tests.gate_conformance import (
    DIM,
    TOKEN_COUNTS,
    Case,
    assert_legal,
    assert_same_rows,
    cases,
    live,
    rows,
    take,
    tokens,
)

pytestmark = pytest.mark.unit
every_gate = pytest.mark.parametrize("case", cases(), ids=lambda case: case.id)


def with_cases(wanted: Callable[[Gate], bool]) -> pytest.MarkDecorator:
    found = [case for case in cases() if wanted(case.gate())]
    return pytest.mark.parametrize("case", found, ids=lambda case: case.id)


# Without a surrogate the trainer refuses a gate in a language model (tests/e2e/test_train_gates.py).
gates_that_generate = with_cases(lambda gate: gate.causal_surrogate() is not None)
gates_that_look_at_tokens = with_cases(lambda gate: any(p.dim() > 1 for p in gate.parameters()))


def served(gate: Gate) -> Gate:
    """The gate that generates text."""
    surrogate = gate.causal_surrogate()
    assert surrogate is not None
    return surrogate


@every_gate
def test_legal_plan_for_every_size(case: Case) -> None:
    assert len(case.expert_counts) >= 2, "options that fit hardly any number of experts prove little"
    for num_experts in case.expert_counts:
        gate = case.gate(num_experts)
        for num_tokens in TOKEN_COUNTS:
            for mode, seed in ((Mode.TRAIN, 1), (Mode.TRAIN, None), (Mode.EVAL, None), (Mode.PREFILL, None)):
                inp = tokens(num_tokens, gate.num_logits, mode=mode, noise_seed=seed)
                out = gate(inp)
                assert_legal(out.plan, gate, inp)
                if out.logits_TE is not None:
                    assert out.logits_TE.shape == (num_tokens, gate.num_logits)
                    assert out.logits_TE.dtype == torch.float32
                for value in (*out.aux.values(), *out.metrics.values()):
                    assert value.dim() == 0
                    assert bool(torch.isfinite(value))
                assert not any(value.requires_grad for value in out.metrics.values())
                assert not out.aux or mode is not Mode.PREFILL


@pytest.mark.parametrize("name", gate_names())
def test_a_single_expert_is_routed_to_or_refused_by_name(name: str) -> None:
    routed = 0
    own = [case for case in cases() if case.name == name]
    for case in (fitted for given in own for fitted in given.with_one_expert()):
        refusal = ""
        try:
            config = parse_gate_config({"name": name, **case.options})
            problems = config.check(1)
            if not problems:
                gate = build_gate(config, DIM, 1)
                live(gate, range(3))
        except ValidationError:
            continue  # k: 1 may be no option at all
        except ValueError as error:
            refusal = str(error)
        if refusal:
            assert re.match(r"gate\.\w+: ", refusal), "of a file, which names a field"
            continue
        if problems:
            assert all(re.match(r"[a-z_.]+: .{10}", problem) for problem in problems), problems
            continue
        routed += 1
        for num_tokens in (0, 1, 9):
            for mode in (Mode.TRAIN, Mode.EVAL, Mode.DECODE):
                inp = tokens(num_tokens, gate.num_logits, mode=mode)
                assert_legal(gate(inp).plan, gate, inp)
    reads_a_file = any(case.config.files() for case in own)
    assert routed or reads_a_file, "no options fit a single expert"


@every_gate
def test_padding_is_routed_and_counted_nowhere(case: Case) -> None:
    gate = case.gate()
    valid_T = torch.rand(40, generator=torch.Generator().manual_seed(3)) < 0.6
    for mode in (Mode.TRAIN, Mode.EVAL):
        inp = tokens(40, gate.num_logits, mode=mode, valid_T=valid_T)
        without = gate(take(inp, valid_T.nonzero().squeeze(1), valid_T=None))
        inp.x_TD[~valid_T] = torch.nan  # padding may hold anything
        out = gate(inp)
        assert_legal(out.plan, gate, inp)
        assert torch.equal(out.plan.expert_N, without.plan.expert_N)
        assert torch.equal(out.plan.load_E, without.plan.load_E)
        torch.testing.assert_close(out.plan.weight_N, without.plan.weight_N)
        for name, loss in without.aux.items():
            torch.testing.assert_close(out.aux[name], loss)
        for name, value in without.metrics.items():
            torch.testing.assert_close(out.metrics[name], value)
        nothing = gate(tokens(7, gate.num_logits, mode=mode, valid_T=torch.zeros(7, dtype=torch.bool)))
        assert nothing.plan.num_pairs == 0
        assert nothing.plan.row_ptr_T1.tolist() == [0] * 8
        assert all(bool(torch.isfinite(loss)) for loss in nothing.aux.values())


@every_gate
def test_all_valid_mask_changes_nothing(case: Case) -> None:
    gate = case.gate()
    inp = tokens(20, gate.num_logits)
    out, masked = gate(inp), gate(replace(inp, valid_T=torch.ones(20, dtype=torch.bool)))
    assert torch.equal(out.plan.expert_N, masked.plan.expert_N)
    assert torch.equal(out.plan.weight_N, masked.plan.weight_N)
    assert out.plan.uniform_k == masked.plan.uniform_k


@pytest.mark.parametrize("case", [case for case in cases() if case.equivariant], ids=lambda case: case.id)
def test_relabelled_experts_give_the_relabelled_plan(case: Case) -> None:
    """Of gates whose experts are interchangeable, by their own word."""
    gate = case.gate()
    order_E = torch.randperm(gate.num_experts, generator=torch.Generator().manual_seed(5))
    relabelled = copy.deepcopy(gate)
    state = {
        key: value[order_E] if value.dim() and value.shape[0] == gate.num_experts else value
        for key, value in gate.state_dict().items()
    }
    relabelled.load_state_dict(state)
    inp = tokens(30, gate.num_logits)
    dense_TE = gate(inp).plan.dense_weight_TE()
    torch.testing.assert_close(relabelled(inp).plan.dense_weight_TE(), dense_TE[:, order_E])


@every_gate
def test_gradients_match_finite_differences_on_a_fixed_plan(case: Case) -> None:
    gate = case.gate(case.few_experts, double=True)
    inp = tokens(7, gate.num_logits, mode=Mode.TRAIN, dtype=torch.float64, noise_seed=2)
    plan = gate(inp).plan.detach()
    names = [name for name, _ in gate.named_parameters()]
    buffers = dict(gate.named_buffers())

    def differentiable(x_TD: Tensor, *params: Tensor) -> tuple[Tensor, ...]:
        again = replace(inp, x_TD=x_TD, replay=plan, rng=torch.Generator().manual_seed(2))
        out = functional_call(gate, {**dict(zip(names, params, strict=True)), **buffers}, (again,))
        slots = out.plan.slots
        values = (
            out.plan.weight_N,
            *(out.aux[name] for name in sorted(out.aux)),
            out.added_TD,
            out.plan.residual_T,
            *((slots.dispatch_TS, slots.combine_TS) if slots else ()),
        )
        return tuple(value for value in values if value is not None and value.requires_grad)

    arguments = [inp.x_TD.clone().requires_grad_(), *(p.detach().clone().requires_grad_() for p in gate.parameters())]
    outputs = differentiable(*arguments)
    if not outputs:
        assert names == [], "a gate with parameters must have a gradient"
        return
    assert torch.autograd.gradcheck(differentiable, arguments, fast_mode=True)


@every_gate
def test_same_input_same_output(case: Case) -> None:
    gate = case.gate()
    live(gate, range(2))
    for mode, seed in ((Mode.EVAL, None), (Mode.PREFILL, None), (Mode.TRAIN, 4)):
        first = gate(tokens(50, gate.num_logits, mode=mode, noise_seed=seed))
        second = gate(tokens(50, gate.num_logits, mode=mode, noise_seed=seed))
        assert torch.equal(first.plan.expert_N, second.plan.expert_N)
        assert torch.equal(first.plan.weight_N, second.plan.weight_N)
        assert {k: v.item() for k, v in first.aux.items()} == {k: v.item() for k, v in second.aux.items()}


@every_gate
def test_generation_ignores_the_generator(case: Case) -> None:
    gate = case.gate()
    for mode in (Mode.EVAL, Mode.PREFILL):
        quiet = gate(tokens(30, gate.num_logits, mode=mode))
        seeded = gate(tokens(30, gate.num_logits, mode=mode, noise_seed=9))
        assert torch.equal(quiet.plan.expert_N, seeded.plan.expert_N)
        assert torch.equal(quiet.plan.weight_N, seeded.plan.weight_N)


@every_gate
def test_initial_parameters_come_from_the_generator(case: Case) -> None:
    gates = [build_gate(case.config, DIM, case.expert_counts[-1]) for _ in range(2)]
    gates[1].double()
    for gate in gates:
        gate.reset_parameters(torch.Generator().manual_seed(11))
    for (name, a), (_, b) in zip(gates[0].state_dict().items(), gates[1].state_dict().items(), strict=True):
        assert torch.equal(a, b.to(a.dtype)), f"{name} depends on something else than the generator"


@every_gate
def test_state_survives_a_checkpoint_in_the_middle_of_its_schedule(case: Case) -> None:
    gate = case.gate(seed=1)
    live(gate, range(3))
    restored = case.gate(seed=2)
    restored.load_state_dict(copy.deepcopy(gate.state_dict()))
    live(gate, range(3, 6))
    live(restored, range(3, 6))
    for (name, a), (_, b) in zip(gate.state_dict().items(), restored.state_dict().items(), strict=True):
        assert torch.equal(a, b), f"{name} went another way after loading"
    inp = tokens(30, gate.num_logits)
    assert torch.equal(gate(inp).plan.weight_N, restored(inp).plan.weight_N)


@every_gate
@pytest.mark.parametrize("padded", [False, True])
def test_replay_repeats_the_plan(case: Case, padded: bool) -> None:
    gate = case.gate()
    valid_T = torch.arange(60) % 7 != 3 if padded else None
    for mode, seed in ((Mode.EVAL, None), (Mode.TRAIN, 6), (Mode.TRAIN, None)):
        inp = tokens(60, gate.num_logits, mode=mode, noise_seed=seed, valid_T=valid_T)
        first = gate(inp)
        again = tokens(60, gate.num_logits, mode=mode, noise_seed=seed, valid_T=valid_T)
        second = gate(replace(again, replay=first.plan.detach()))
        for name in ("row_ptr_T1", "expert_N", "weight_N", "load_E", "offered_E"):
            assert torch.equal(getattr(first.plan, name), getattr(second.plan, name)), name
        assert second.plan.weight_N.requires_grad == first.plan.weight_N.requires_grad
        assert {k: v.item() for k, v in first.aux.items()} == {k: v.item() for k, v in second.aux.items()}
    other = case.gate(seed=77)
    moved = other(replace(again, replay=first.plan.detach())).plan
    assert torch.equal(moved.expert_N, first.plan.expert_N), "a replay keeps the selection, whatever the weights"
    assert_legal(moved, other, again)


def probe(gate: Gate, inp: GateInput, changed_T: Tensor) -> tuple[list[dict[int, float]], list[dict[int, float]]]:
    """Rows before and after the tokens ``changed_T`` (bool) are replaced, with the same noise."""
    other = tokens(inp.x_TD.shape[0], gate.num_logits, seed=99)
    x_TD = torch.where(changed_T.unsqueeze(1), other.x_TD * 3, inp.x_TD)
    assert inp.ids_T is not None
    assert inp.prev_logits_TE is not None
    assert other.ids_T is not None
    assert other.prev_logits_TE is not None
    ids_T = torch.where(changed_T, other.ids_T, inp.ids_T)
    prev_TE = torch.where(changed_T.unsqueeze(1), other.prev_logits_TE, inp.prev_logits_TE)
    results = []
    for given in (inp, replace(inp, x_TD=x_TD, ids_T=ids_T, prev_logits_TE=prev_TE)):
        results.append(rows(gate(replace(given, rng=torch.Generator().manual_seed(8))).plan))
    return results[0], results[1]


@every_gate
def test_declared_causality_is_true(case: Case) -> None:
    gate = case.gate()
    inp = tokens(40, gate.num_logits, mode=Mode.TRAIN)
    inp = replace(inp, segment_T=torch.zeros(40, dtype=torch.int64), position_T=torch.arange(40))
    assert isinstance(gate.causality, Causality)
    if gate.causality is Causality.BATCH:
        # Declared, so it should show: some token's row depends on later tokens.
        differs = False
        for t in range(5, 40, 5):
            before, after = probe(gate, inp, torch.arange(40) > t)
            differs = differs or before[: t + 1] != after[: t + 1]
        assert differs, "declared BATCH, yet no earlier row moved"
        return
    for t in (0, 7, 20, 38):
        before, after = probe(gate, inp, torch.arange(40) > t)
        assert_same_rows(after[: t + 1], before[: t + 1], "later tokens were replaced")
        if gate.causality is Causality.PER_TOKEN:
            before, after = probe(gate, inp, torch.arange(40) != t)
            assert_same_rows([after[t]], [before[t]], f"all tokens but {t} were replaced")


@gates_that_generate
def test_the_served_gate_looks_at_no_neighbour(case: Case) -> None:
    gate = served(case.gate())
    assert gate.causality is Causality.PER_TOKEN
    inp = tokens(33, gate.num_logits, mode=Mode.PREFILL)
    whole = rows(gate(inp).plan)
    order_T = torch.randperm(33, generator=torch.Generator().manual_seed(1))
    shuffled = rows(gate(take(inp, order_T)).plan)
    assert_same_rows(shuffled, [whole[t] for t in order_T.tolist()], "the batch was shuffled")
    for t in range(33):
        alone = rows(gate(take(inp, torch.tensor([t]), mode=Mode.DECODE)).plan)
        assert_same_rows(alone, [whole[t]], f"token {t} came alone")
    for mode in (Mode.TRAIN, Mode.EVAL):
        if mode is Mode.EVAL or gate.trains_as_it_serves:
            assert_same_rows(rows(gate(replace(inp, mode=mode)).plan), whole, f"the mode was {mode}")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@every_gate
def test_parameters_that_are_not_finite_never_become_weights(case: Case, bad: float) -> None:
    """Each parameter in turn: a named error, or results without it."""
    for name in dict(case.gate().named_parameters()):
        gate = case.gate()
        with torch.no_grad():
            gate.get_parameter(name).view(-1)[0] = bad
        inp = tokens(20, gate.num_logits, mode=Mode.TRAIN, noise_seed=1)
        said = ""
        try:
            out = gate(inp)
        except GateNumericsError as error:
            said = str(error)
        if said:
            assert said.startswith(f"gate '{case.name}': ")
            continue
        assert bool(torch.isfinite(out.plan.weight_N).all()), name
        assert out.added_TD is None or bool(torch.isfinite(out.added_TD).all()), name


@gates_that_generate
def test_served_gate_shares_the_trained_parameters(case: Case) -> None:
    gate = case.gate()
    trained = {p.data_ptr() for p in gate.parameters()}
    assert {p.data_ptr() for p in served(gate).parameters()} <= trained


@gates_that_look_at_tokens
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_scores_that_are_not_finite_raise_a_named_error(case: Case, bad: float) -> None:
    gate = case.gate()
    inp = tokens(9, gate.num_logits)
    inp.x_TD[4] = bad
    with pytest.raises(GateNumericsError, match=rf"gate '{case.name}': scores of 1 of 9 tokens are NaN or infinite"):
        gate(inp)


@every_gate
def test_a_hundredfold_skew_gives_a_legal_plan(case: Case) -> None:
    gate = case.gate()
    with torch.no_grad():
        for param in gate.parameters():
            param.mul_(100)
            param[0] *= 100
    for mode, seed in ((Mode.TRAIN, 1), (Mode.EVAL, None)):
        inp = tokens(64, gate.num_logits, mode=mode, noise_seed=seed)
        out = gate(inp)
        assert_legal(out.plan, gate, inp)
        total = sum((loss for loss in out.aux.values()), out.plan.weight_N.sum())
        if total.requires_grad:
            total.backward()
            for name, param in gate.named_parameters():
                assert param.grad is None or bool(torch.isfinite(param.grad).all()), name


@every_gate
def test_autocast_does_not_reach_the_gate(case: Case) -> None:
    gate = case.gate()
    for mode, seed in ((Mode.EVAL, None), (Mode.TRAIN, 3)):
        plain = gate(tokens(50, gate.num_logits, mode=mode, noise_seed=seed))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            cast = gate(tokens(50, gate.num_logits, mode=mode, noise_seed=seed))
        assert torch.equal(plain.plan.expert_N, cast.plan.expert_N)
        assert torch.equal(plain.plan.weight_N, cast.plan.weight_N)
        assert {k: v.item() for k, v in plain.aux.items()} == {k: v.item() for k, v in cast.aux.items()}


@every_gate
def test_half_precision_tokens_are_routed_in_fp32(case: Case) -> None:
    gate = case.gate()
    inp = tokens(50, gate.num_logits, dtype=torch.bfloat16)
    out, wide = gate(inp), gate(replace(inp, x_TD=inp.x_TD.float()))
    assert_legal(out.plan, gate, inp)
    assert torch.equal(out.plan.expert_N, wide.plan.expert_N)
    assert torch.equal(out.plan.weight_N, wide.plan.weight_N)


@every_gate
def test_parameters_are_as_many_as_the_config_says(case: Case) -> None:
    for num_experts in case.expert_counts:
        gate = case.gate(num_experts)
        assert sum(p.numel() for p in gate.parameters()) == case.config.num_params(DIM, num_experts)
        assert 0 < case.config.experts_per_token(num_experts) <= num_experts


@every_gate
def test_every_loss_has_a_coefficient_and_the_other_way_round(case: Case) -> None:
    num_experts = case.expert_counts[-1]
    for name in case.config.aux_coefs():
        if f"{name}_coef" not in type(case.config).model_fields:
            continue  # of a gate within, which has its own case
        config = case.config.model_copy(update={f"{name}_coef": 1.0})
        if config.check(num_experts):
            continue
        gate = build_gate(config, DIM, num_experts)
        gate.reset_parameters(torch.Generator().manual_seed(0))
        out = gate(tokens(64, gate.num_logits, mode=Mode.TRAIN, noise_seed=0))
        assert set(out.aux) <= set(config.aux_coefs())
        assert name in out.aux, f"{name}_coef is 1, the loss is missing"
        assert out.aux[name].requires_grad


@every_gate
def test_options_survive_json_and_explain_themselves(case: Case) -> None:
    config = case.config
    assert parse_gate_config(json.loads(json.dumps(config.model_dump(mode="json")))) == config
    undocumented = [
        name for name, field in type(config).model_fields.items() if name != "name" and not field.description
    ]
    assert undocumented == []
    kind = gate_type(case.name)
    assert kind.config_type is type(config)
    assert (sys.modules[kind.__module__].__doc__ or "").strip(), "gates show prints the module's docstring"
