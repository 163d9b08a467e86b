"""What is wrong with a config, one line a problem: where, the dotted path, what, the nearest name, what is allowed."""

from __future__ import annotations

import copy
import difflib
import re
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from gates import GateConfig, gate_names, gate_type
from launch.config import TrainConfig
from launch.config_layers import Layers, PathKeys

# A combination is judged only when nothing that it looks at is wrong by itself.
_LOOKS_AT = {"gate": {"gate", "model"}, "train": {"train", "model"}}


def describe(layers: Layers, error: ValidationError, world_size: int, wrong: frozenset[str]) -> list[str]:
    """Every problem of ``layers.values`` as a line: those that ``error`` found, and wrong combinations of the rest.

    Args:
        wrong: sections that are known to have other problems.
    """
    items = _one_per_option(error.errors(include_url=False), layers.values)
    problems = [_line(layers, item) for item in items]
    repaired = copy.deepcopy(layers.values)
    for item in items:
        _remove(repaired, item["loc"])
    try:
        config = TrainConfig.model_validate(repaired)
    except ValidationError:
        return problems
    wrong |= {str(item["loc"][0]) for item in items if item["loc"]}
    return problems + wrong_combinations(layers, config, world_size, wrong)


def wrong_combinations(layers: Layers, config: TrainConfig, world_size: int, wrong: frozenset[str]) -> list[str]:
    """What :meth:`TrainConfig.check` finds, with the place of the option; nothing that looks at ``wrong`` sections."""
    problems = []
    for problem in config.check(world_size):
        path = problem.partition(":")[0]
        section = path.partition(".")[0]
        if not wrong & _LOOKS_AT.get(section, {section}):
            problems.append(f"{layers.origin(tuple(path.split('.')))}  {problem}")
    return problems


def mistyped_booleans(values: Mapping[str, Any]) -> Iterator[PathKeys]:
    """Paths where true or false stands for a number; pydantic would take true for 1."""

    def walk(section: Mapping[str, Any] | list[Any], keys: PathKeys) -> Iterator[PathKeys]:
        for name, value in section.items() if isinstance(section, Mapping) else enumerate(section):
            if isinstance(value, (Mapping, list)):
                yield from walk(value, (*keys, name))
            elif isinstance(value, bool):
                found = field_at((*keys, name), values)
                kinds = set(_leaf_types(found.annotation, items=isinstance(name, int))) if found is not None else set()
                if kinds & {int, float} and bool not in kinds:
                    yield (*keys, name)

    return walk(values, ())


def discard(values: Any, keys: PathKeys) -> None:
    """Take the named option at ``keys`` out; of an item of a list of plain values, the list."""
    while isinstance(keys[-1], int):
        keys = keys[:-1]
    for key in keys[:-1]:
        values = values[key]
    values.pop(keys[-1], None)


def wants_text(keys: PathKeys, values: Mapping[str, Any]) -> bool:
    """Whether the option at ``keys`` takes text and no number or truth value."""
    found = field_at(keys, values)
    kinds = set(_leaf_types(found.annotation)) if found is not None else set()
    return str in kinds and not kinds & {int, float, bool}


def field_at(keys: PathKeys, values: Mapping[str, Any]) -> FieldInfo | None:
    """The config field that ``keys`` names, of a list's item the list's; None when there is none."""
    while keys and isinstance(keys[-1], int):
        keys = keys[:-1]
    if not keys:
        return None
    owner = _owner(keys[:-1], values)
    return owner.model_fields.get(str(keys[-1])) if owner else None


def _one_per_option(items: Sequence[ErrorDetails], values: Mapping[str, Any]) -> list[ErrorDetails]:
    """``items`` with one error for an option of several types; pydantic has one for each type."""
    merged: dict[PathKeys, ErrorDetails] = {}
    for item in items:
        keys: PathKeys = item["loc"]
        found = field_at(keys[:-1], values)
        if found is None or get_origin(found.annotation) not in (Union, types.UnionType):
            merged[keys] = item
            continue
        keys = keys[:-1]  # the last one names a type
        message = re.sub(r", (unable to parse|got a number) .*", "", item["msg"])
        if keys in merged:
            message = f"{merged[keys]['msg']} or {message.removeprefix('Input should be ')}"
        merged[keys] = {**item, "loc": keys, "msg": message}
    return list(merged.values())


