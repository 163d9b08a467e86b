"""Plain option values laid over one another, with the place where each was set: YAML files, then the command line.

Nothing here knows which options exist; :mod:`launch.config_problems` does. Precedence: the parent named by
``extends`` < the file < the command line.
"""

from __future__ import annotations

import copy
import difflib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from moe.errors import ConfigError

RECIPES = Path(__file__).parent / "configs"
COMMAND_LINE = "command line"
PathKeys = tuple[str | int, ...]
Origin = Callable[[PathKeys], str]


@dataclass
class Layers:
    """Values as merged so far.

    Attributes:
        values: nested mappings and lists.
        origins: where a path was set; what is under it was set there too unless it says otherwise.
        notes: remarks for the user.
        defaults: what a list holds before anything is set, so that one of its items can be changed.
        default_gate: name of the gate that options without a name belong to.
    """

    defaults: Mapping[str, Any]
    default_gate: str
    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[PathKeys, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def origin(self, keys: PathKeys) -> str:
        """Where ``keys`` or its nearest ancestor was set; "default" when nowhere."""
        for length in range(len(keys), 0, -1):
            if keys[:length] in self.origins:
                return self.origins[keys[:length]]
        return "default"

    def origin_of_leaf(self, path: str) -> str:
        """Where the option at a dotted path was set; of a list, where the last of its changes stands."""
        keys = tuple(path.split("."))
        places = [place for known, place in self.origins.items() if known[: len(keys)] == keys]
        return places[-1] if places else "default"

    def merge(self, values: Mapping[str, Any], origin: Origin, keys: PathKeys = ()) -> None:
        """Lay ``values`` over what is at ``keys``; mappings merge, everything else replaces."""
        target: Any = self.values
        for key in keys:
            target = target[key]
        for name, value in values.items():
            path = (*keys, name)
            if path == ("gate",):
                value = {"name": value} if isinstance(value, str) else value
                self._drop_former_gate(value, origin(path))
            if isinstance(value, Mapping):
                if not isinstance(target.get(name), dict):
                    target[name] = {}
                self.origins[path] = origin(path)
                self.merge(value, origin, path)
            elif value is None and len(path) == 1:
                pass  # a section whose lines are all commented out
            else:
                target[name] = value
                self._forget_origins(path)
                for inner in _paths_of(value, path):
                    self.origins[inner] = origin(inner)

    def override(self, text: str) -> str | None:
        """Apply one ``dotted.path=value``; returns what is wrong with it, or None."""
        path, equals, raw = text.partition("=")
        if not equals or not path:
            is_file = (RECIPES / f"{text}.yaml").is_file() or text.endswith((".yaml", ".yml"))
            hint = f". Did you mean --config {text}?" if is_file else ""
            return f"{COMMAND_LINE}  {text!r}: expected path.to.option=value{hint}"
        keys: list[str | int] = [int(part) if re.fullmatch("[0-9]+", part) else part for part in path.split(".")]
        if "" in keys or isinstance(keys[0], int):
            return f"{COMMAND_LINE}  {text!r}: {path!r} is not a path like train.steps or data.sources.0.weight"
        try:
            value = _parse(raw)
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            return f"{COMMAND_LINE}  {path}: the value is not valid YAML: {_why_unreadable(path, raw, error)}"
        if any(isinstance(key, int) for key in keys):
            return self._override_item(keys, value, path)
        nested: Any = value
        for key in reversed(keys):
            nested = {key: nested}
        self.merge(nested, lambda _keys: COMMAND_LINE)
        return None

    def _override_item(self, keys: list[str | int], value: Any, path: str) -> str | None:
        """Change an item of a list, or something inside it."""
        place = next(index for index, key in enumerate(keys) if isinstance(key, int))
        name = ".".join(map(str, keys[:place]))
        target: Any = self.values
        for depth, key in enumerate(keys[:place]):
            if isinstance(target, dict) and key not in target:
                target[key] = copy.deepcopy(_look_up(self.defaults, keys[: depth + 1])) if depth == place - 1 else {}
            target = target.get(key) if isinstance(target, dict) else None
        if not isinstance(target, list):
            return f"{COMMAND_LINE}  {path}: {name} is not a list"
        for depth, step in enumerate(keys[place:], place):
            if isinstance(target, list) and not (isinstance(step, int) and step < len(target)):
                return f"{COMMAND_LINE}  {path}: {name} has {len(target)} item(s), counted from 0; there is no {step!r}"
            if not isinstance(target, (dict, list)):
                return f"{COMMAND_LINE}  {path}: there is nothing to set under {'.'.join(map(str, keys[:depth]))}"
            inner: Any = target  # a list with an index or a mapping with a name, as was just checked
            if depth == len(keys) - 1:
                inner[step] = value
            else:
                target = inner.setdefault(step, {}) if isinstance(inner, dict) else inner[step]
        self._forget_origins(tuple(keys))
        self.origins[tuple(keys)] = COMMAND_LINE
        return None

    def _drop_former_gate(self, value: Any, where: str) -> None:
        """A new gate name makes the former gate's options meaningless: drop them and say so."""
        former = self.values.get("gate")
        if not (isinstance(former, dict) and isinstance(value, Mapping)):
            return
        old_name = former.get("name", self.default_gate)
        new_name = value.get("name", old_name)
        if new_name == old_name:
            return
        dropped = sorted(key for key in former if key != "name")
        if dropped:
            self.notes.append(f"{where}: gate {new_name!r} replaces {old_name!r}; dropped {', '.join(dropped)}")
        self._forget_origins(("gate",))
        self.values["gate"] = {"name": new_name}

    def _forget_origins(self, path: PathKeys) -> None:
        for known in [keys for keys in self.origins if keys[: len(path)] == path]:
            del self.origins[known]


@dataclass(frozen=True)
class _Unquoted:
    """A number, date, true or false from the command line, where ``run.name=2024`` may just as well mean text."""

    text: str
    value: Any


def _parse(raw: str) -> Any:
    """The value of an override: YAML, except that ``ROMEO:``, ``a #b`` and other unquoted text stays as it is.

    Raises:
        yaml.YAMLError: it is no YAML.
        ValueError: a mapping or list that contains itself.
    """
    text = raw.strip(" ")
    unquoted = not text.startswith(tuple("{['\"!|>&*"))
    try:
        value = yaml.safe_load(text) if text else ""
    except (yaml.MarkedYAMLError, ValueError):  # ValueError: 2024-99-99 looks like a date
        if not unquoted:
            raise
        return text
    if unquoted and (isinstance(value, (str, dict, list)) or text.startswith("#")):
        return text
    if isinstance(value, (str, dict, list, type(None))):
        json.dumps(value, default=str)  # a circular reference is a ValueError
        return value
    return _Unquoted(text, value)


def _why_unreadable(path: str, raw: str, error: Exception) -> str:
    """What is wrong with an override's value, and what may help."""
    why = getattr(error, "problem", None) or str(error).splitlines()[0]
    if raw.startswith(("[", "{")) and "<stream end>" in why:
        return f"{why}; it ends too early. Quote the whole option, or the shell splits it at spaces: '{path}=...'"
    return f"{why}. Text can stand in quotes: '\"...\"'"


def settle_unquoted(values: Any, wants_text: Callable[[PathKeys], bool], keys: PathKeys = ()) -> Any:
    """``values`` with every command-line scalar decided: its text where the option takes only text, else its value."""
    if isinstance(values, dict):
        return {key: settle_unquoted(item, wants_text, (*keys, key)) for key, item in values.items()}
    if isinstance(values, list):
        return [settle_unquoted(item, wants_text, (*keys, index)) for index, item in enumerate(values)]
    if isinstance(values, _Unquoted):
        return values.text if wants_text(keys) else values.value
    return values


def merge_file(layers: Layers, path: Path, children: tuple[Path, ...] = ()) -> None:
    """Lay a YAML file, below it its parents, over ``layers``.

    Args:
        children: the files that ``extends`` led here from.

    Raises:
        ConfigError: the file cannot be read, is not YAML, has an option twice, or extends itself.
    """
    try:
        node = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
        reader = _Reader(path)
        values = reader.plain(node, ()) if node is not None else {}
    except OSError as error:
        raise ConfigError([f"{path}  cannot be read: {error.strerror}"]) from error
    except UnicodeDecodeError as error:
        raise ConfigError(
            [f"{path}  is not UTF-8 text: byte {error.start} is {error.object[error.start]:#04x}"]
        ) from error
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ConfigError([f"{path}:{line}  is not valid YAML: {error.problem}"]) from error
    except yaml.YAMLError as error:
        raise ConfigError([f"{path}  is not valid YAML: {str(error).splitlines()[0]}"]) from error
    except RecursionError as error:
        raise ConfigError([f"{path}  is not valid YAML for a config: it nests too deeply"]) from error
    if not isinstance(values, dict):
        raise ConfigError([f"{path}:1  a config is a mapping of sections, this file holds a {type(values).__name__}"])
    if reader.problems:
        raise ConfigError(reader.problems)
    parent = values.pop("extends", None)
    if parent is not None:
        where = f"{path}:{reader.lines[('extends',)]}"
        if not isinstance(parent, str):
            raise ConfigError([f"{where}  extends: takes one file name, not {parent!r}"])
        parent_path = find_config(parent, beside=path.parent, asked_by=f"{where}  extends: {parent}")
        if parent_path.resolve() in (path.resolve(), *(child.resolve() for child in children)):
            raise ConfigError([f"{where}  extends: {parent} leads back to itself; a chain of parents must end"])
        merge_file(layers, parent_path, (*children, path))
    layers.merge(values, lambda keys: f"{path}:{reader.line(keys)}")


class _Reader:
    """YAML nodes to plain values, remembering on which line each stands.

    Attributes:
        lines: 1-based line of every path.
        problems: options that stand twice in one mapping.
    """

    def __init__(self, path: Path) -> None:
        self.lines: dict[PathKeys, int] = {}
        self.problems: list[str] = []
        self._path = path
        self._constructor = yaml.constructor.SafeConstructor()
        self._open: list[yaml.Node] = []

    def line(self, keys: PathKeys) -> int:
        """Line of ``keys`` or of the nearest thing around it."""
        return next((self.lines[keys[:n]] for n in range(len(keys), 0, -1) if keys[:n] in self.lines), 1)

    def plain(self, node: yaml.Node, keys: PathKeys) -> Any:
        """The value of ``node``, which stands at ``keys``."""
        if any(node is outer for outer in self._open):
            raise yaml.constructor.ConstructorError(None, None, "an alias contains itself", node.start_mark)
        self.lines.setdefault(keys, node.start_mark.line + 1)
        self._open.append(node)
        try:
            if isinstance(node, yaml.MappingNode):
                return self._mapping(node, keys)
            if isinstance(node, yaml.SequenceNode):
                return [self.plain(item, (*keys, index)) for index, item in enumerate(node.value)]
            return self._scalar(node)
        finally:
            self._open.pop()

    def _scalar(self, node: yaml.Node) -> Any:
        try:
            return self._constructor.construct_object(node)
        except ValueError as error:  # 2024-99-99 looks like a date
            raise yaml.constructor.ConstructorError(None, None, f"{node.value!r}: {error}", node.start_mark) from error

    def _mapping(self, node: yaml.MappingNode, keys: PathKeys) -> dict[str, Any]:
        first_line: dict[str, int] = {}
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                why = "the name of an option is plain text"
                raise yaml.constructor.ConstructorError(None, None, why, key_node.start_mark)
            key, line = str(key_node.value), key_node.start_mark.line + 1
            if key in first_line and key != "<<":
                dotted = ".".join(map(str, (*keys, key)))
                self.problems.append(f"{self._path}:{line}  {dotted}: stands twice; also on line {first_line[key]}")
            first_line.setdefault(key, line)
        self._constructor.flatten_mapping(node)  # resolves "<<"
        result = {}
        for key_node, value_node in node.value:
            key = str(key_node.value)
            self.lines[(*keys, key)] = key_node.start_mark.line + 1
            result[key] = self.plain(value_node, (*keys, key))
        return result


def find_config(name: str, beside: Path | None = None, asked_by: str | None = None) -> Path:
    """The file that ``name`` means: a path, a file in the folder ``beside``, or a shipped recipe by its bare name.

    Args:
        asked_by: how an error begins.

    Raises:
        ConfigError: no such file; with the nearest name in its folder.
    """
    shipped = sorted(recipe.stem for recipe in RECIPES.glob("*.yaml"))
    if not name:
        asked = asked_by or "--config"
        raise ConfigError(
            [f"{asked} needs a file or the name of a shipped recipe. Shipped recipes: {', '.join(shipped)}"]
        )
    path = Path(name)
    candidates = [path] if beside is None else [beside / name, path]
    candidates.append(RECIPES / f"{name}.yaml")
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    folder = (beside or Path()) / path.parent
    there = sorted(str(path.parent / found.name) for found in folder.glob("*.y*ml"))
    near = difflib.get_close_matches(name, [*there, *shipped], n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    what = "there is no such file"
    if path.is_dir():
        what = "is a folder, not a file"
    elif path.exists():
        what = "is not a regular file, which every rank can read"
    asked = asked_by or f"--config {name}"
    raise ConfigError([f"{asked}: {what}.{hint} Shipped recipes: {', '.join(shipped)}"])


def _look_up(values: Any, keys: list[str | int]) -> Any:
    for key in keys:
        values = values.get(key) if isinstance(values, Mapping) else None
    return values


def _paths_of(value: Any, path: PathKeys) -> Iterator[PathKeys]:
    """``path`` and every path inside ``value``, which stands there."""
    yield path
    items = enumerate(value) if isinstance(value, list) else value.items() if isinstance(value, dict) else ()
    for key, item in items:
        yield from _paths_of(item, (*path, key))
