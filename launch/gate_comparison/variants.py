"""Which gates are compared, by label: all that a causal language model can train with, at equal experts per token.

A variant's options are the gate's defaults, its number of experts per token set to that of the config's own gate. Gates
whose definition fixes that number keep it. A file adds variants or changes options.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from gates import gate_names, gate_type, parse_gate_config
from launch.config import TrainConfig
from moe.errors import ConfigError

Options = dict[str, Any]

ONE_EXPERT = frozenset({"switch", "base"})
"""Defined with one expert per token; ``base`` has no other option."""

MEAN_FIELDS = ("k", "mean_k")
"""Fields that say how many experts a token gets, or gets on average."""

NOT_STRATEGIES = {
    "forced": "prescribes a skew, for benchmarks",
    "replay": "repeats what was recorded, for benchmarks",
}
_LABEL = re.compile(r"[A-Za-z0-9._-]+")


@dataclass(frozen=True)
class Variants:
    """What to compare.

    Attributes:
        gates: options by label, ``name`` among them.
        left_out: why a registered gate is not compared, by its name.
    """

    gates: Mapping[str, Options]
    left_out: Mapping[str, str]


def choose_variants(
    config: TrainConfig, labels: Iterable[str] = (), changes: Mapping[str, Options] | None = None
) -> Variants:
    """The variants to train ``config`` with.

    Args:
        labels: only these, in this order; none: all that can be trained.
        changes: options by label over the default ones, or of new variants.

    Raises:
        ConfigError: a label that does not exist, options that a gate refuses, or a named gate that cannot be trained.
    """
    offered = default_gates(round(config.gate.experts_per_token(config.model.moe.num_experts)))
    changes = changes or {}
    for label, options in changes.items():
        name = options.get("name", offered.get(label, {}).get("name", label))
        same = offered.get(label, {}).get("name") == name
        offered[label] = {**(offered[label] if same else {}), "name": name, **options}
    wanted = list(dict.fromkeys(labels))
    _check_labels(wanted, offered)
    gates, left_out, problems = {}, {}, []
    for label in wanted or offered:
        wrong = [NOT_STRATEGIES[label]] if label in NOT_STRATEGIES and not wanted else _problems(offered[label], config)
        if not wrong:
            gates[label] = offered[label]
        elif wanted or label in changes:
            problems += [f"gate {label}  {line}" for line in wrong]
        else:
            left_out[label] = "; ".join(wrong)
    if problems:
        raise ConfigError(problems)
    return Variants(gates, left_out)


def default_gates(experts_per_token: int) -> dict[str, Options]:
    """Options of every registered gate and of a few combinations, by label."""
    gates: dict[str, Options] = {}
    for name in gate_names():
        gates[name] = {"name": name, **_equal_work(name, experts_per_token)}
        if name == "topk":
            for balance in ("bias", "quantile"):
                gates[f"topk-{balance}"] = {**gates[name], "balance": balance, "balance_coef": 0.0}
    gates["local_search"]["gate"] = gates["topk"]
    gates["local_search-comet"] = {"name": "local_search", "gate": gates["comet"]}
    return gates


def read_changes(path: Path) -> dict[str, Options]:
    """A YAML file of options by label.

    Raises:
        ConfigError: it cannot be read, or is no mapping of mappings.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError([f"{path}: cannot be read: {error.strerror}"]) from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError([f"{path}: is no YAML: {' '.join(str(error).split())}"]) from error
    wanted = "a label and its options each, such as  topk-3: {name: topk, k: 3}"
    if not isinstance(values, dict) or not values:
        raise ConfigError([f"{path}: must hold {wanted}"])
    problems = []
    for label, options in values.items():
        if not isinstance(label, str) or not _LABEL.fullmatch(label):
            problems.append(f"{path}: label {label!r} may hold letters, digits, '.', '_' and '-'; it names folders")
        elif not isinstance(options, dict) or not all(isinstance(key, str) for key in options):
            problems.append(f"{path}: {label} must hold {wanted}")
    if problems:
        raise ConfigError(problems)
    return values


def _equal_work(name: str, experts_per_token: int) -> Options:
    """The options that give gate ``name`` so many experts per token."""
    if name in ONE_EXPERT:
        return {}
    if name == "expert_choice":  # an expert takes T * capacity_factor / E tokens
        return {"capacity_factor": float(experts_per_token)}
    fields = gate_type(name).config_type.model_fields
    return {field: experts_per_token for field in MEAN_FIELDS if field in fields}


def _check_labels(wanted: Iterable[str], offered: Mapping[str, Options]) -> None:
    problems = []
    for label in wanted:
        if label not in offered:
            near = difflib.get_close_matches(label, offered, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            problems.append(f"--gates: there is no gate {label!r}.{hint} Known: {', '.join(offered)}")
    if problems:
        raise ConfigError(problems)


def _problems(options: Options, config: TrainConfig) -> list[str]:
    """Why a causal language model of ``config`` cannot be trained with these options; empty when it can."""
    from pydantic import ValidationError

    try:
        gate = parse_gate_config(options)
    except ValidationError as error:
        return [f"{'.'.join(map(str, e['loc'])) or 'gate'}: {e['msg']}" for e in error.errors()]
    except ValueError as error:
        return [str(error)]
    changed = config.model_copy(update={"gate": gate})
    problems = [line.removeprefix("gate.") for line in changed.check() if line.startswith("gate.")]
    if problems:
        return problems
    return [line.removeprefix("gate.") for line in changed.missing_files()]