def _line(layers: Layers, error: ErrorDetails) -> str:
    """One pydantic error."""
    keys: PathKeys = error["loc"]
    path = ".".join(map(str, keys)) or "config"
    where = layers.origin(keys)
    kind, message = error["type"], str(error["msg"]).removeprefix("Value error, ")
    if kind == "extra_forbidden":
        return f"{where}  {path}: {_unknown_option(keys, layers.values)}"
    if kind == "missing":
        return f"{where}  {path}: is missing"
    if keys == ("gate",) and "unknown gate" in message:
        where, path = layers.origin(("gate", "name")), "gate.name"
    hint = ""
    if kind == "literal_error" and isinstance(error["input"], str):
        hint = _did_you_mean(error["input"], _choices(field_at(keys, layers.values)))
    elif kind.startswith(("model_type", "model_attributes_type", "dict_type")):
        message = "is a section of options, not a single value"
    message = re.sub(r"^\w+ should ", "must ", message).replace(" after validation", "")
    given = error.get("input")
    shown = "" if isinstance(given, (dict, list)) or "unknown gate" in message else f" (given: {given!r})"
    return f"{where}  {path}: {message}{shown}{'.' * bool(hint)}{hint}"


def _unknown_option(keys: PathKeys, values: Mapping[str, Any]) -> str:
    owner = _owner(keys[:-1], values)
    known = sorted(owner.model_fields) if owner else []
    of_gate = f" of gate {_gate_name(values, keys[:-1])!r}" if keys[0] == "gate" else ""
    hint = _did_you_mean(str(keys[-1]), known)
    if not hint:  # the right name in the wrong section
        elsewhere = [path for path in option_paths(values) if path.rpartition(".")[2] == str(keys[-1])]
        hint = _did_you_mean(elsewhere[0], elsewhere) if elsewhere else ""
    what = "section" if len(keys) == 1 else "option"
    return f"unknown {what}{of_gate}.{hint} Known: {', '.join(known)}"


def option_paths(values: Mapping[str, Any] | None = None) -> list[str]:
    """Dotted paths of all options; those of the gate that ``values`` names, or of the default gate."""
    return sorted(_option_paths(TrainConfig, values or {}, ""))


def _option_paths(model: type[BaseModel], values: Mapping[str, Any], prefix: str) -> Iterator[str]:
    for name, found in model.model_fields.items():
        inner = _gate_options(values) if not prefix and name == "gate" else _section_type(found.annotation)
        if inner is None:
            yield prefix + name
        else:
            yield from _option_paths(inner, values, f"{prefix}{name}.")


def _owner(keys: PathKeys, values: Mapping[str, Any]) -> type[BaseModel] | None:
    """The config class whose fields stand under ``keys``; None when there is none."""
    model: type[BaseModel] = TrainConfig
    for depth, key in enumerate(keys):
        if isinstance(key, int):
            continue  # an item of a list, whose class was entered with the list's name
        info = model.model_fields.get(key)
        found = _section_type(info.annotation, inside_lists=True) if info else None
        if found is GateConfig:  # the gate, or one within it: its name says which options there are
            found = _gate_options(values, keys[: depth + 1])
        if found is None:
            return None
        model = found
    return model


def _gate_name(values: Mapping[str, Any], keys: PathKeys = ("gate",)) -> str:
    gate: Any = values
    for key in keys:
        gate = gate.get(key) if isinstance(gate, Mapping) else None
    name = gate.get("name") if isinstance(gate, Mapping) else gate
    return name if isinstance(name, str) else TrainConfig().gate.name


def _gate_options(values: Mapping[str, Any], keys: PathKeys = ("gate",)) -> type[BaseModel] | None:
    name = _gate_name(values, keys)
    return gate_type(name).config_type if name in gate_names() else None


def _section_type(annotation: Any, *, inside_lists: bool = False) -> type[BaseModel] | None:
    if inside_lists and get_origin(annotation) is list:
        annotation = get_args(annotation)[0]
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def _leaf_types(annotation: Any, *, items: bool = False) -> Iterator[type]:
    """Plain types that an annotation allows; a Literal counts as the types of its values.

    Args:
        items: of a list or tuple take the types of what it holds.
    """
    origin = get_origin(annotation)
    if origin is Literal:
        yield from (type(value) for value in get_args(annotation))
    elif origin in (Union, types.UnionType):
        for part in get_args(annotation):
            yield from _leaf_types(part, items=items)
    elif origin is Annotated:
        yield from _leaf_types(get_args(annotation)[0], items=items)
    elif items and origin in (list, tuple):
        for part in get_args(annotation):
            yield from _leaf_types(part)
    elif isinstance(annotation, type):
        yield annotation


def _choices(found: FieldInfo | None) -> list[str]:
    annotation = found.annotation if found else None
    return [value for value in get_args(annotation) if isinstance(value, str)]


def _did_you_mean(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f" Did you mean {near[0]!r}?" if near else ""


def _remove(values: Any, keys: PathKeys) -> None:
    """Take the value at ``keys`` out; of a list the whole list, for its length and order mean something."""
    end = next((place for place, key in enumerate(keys) if isinstance(key, int)), len(keys))
    for key in keys[: end - 1]:
        values = values.get(key) if isinstance(values, dict) else None
    if isinstance(values, dict):
        values.pop(keys[end - 1] if end else None, None)
