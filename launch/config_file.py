"""From YAML and dotted overrides to a :class:`TrainConfig`, with every problem reported at once.

Precedence: defaults < the parent named by ``extends`` < the file < the command line. Each problem is one line:
where (file:line or "command line"), the dotted path, what is wrong, the nearest name, what is allowed.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import yaml
from pydantic import ValidationError

from gates import build_gate, gate_names, gate_type
from launch.config import TrainConfig
from launch.config_layers import COMMAND_LINE, RECIPES, Layers, find_config, merge_file, settle_unquoted
from launch.config_problems import describe, discard, mistyped_booleans, wants_text, wrong_combinations
from moe.errors import ConfigError

__all__ = [
    "COMMAND_LINE",
    "RECIPES",
    "ResolvedConfig",
    "config_from_values",
    "dump_config",
    "find_config",
    "flatten",
    "load_config",
    "schema",
    "structural_difference",
]


@dataclass(frozen=True)
class ResolvedConfig:
    """The config, the origin of every leaf by dotted path, and remarks (such as dropped options of a former gate)."""

    config: TrainConfig
    origins: Mapping[str, str]
    notes: Sequence[str]


def load_config(path: str | None, overrides: Sequence[str] = (), *, world_size: int | None = None) -> ResolvedConfig:
    """Read a config.

    Args:
        path: a YAML file, the bare name of a shipped recipe ("tiny"), or None for defaults.
        overrides: ``dotted.path=value`` each, the value parsed as YAML. A new ``gate.name`` counts first, wherever it
            stands among them.
        world_size: ranks that will train; None takes torchrun's WORLD_SIZE, or 1.

    Raises:
        ConfigError: with all problems.
    """
    layers = _new_layers()
    if path is not None:
        merge_file(layers, find_config(path))
    return _resolve(layers, overrides, world_size)


def config_from_values(
    values: Mapping[str, Any], overrides: Sequence[str], *, origin: str, world_size: int | None = None
) -> TrainConfig:
    """A config from stored plain values plus overrides; ``origin`` names their source in errors.

    ``world_size`` is that of :func:`load_config`.
    """
    layers = _new_layers()
    layers.merge(values, lambda _keys: origin)
    return _resolve(layers, overrides, world_size).config


def dump_config(config: TrainConfig) -> str:
    """The config as YAML that loads back to an equal config."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def schema() -> dict[str, Any]:
    """JSON Schema of a config file, with the options of every registered gate under ``$defs``."""
    result = TrainConfig.model_json_schema()
    gates = {name: gate_type(name).config_type.model_json_schema() for name in gate_names()}
    definitions = result.setdefault("$defs", {})
    definitions.pop("GateConfig", None)
    for name, gate in gates.items():
        definitions.update(gate.pop("$defs", {}))
        # Without a name a mapping would fit every gate; the default gate's may be left out.
        required = set(gate.get("required", ())) | ({"name"} if name != TrainConfig().gate.name else set())
        definitions[f"gate:{name}"] = gate | ({"required": sorted(required)} if required else {})
    by_name = {"type": "string", "enum": list(gates)}
    result["properties"]["gate"] = {"anyOf": [by_name, *({"$ref": f"#/$defs/gate:{name}"} for name in gates)]}
    result["properties"]["extends"] = {"type": "string", "description": "a config file that this one changes"}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **result}


