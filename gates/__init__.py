"""Routing strategies for mixture-of-experts layers. Importing this package registers the built-in gates."""

from gates import (  # noqa: F401  each registers its gates
    base_layer,
    comet,
    dense_to_sparse,
    dselect_k,
    expert_choice,
    feature_choice,
    forced,
    hash,
    local_search,
    mutual_choice,
    presets,
    relu,
    replay,
    sinkhorn,
    soft,
    sparse_ot,
    top_p,
    zero_computation,
)
from gates.base import Causality, Gate, GateConfig, GateInput, GateNumericsError, GateOutput, Mode, Steps
from gates.plan import PlanKind, RoutingPlan, Slots
from gates.registry import GateField, build_gate, gate_names, gate_type, parse_gate_config, register_gate
from gates.replay import record_routing
from gates.topk import TopKConfig, TopKGate

__all__ = [
    "Causality",
    "Gate",
    "GateConfig",
    "GateField",
    "GateInput",
    "GateNumericsError",
    "GateOutput",
    "Mode",
    "PlanKind",
    "RoutingPlan",
    "Slots",
    "Steps",
    "TopKConfig",
    "TopKGate",
    "build_gate",
    "gate_names",
    "gate_type",
    "parse_gate_config",
    "record_routing",
    "register_gate",
]
