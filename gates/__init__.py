"""Routing strategies for mixture-of-experts layers. Importing this package registers the built-in gates."""

from gates.base import Causality, Gate, GateConfig, GateInput, GateNumericsError, GateOutput, Mode
from gates.plan import PlanKind, RoutingPlan
from gates.registry import GateField, build_gate, gate_names, gate_type, parse_gate_config, register_gate
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
    "TopKConfig",
    "TopKGate",
    "build_gate",
    "gate_names",
    "gate_type",
    "parse_gate_config",
    "register_gate",
]