def structural_difference(old: TrainConfig, new: TrainConfig) -> tuple[list[str], list[str]]:
    """What differs between two configs, as ``"path: old -> new"``.

    Returns:
        (differences that make a checkpoint of ``old`` unusable for ``new``, all other differences).
    """
    shapes_before, shapes_after = _shapes(old), _shapes(new)
    compared = [path for path in shapes_before if not _left_to_the_fingerprint(path, old, new)]
    structural = [
        f"{path}: {shapes_before[path]!r} -> {shapes_after[path]!r}"
        for path in compared
        if shapes_before[path] != shapes_after[path]
    ]
    before, after = (flatten(config.model_dump(mode="json")) for config in (old, new))
    other_gate = old.gate.name == new.gate.name and _gate_state(old) != _gate_state(new)
    other: list[str] = []
    for path in sorted(before.keys() | after.keys()):
        if path in compared or before.get(path) == after.get(path):
            continue
        line = f"{path}: {before.get(path)!r} -> {after.get(path)!r}"
        # Any of the gate's options may be the one that gave it other tensors.
        (structural if other_gate and path.startswith("gate.") else other).append(line)
    return sorted(structural), other


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one mapping by dotted path; lists are leaves."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _shapes(config: TrainConfig) -> dict[str, object]:
    """Options that a checkpoint's tensors depend on, with what null stands for filled in."""
    model, tokenizer = config.model, config.data.tokenizer
    return {
        "model.vocab_size": model.vocab_size,
        "model.dim": model.dim,
        "model.num_layers": model.num_layers,
        "model.num_heads": model.num_heads,
        "model.num_kv_heads": model.kv_heads,
        "model.head_dim": model.width_per_head,
        "model.qk_norm": model.qk_norm,
        "model.tie_embeddings": model.tie_embeddings,
        "model.num_dense_layers": model.num_dense_layers,
        "model.dense_hidden_dim": model.dense_width(config.gate) if model.num_dense_layers else None,
        "model.moe.num_experts": model.moe.num_experts,
        "model.moe.hidden_dim": model.moe.hidden_dim,
        "model.moe.num_shared_experts": model.moe.num_shared_experts,
        "gate.name": config.gate.name,
        "data.tokenizer.kind": tokenizer.kind,
        "data.tokenizer.vocab_size": tokenizer.vocab_size if tokenizer.kind == "bpe" else None,
    }


def _left_to_the_fingerprint(path: str, old: TrainConfig, new: TrainConfig) -> bool:
    """Whether only the data can tell: a tokenizer file may well be the one that the checkpoint was trained with, and
    ``model.vocab_size: null`` is what the tokenizer has."""
    if path.startswith("data.tokenizer."):
        return "file" in (old.data.tokenizer.kind, new.data.tokenizer.kind)
    return path == "model.vocab_size" and None in (old.model.vocab_size, new.model.vocab_size)


def _gate_state(config: TrainConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor that the gate keeps, found out without memory for any."""
    with torch.device("meta"):
        gate = build_gate(config.gate, config.model.dim, config.model.moe.num_experts)
    return {name: tuple(tensor.shape) for name, tensor in gate.state_dict().items()}


def _new_layers() -> Layers:
    defaults = TrainConfig()
    return Layers(defaults=defaults.model_dump(mode="json"), default_gate=defaults.gate.name)


def _ranks_of_torchrun() -> int:
    text = os.environ.get("WORLD_SIZE", "1")
    if not text.isdecimal() or int(text) < 1:
        why = f"torchrun sets it to the number of ranks, at least 1 (given: {text!r})"
        raise ConfigError([f"environment  WORLD_SIZE: {why}"])
    return int(text)


def _resolve(layers: Layers, overrides: Sequence[str], world_size: int | None) -> ResolvedConfig:
    ranks = _ranks_of_torchrun() if world_size is None else world_size
    first = ("gate", "gate.name")
    in_order = sorted(overrides, key=lambda text: text.partition("=")[0] not in first)
    problems = [problem for text in in_order if (problem := layers.override(text))]
    if isinstance(layers.values.get("gate"), dict):
        layers.values["gate"].setdefault("name", layers.default_gate)
    layers.values = settle_unquoted(layers.values, lambda keys: wants_text(keys, layers.values))
    mistyped = list(mistyped_booleans(layers.values))
    for keys in mistyped:
        problems.append(f"{layers.origin(keys)}  {'.'.join(map(str, keys))}: must not be true or false")
        discard(layers.values, keys)
    wrong = frozenset(str(keys[0]) for keys in mistyped)
    try:
        config = TrainConfig.model_validate(layers.values)
    except ValidationError as error:
        raise ConfigError(problems + describe(layers, error, ranks, wrong)) from error
    problems += wrong_combinations(layers, config, ranks, wrong)
    if problems:
        raise ConfigError(problems)
    leaves = flatten(config.model_dump(mode="json"))
    return ResolvedConfig(config, {path: layers.origin_of_leaf(path) for path in leaves}, layers.notes)
