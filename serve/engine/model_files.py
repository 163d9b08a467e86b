"""What an exported model directory says besides its weights: special tokens, sampling defaults, identity."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from moe.errors import CheckpointError
from serve.client import SamplingDefaults

# Two models of one shape have equal file sizes and headers, so some of the numbers must go into the fingerprint;
# reading all of a large model would take longer than loading it.
FINGERPRINT_BYTES = 2**20


def find_model_dir(path: Path) -> Path:
    """The exported model directory that ``path`` is, or that the run at ``path`` holds.

    Raises:
        CheckpointError: there is none; says how to make one.
    """
    if not path.exists():
        raise CheckpointError(f"{path}: no such file or folder")
    if not path.is_dir():
        raise CheckpointError(f"{path}: is a file; give a run directory or an exported model directory")
    for candidate in (path, path / "model"):
        if (candidate / "config.json").is_file():
            return candidate
    if (path / "config.yaml").is_file() or (path / "checkpoints").is_dir():
        raise CheckpointError(f"{path}: this run has no exported model yet; make one with: moeyard export {path}")
    runs = sorted(
        (child for child in path.iterdir() if (child / "model" / "config.json").is_file()),
        key=lambda child: (child / "model" / "config.json").stat().st_mtime,
    )
    hint = f"; did you mean {runs[-1]}?" if runs else ""
    raise CheckpointError(f"{path}: neither a run directory nor an exported model (no config.json){hint}")


def model_name(model_dir: Path) -> str:
    """The name that requests use: the one that the model was exported with, else its folder's or its run's folder's.

    Raises:
        CheckpointError: config.json is damaged.
    """
    own = _read_object(model_dir / "config.json").get("moeyard")
    extra = own.get("extra") if isinstance(own, dict) else None
    name = extra.get("name") if isinstance(extra, dict) else None
    if isinstance(name, str) and name:
        return name
    resolved = model_dir.resolve()
    return resolved.parent.name if resolved.name == "model" and resolved.parent.name else resolved.name


@dataclass(frozen=True)
class ModelFiles:
    """Facts from the directory's JSON files; everything is optional there."""

    special_tokens: Mapping[str, str]
    defaults: SamplingDefaults
    eos_ids: frozenset[int]
    weights_version: str
    created: int


def read_model_files(model_dir: Path) -> ModelFiles:
    """Reads them.

    Raises:
        CheckpointError: a file is there but is not what it should be; names the file and the key.
    """
    tokenizer_config = _read_object(model_dir / "tokenizer_config.json")
    generation = _read_object(model_dir / "generation_config.json")
    return ModelFiles(
        special_tokens=_special_tokens(tokenizer_config),
        defaults=_defaults(model_dir / "generation_config.json", generation),
        eos_ids=_eos_ids(model_dir / "generation_config.json", generation),
        weights_version=weights_fingerprint(model_dir),
        created=int((model_dir / "config.json").stat().st_mtime),
    )


def weights_fingerprint(model_dir: Path) -> str:
    """Hex digest that changes with the weights: size, beginning and end of every safetensors file, and the config."""
    digest = sha256((model_dir / "config.json").read_bytes())
    for shard in sorted(model_dir.glob("*.safetensors")):
        size = shard.stat().st_size
        digest.update(f"{shard.name}:{size}".encode())
        with shard.open("rb") as file:
            digest.update(file.read(FINGERPRINT_BYTES))
            file.seek(max(0, size - FINGERPRINT_BYTES))
            digest.update(file.read(FINGERPRINT_BYTES))
    return digest.hexdigest()[:16]


def _read_object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: must hold a JSON object, got {type(value).__name__}")
    return value


def _special_tokens(tokenizer_config: Mapping[str, Any]) -> dict[str, str]:
    """``bos_token`` and the like; an entry may be a string or an object with ``content``."""
    tokens = {}
    for key in ("bos_token", "eos_token", "pad_token", "unk_token"):
        value = tokenizer_config.get(key)
        if isinstance(value, dict):
            value = value.get("content")
        if isinstance(value, str):
            tokens[key] = value
    return tokens


def _defaults(path: Path, generation: Mapping[str, Any]) -> SamplingDefaults:
    def number(key: str, default: float, low: float, high: float) -> float:
        value = generation.get(key)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            raise CheckpointError(f"{path}: {key} must be a number from {low:g} to {high:g}, got {value!r}")
        return float(value)

    greedy = generation.get("do_sample") is False
    top_k = int(number("top_k", 0, 0, 2**31))
    return SamplingDefaults(
        temperature=0.0 if greedy else number("temperature", 1.0, 0, 100),
        top_p=number("top_p", 1.0, 0, 1),
        top_k=top_k or None,
        min_p=number("min_p", 0.0, 0, 1),
        repetition_penalty=number("repetition_penalty", 1.0, 0.01, 100),
    )


def _eos_ids(path: Path, generation: Mapping[str, Any]) -> frozenset[int]:
    value = generation.get("eos_token_id")
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(type(token) is int and token >= 0 for token in ids):
        raise CheckpointError(f"{path}: eos_token_id must be a token id or a list of them, got {value!r}")
    return frozenset(ids)
