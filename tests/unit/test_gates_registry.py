"""Gates by name, as config values, from other people's modules."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from pydantic import BaseModel, ValidationError

from gates import (
    Gate,
    GateConfig,
    GateField,
    GateInput,
    GateOutput,
    RoutingPlan,
    TopKConfig,
    TopKGate,
    build_gate,
    gate_names,
    gate_type,
    parse_gate_config,
    register_gate,
    registry,
)

pytestmark = pytest.mark.unit


class FirstConfig(GateConfig):
    name: Literal["first"] = "first"

    def num_params(self, dim: int, num_experts: int) -> int:
        return 0

    def experts_per_token(self, num_experts: int) -> float:
        return 1.0


class FirstGate(Gate):
    """Everyone to expert 0."""

    config_type = FirstConfig

    def route(self, inp: GateInput) -> GateOutput:
        index_T1 = torch.zeros(inp.x_TD.shape[0], 1, dtype=torch.int64)
        return GateOutput(RoutingPlan.from_topk(index_T1, torch.ones_like(index_T1).float(), self.num_experts))


@pytest.fixture
def own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_GATES", dict(registry._GATES))


@pytest.mark.usefixtures("own_registry")
def test_a_gate_of_ones_own() -> None:
    register_gate("first")(FirstGate)
    assert {"first", "topk"} <= set(gate_names())
    gate = build_gate("first", 4, 3)
    assert isinstance(gate, FirstGate)
    assert gate(GateInput(torch.zeros(2, 4))).plan.load_E.tolist() == [2, 0, 0]
    assert register_gate("first")(FirstGate) is FirstGate, "the same class again is no clash"


@pytest.mark.usefixtures("own_registry")
def test_a_taken_name_is_refused() -> None:
    class Pretender(Gate):
        config_type = TopKConfig

        def route(self, inp: GateInput) -> GateOutput:
            raise AssertionError

    with pytest.raises(ValueError, match=r"gate 'topk' is already registered by gates\.topk\.TopKGate"):
        register_gate("topk")(Pretender)


def test_a_config_of_another_name_is_refused() -> None:
    with pytest.raises(TypeError, match="FirstGate: config_type must have a field name with default 'second'"):
        register_gate("second")(FirstGate)


def test_unknown_name_offers_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"unknown gate 'top_k'\. Did you mean 'topk'\? Known: .*topk"):
        gate_type("top_k")
    with pytest.raises(ValueError, match=r"unknown gate 'zzz'\. Known: "):
        build_gate("zzz", 4, 4)


def test_what_a_gate_value_may_be() -> None:
    for value in ("topk", {"name": "topk"}, TopKConfig()):
        assert parse_gate_config(value) == TopKConfig()
    assert isinstance(build_gate({"name": "topk", "k": 3}, 4, 4), TopKGate)
    for bad in ({"k": 2}, {"name": 3}, 7):
        with pytest.raises(ValueError, match=r"a gate is a name or a mapping with a 'name'; known names: .*topk"):
            parse_gate_config(bad)  # type: ignore[arg-type]
    with pytest.raises(ValidationError, match="renormalize"):
        parse_gate_config({"name": "topk", "renormalize": True})


def test_as_a_field_of_a_config() -> None:
    class Run(BaseModel):
        gate: GateField = TopKConfig()

    run = Run.model_validate({"gate": {"name": "topk", "k": 3}})
    assert isinstance(run.gate, TopKConfig)
    assert run.gate.k == 3
    assert run.model_dump()["gate"]["k"] == 3, "the fields of the gate's own type are written out"
    assert Run.model_validate(run.model_dump()) == run
