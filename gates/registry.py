"""Gates by name: registration, look-up and construction from config values.

A gate is a config value: ``gate: {name: topk, k: 2}``. Other distributions add gates through the entry-point group
``moeyard.gates``; each entry point loads a module that calls :func:`register_gate`.
"""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Callable, Mapping
from functools import cache
from importlib.metadata import entry_points
from typing import Annotated, Any, TypeVar

from pydantic import BeforeValidator, SerializeAsAny

from gates.base import Gate, GateConfig

ENTRY_POINT_GROUP = "moeyard.gates"
_GATES: dict[str, type[Gate]] = {}
GateType = TypeVar("GateType", bound=type[Gate])


def register_gate(name: str) -> Callable[[GateType], GateType]:
    """Class decorator that makes a gate selectable as ``gate: {name: <name>}``.

    The class must set ``config_type``, whose ``name`` field defaults to the same name.
    """

    def register(gate_type: GateType) -> GateType:
        config_type = getattr(gate_type, "config_type", None)
        if config_type is None or config_type.model_fields["name"].default != name:
            raise TypeError(f"{gate_type.__name__}: config_type must have a field name with default {name!r}")
        known = _GATES.get(name)
        # The same class from a module that was imported twice (reload, notebooks) is not a clash.
        if known is not None and known.__qualname__ != gate_type.__qualname__:
            raise ValueError(f"gate {name!r} is already registered by {known.__module__}.{known.__qualname__}")
        _GATES[name] = gate_type
        return gate_type

    return register


@cache
def _load_entry_points() -> None:
    for entry_point in entry_points(group=ENTRY_POINT_GROUP):
        try:
            entry_point.load()
        except Exception as error:  # whatever a foreign module does: the other gates still work
            origin = entry_point.dist.name if entry_point.dist else "an unknown distribution"
            warnings.warn(
                f"gate {entry_point.name!r} of {origin} cannot be loaded from {entry_point.value}:"
                f" {type(error).__name__}: {error}",
                stacklevel=2,
            )


def gate_names() -> list[str]:
    """Names of all registered gates, sorted."""
    _load_entry_points()
    return sorted(_GATES)


def gate_type(name: str) -> type[Gate]:
    """The gate class registered as ``name``; ValueError with the nearest name when there is none."""
    _load_entry_points()
    if name not in _GATES:
        near = difflib.get_close_matches(name, _GATES, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"unknown gate {name!r}.{hint} Known: {', '.join(sorted(_GATES))}")
    return _GATES[name]


def parse_gate_config(value: str | Mapping[str, Any] | GateConfig) -> GateConfig:
    """``"topk"``, ``{"name": "topk", "k": 2}`` or a config object -> the typed config of that gate.

    Raises:
        ValueError: unknown name, or (as pydantic's ValidationError) options that this gate does not have.
    """
    if isinstance(value, GateConfig):
        return value
    if isinstance(value, str):
        value = {"name": value}
    if not isinstance(value, Mapping) or not isinstance(value.get("name"), str):
        raise ValueError(f"a gate is a name or a mapping with a 'name'; known names: {', '.join(gate_names())}")
    return gate_type(value["name"]).config_type.model_validate(dict(value))


def build_gate(gate: str | Mapping[str, Any] | GateConfig, dim: int, num_experts: int) -> Gate:
    """Construct the gate that a config value describes, for width ``dim`` and ``num_experts`` experts."""
    config = parse_gate_config(gate)
    return gate_type(config.name)(config, dim, num_experts)


GateField = Annotated[SerializeAsAny[GateConfig], BeforeValidator(parse_gate_config)]
"""Type of a config field that holds any registered gate's options, picked by ``name``."""
