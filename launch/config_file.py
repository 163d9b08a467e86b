"""From YAML and dotted overrides to a :class:`TrainConfig`, with every problem reported at once.

Precedence: defaults < the parent named by ``extends`` < the file < the command line. Each problem is one line:
where (file:line or "command line"), the dotted path, what is wrong, the nearest name, what is allowed.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from gates import gate_names, gate_type
from launch.config import TrainConfig
from moe.errors import ConfigError

RECIPES = Path(__file__).parent / "configs"
COMMAND_LINE = "command line"
PathKeys = tuple[str | int, ...]

STRUCTURE = (
    "model.vocab_size",
    "model.dim",
    "model.num_layers",
    "model.num_heads",
    "model.num_kv_heads",
    "model.head_dim",
    "model.qk_norm",
    "model.tie_embeddings",
    "model.num_dense_layers",
    "model.dense_hidden_dim",
    "model.moe.num_experts",
    "model.moe.hidden_dim",
    "model.moe.num_shared_experts",
    "gate.name",
    "data.tokenizer.kind",
    "data.tokenizer.vocab_size",
)
"""Options that a checkpoint depends on: a resumed run must not change them."""


@dataclass
class Layers:
    """Plain values as merged so far and where each of them was set."""

    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[PathKeys, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def origin(self, keys: PathKeys) -> str:
        """Where ``keys`` or its nearest ancestor was set; "default" when nowhere."""
        for length in range(len(keys), 0, -1):
            if keys[:length] in self.origins:
                return self.origins[keys[:length]]
        return "default"


@dataclass(frozen=True)
class ResolvedConfig:
    """The config, the origin of every leaf by dotted path, and remarks (such as dropped options of a former gate)."""

    config: TrainConfig
    origins: Mapping[str, str]
    notes: Sequence[str]


def load_config(path: str | None, overrides: Sequence[str] = ()) -> ResolvedConfig:
    """Read a config.

    Args:
        path: a YAML file, the bare name of a shipped recipe ("tiny"), or None for defaults.
        overrides: ``dotted.path=value`` each, the value parsed as YAML.

    Raises:
        ConfigError: with all problems.
    """
    layers = Layers()
    if path is not None:
        _merge_file(layers, find_config(path), seen=())
    return _resolve(layers, overrides)


def config_from_values(values: Mapping[str, Any], overrides: Sequence[str], *, origin: str) -> TrainConfig:
    """A config from stored plain values plus overrides; ``origin`` names their source in errors."""
    layers = Layers()
    _merge(layers, dict(values), (), lambda _keys: origin)
    return _resolve(layers, overrides).config


def dump_config(config: TrainConfig) -> str:
    """The config as YAML that loads back to an equal config."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def schema() -> dict[str, Any]:
    """JSON Schema of a run's config, with the options of every registered gate under ``$defs``."""
    result = TrainConfig.model_json_schema()
    gates = {name: gate_type(name).config_type.model_json_schema() for name in gate_names()}
    result.setdefault("$defs", {}).update({f"gate:{name}": value for name, value in gates.items()})
    result["properties"]["gate"] = {"oneOf": [{"$ref": f"#/$defs/gate:{name}"} for name in gates]}
    return result


def structural_difference(old: TrainConfig, new: TrainConfig) -> tuple[list[str], list[str]]:
    """What differs between two configs, as ``"path: old -> new"``.

    Returns:
        (differences that make a checkpoint of ``old`` unusable for ``new``, all other differences).
    """
    before, after = (flatten(config.model_dump(mode="json")) for config in (old, new))
    structural: list[str] = []
    other: list[str] = []
    for path in sorted(before.keys() | after.keys()):
        if before.get(path) != after.get(path):
            line = f"{path}: {before.get(path)!r} -> {after.get(path)!r}"
            (structural if path in STRUCTURE else other).append(line)
    return structural, other


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one mapping by dotted path; lists are leaves."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def find_config(name: str) -> Path:
    """The file that ``name`` means: a path, or a shipped recipe. ConfigError with the nearest name."""
    path = Path(name)
    if path.is_file():
        return path
    recipe = RECIPES / f"{name}.yaml"
    if recipe.is_file():
        return recipe
    shipped = sorted(p.stem for p in RECIPES.glob("*.yaml"))
    beside = sorted(str(p) for p in path.parent.glob("*.y*ml")) if path.parent.is_dir() else []
    near = difflib.get_close_matches(name, [*beside, *shipped], n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ConfigError([f"--config {name}: there is no such file.{hint} Shipped recipes: {', '.join(shipped)}"])


# --- reading ----------------------------------------------------------------------------------------------------------


def _merge_file(layers: Layers, path: Path, seen: tuple[Path, ...]) -> None:
    resolved = path.resolve()
    if resolved in seen:
        raise ConfigError([f"{path}  extends: the chain of parents comes back to this file"])
    try:
        text = path.read_text(encoding="utf-8")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError([f"{path}  cannot be read: {error}"]) from error
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ConfigError([f"{path}:{line}  is not valid YAML: {error.problem}"]) from error
    if node is None:
        return
    lines: dict[PathKeys, int] = {}
    values = _plain(node, (), lines)
    if not isinstance(values, dict):
        raise ConfigError([f"{path}:1  a config is a mapping of sections, this file holds a {type(values).__name__}"])
    parent = values.pop("extends", None)
    if parent is not None:
        parent_path = path.parent / str(parent)
        _merge_file(layers, parent_path if parent_path.is_file() else find_config(str(parent)), (*seen, resolved))
    _merge(layers, values, (), lambda keys: f"{path}:{lines.get(keys, 1)}")


def _plain(node: yaml.Node, keys: PathKeys, lines: dict[PathKeys, int]) -> Any:
    """Plain values of a YAML node; fills ``lines`` with the 1-based line of every path."""
    lines[keys] = node.start_mark.line + 1
    if isinstance(node, yaml.MappingNode):
        result = {}
        for key_node, value_node in node.value:
            key = str(key_node.value)
            result[key] = _plain(value_node, (*keys, key), lines)
            lines[(*keys, key)] = key_node.start_mark.line + 1
        return result
    if isinstance(node, yaml.SequenceNode):
        return [_plain(item, (*keys, index), lines) for index, item in enumerate(node.value)]
    return yaml.safe_load(yaml.serialize(node, Dumper=yaml.SafeDumper))


def _merge(layers: Layers, values: Mapping[str, Any], keys: PathKeys, origin: Any) -> None:
    """Lay ``values`` over what is there; mappings merge, everything else replaces."""
    target: Any = layers.values
    for key in keys:
        target = target[key]
    for name, value in values.items():
        path = (*keys, name)
        if path == ("gate",):
            value = {"name": value} if isinstance(value, str) else value
            _drop_former_gate(layers, value, origin(path))
        if isinstance(value, Mapping):
            if not isinstance(target.get(name), dict):
                target[name] = {}
            layers.origins[path] = origin(path)
            _merge(layers, value, path, origin)
        else:
            target[name] = value
            for known in [k for k in layers.origins if k[: len(path)] == path]:
                del layers.origins[known]
            layers.origins[path] = origin(path)
            if isinstance(value, list):
                for index, item in enumerate(value):
                    layers.origins[(*path, index)] = origin((*path, index))
                    for key in item if isinstance(item, dict) else ():
                        layers.origins[(*path, index, key)] = origin((*path, index, key))


def _drop_former_gate(layers: Layers, value: Any, where: str) -> None:
    """A new gate name makes the former gate's options meaningless: drop them and say so."""
    former = layers.values.get("gate")
    if not (isinstance(former, dict) and isinstance(value, Mapping)):
        return
    new_name = value.get("name", former.get("name"))
    if new_name == former.get("name"):
        return
    dropped = sorted(key for key in former if key != "name")
    if dropped:
        layers.notes.append(f"{where}: gate {new_name!r} replaces {former.get('name')!r}; dropped {', '.join(dropped)}")
    layers.values["gate"] = {"name": new_name}
    for keys in [k for k in layers.origins if k[0] == "gate"]:
        del layers.origins[keys]


def _apply_override(layers: Layers, text: str) -> str | None:
    """Apply ``path=value``; returns a problem or None."""
    path, equals, raw = text.partition("=")
    if not equals or not path:
        return f"{COMMAND_LINE}  {text!r}: expected path.to.option=value"
    try:
        value = yaml.safe_load(raw) if raw else ""
    except yaml.YAMLError as error:
        return f"{COMMAND_LINE}  {path}: the value is not valid YAML: {str(error).splitlines()[0]}"
    keys: list[str | int] = [int(part) if part.isdigit() else part for part in path.split(".")]
    if keys[0] == "gate":  # through _merge, which knows what a new name means
        nested: Any = value
        for key in reversed(keys):
            nested = {key: nested}
        _merge(layers, nested, (), lambda _keys: COMMAND_LINE)
        return None
    target: Any = layers.values
    for depth, key in enumerate(keys[:-1]):
        if isinstance(target, list):
            if not isinstance(key, int) or key >= len(target):
                return f"{COMMAND_LINE}  {path}: {'.'.join(map(str, keys[:depth]))} has {len(target)} items, no {key!r}"
            target = target[key]
        else:
            if not isinstance(target.get(key), (dict, list)):
                target[key] = {}
            target = target[key]
    last = keys[-1]
    if isinstance(target, list) and not (isinstance(last, int) and last < len(target)):
        return f"{COMMAND_LINE}  {path}: there is no item {last!r}"
    target[last] = value
    for known in [k for k in layers.origins if k[: len(keys)] == tuple(keys)]:
        del layers.origins[known]
    layers.origins[tuple(keys)] = COMMAND_LINE
    return None


# --- checking ---------------------------------------------------------------------------------------------------------


def _resolve(layers: Layers, overrides: Sequence[str]) -> ResolvedConfig:
    problems = [problem for text in overrides if (problem := _apply_override(layers, text))]
    if "gate" in layers.values and isinstance(layers.values["gate"], dict):
        layers.values["gate"].setdefault("name", TrainConfig().gate.name)
    try:
        config = TrainConfig.model_validate(layers.values)
    except ValidationError as error:
        problems += [_describe(layers, dict(item)) for item in error.errors()]
        raise ConfigError(problems) from error
    for problem in config.check(int(os.environ.get("WORLD_SIZE", "1"))):
        keys = tuple(problem.partition(":")[0].split("."))
        problems.append(f"{layers.origin(keys)}  {problem}")
    if problems:
        raise ConfigError(problems)
    leaves = flatten(config.model_dump(mode="json"))
    origins = {path: layers.origin(tuple(path.split("."))) for path in leaves}
    return ResolvedConfig(config, origins, layers.notes)


def _describe(layers: Layers, error: dict[str, Any]) -> str:
    """One pydantic error as one line."""
    keys: PathKeys = tuple(error["loc"])
    path = ".".join(map(str, keys)) or "config"
    where = layers.origin(keys)
    if error["type"] == "extra_forbidden":
        owner = _model_at(keys[:-1], layers.values)
        known = sorted(owner.model_fields) if owner else []
        near = difflib.get_close_matches(str(keys[-1]), known, n=1, cutoff=0.5)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        of = f" of gate {layers.values['gate']['name']!r}" if keys[0] == "gate" else ""
        return f"{where}  {path}: unknown option{of}.{hint} Known: {', '.join(known)}"
    message = error["msg"].removeprefix("Value error, ")
    if keys == ("gate",) and "unknown gate" in message:
        path = "gate.name"
        where = layers.origin(("gate", "name"))
    given = error.get("input")
    shown = "" if isinstance(given, (dict, list)) or error["type"] == "missing" else f" (given: {given!r})"
    return f"{where}  {path}: {message}{shown}"


def _model_at(keys: PathKeys, values: Mapping[str, Any]) -> type[BaseModel] | None:
    """The config class that holds the options under ``keys``."""
    model: type[BaseModel] = TrainConfig
    for key in keys:
        if key == "gate":
            return gate_type(values["gate"]["name"]).config_type
        if isinstance(key, int):
            continue  # an item of a list, whose class was entered with the list's name
        found = model.model_fields.get(str(key))
        if found is None:
            return None
        annotation = found.annotation
        if get_origin(annotation) is list:
            annotation = get_args(annotation)[0]
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return None
        model = annotation
    return model
