"""The exported model: a Hugging Face directory that is served, evaluated and shared.

    config.json                 Hugging Face keys, and our own under "moeyard": version, model, gate, extra
    model.safetensors           or model-00001-of-00002.safetensors ... with model.safetensors.index.json
    tokenizer.json, tokenizer_config.json, generation_config.json

Training checkpoints (optimizer state, sharded) are another thing; ``parallel.checkpoint`` has them.
"""

from __future__ import annotations

import difflib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from gates import GateConfig, build_gate, parse_gate_config
from moe.config import ModelConfig
from moe.errors import CheckpointError
from moe.hf import Piece, config_from_hf, hf_config, pieces, split_fused
from moe.tokenizer import Tokenizer
from moe.transformer import Transformer

FORMAT_VERSION = 1
CONFIG_FILE = "config.json"
GENERATION_FILE = "generation_config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
GENERATION_DEFAULTS = {"do_sample": True, "temperature": 0.8, "top_p": 0.95}
_SHOWN = 5  # names listed in one message


@dataclass(frozen=True)
class LoadedModel:
    """What a model directory holds.

    Attributes:
        model: in evaluation mode.
        tokenizer: its tokenizer.
        config, gate: what the model was built from.
        extra: what the exporter added, e.g. the training config.
    """

    model: Transformer
    tokenizer: Tokenizer
    config: ModelConfig
    gate: GateConfig
    extra: dict[str, Any]


# --- saving ---------------------------------------------------------------------------------------------------------


def save_model(
    directory: str | os.PathLike[str],
    model: Transformer,
    tokenizer: Tokenizer,
    *,
    extra: Mapping[str, Any] | None = None,
    max_shard_bytes: int = 4 * 2**30,
) -> None:
    """Write ``model`` as a Hugging Face directory. It is written beside the target and
    renamed into place: a reader sees the earlier model, none for a moment, or the new one, never a half.

    Args:
        directory: the target; an earlier model there is replaced once the new one is complete.
        model: its weights are stored in the dtype they have.
        tokenizer: must fit the embedding.
        extra: JSON values to keep with the model.
        max_shard_bytes: a weights file is no larger, unless one tensor alone is.

    Raises:
        CheckpointError: the target is something else than a model directory, the tokenizer does not fit, or the disk
            is full or cannot be written. What was there before is untouched.
    """
    target = Path(directory)
    _check_replaceable(target)
    _check_vocabulary(tokenizer, model.embed.num_embeddings, str(target))
    state = model.state_dict()
    config = hf_config(model.config, model.gate_config, model.embed.weight.dtype, tokenizer.eos_id)
    config["moeyard"] = {
        "version": FORMAT_VERSION,
        "model": model.config.model_dump(mode="json"),
        "gate": model.gate_config.model_dump(mode="json"),
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "extra": dict(extra or {}),
    }
    generation = {"eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.eos_id, **GENERATION_DEFAULTS}
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent) as name:
            fresh = Path(name) / "new"
            fresh.mkdir()
            _write_weights(fresh, state, max_shard_bytes)
            tokenizer.save(fresh)
            _write_json(fresh / GENERATION_FILE, generation)
            _write_json(fresh / CONFIG_FILE, config)
            for file in fresh.iterdir():
                _flush_to_disk(file)
            _flush_to_disk(fresh)
            if target.exists():
                target.rename(Path(name) / "old")
            fresh.rename(target)
            _flush_to_disk(target.parent)
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise CheckpointError(f"cannot write the model to {target}: {reason}") from error


def _check_replaceable(target: Path) -> None:
    if not target.exists() or (target / CONFIG_FILE).is_file():
        return
    if not target.is_dir():
        raise CheckpointError(f"{target} is a file; a model is a directory")
    if any(target.iterdir()):
        raise CheckpointError(f"{target} holds other files and no {CONFIG_FILE}; it will not be replaced by a model")


def _check_vocabulary(tokenizer: Tokenizer, rows: int, where: str) -> None:
    if tokenizer.vocab_size > rows:
        raise CheckpointError(
            f"{where}: the tokenizer has {tokenizer.vocab_size} tokens, the model's embedding only {rows} rows;"
            " they do not belong together"
        )


def _write_weights(directory: Path, state: Mapping[str, Tensor], max_shard_bytes: int) -> None:
    shards: list[list[Piece]] = [[]]
    total = room = 0
    for piece in pieces(state):
        size = _bytes(piece, state)
        total += size
        if size > room and shards[-1]:
            shards.append([])
            room = 0
        room = (room or max_shard_bytes) - size
        shards[-1].append(piece)
    where: dict[str, str] = {}
    for i, shard in enumerate(shards):
        name = WEIGHTS_FILE if len(shards) == 1 else f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        save_file({p.theirs: p.read(state).cpu() for p in shard}, directory / name, metadata={"format": "pt"})
        where |= {p.theirs: name for p in shard}
    if len(shards) > 1:
        _write_json(directory / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": where})


def _bytes(piece: Piece, state: Mapping[str, Tensor]) -> int:
    count = 1
    for side in piece.shape:
        count *= side
    return count * state[piece.ours].element_size()


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _flush_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# --- loading --------------------------------------------------------------------------------------------------------


def load_model(
    directory: str | os.PathLike[str], *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> LoadedModel:
    """Read a model directory that :func:`save_model` wrote, or a ``qwen3_moe`` one of another program.

    Everything is checked before anything is returned: a model is whole or not at all.

    Args:
        device: where the model goes.
        dtype: of its parameters; None keeps what the files hold.

    Raises:
        CheckpointError: not a model directory; a file that is missing, truncated or damaged; tensors that are missing,
            unknown or of another shape; a tokenizer that does not belong to the model.
        TokenizerError: the tokenizer's files cannot be read.
    """
    folder = Path(directory)
    values = _read_config(folder)
    config, gate = _config_in(values, folder)
    own = values.get("moeyard")
    tokenizer = Tokenizer.load(folder)
    model = _empty_model(config, gate, folder)
    _check_vocabulary(tokenizer, model.embed.num_embeddings, str(folder))
    # transformers keeps our object when it saves a model anew, but writes tokenizer.json in its own way.
    own = own or {}
    fingerprint = None if "transformers_version" in values else own.get("tokenizer_fingerprint")
    if fingerprint is not None and fingerprint != tokenizer.fingerprint:
        raise CheckpointError(
            f"{folder}: tokenizer.json is not the one that the model was exported with"
            f" (fingerprint {tokenizer.fingerprint[:12]}, config.json says {fingerprint[:12]})"
        )
    model.load_state_dict(_read_weights(folder, model.state_dict()), assign=True)
    model = model.to(device=device, dtype=dtype).eval()
    return LoadedModel(model, tokenizer, config, gate, dict(own.get("extra") or {}))


def read_model_config(directory: str | os.PathLike[str]) -> tuple[ModelConfig, GateConfig]:
    """Shape and gate of the model in a directory as :func:`load_model` reads it, without its weights.

    Raises:
        CheckpointError: not a model directory, or its config.json is damaged or of a newer format.
    """
    folder = Path(directory)
    return _config_in(_read_config(folder), folder)


def _config_in(values: Mapping[str, Any], folder: Path) -> tuple[ModelConfig, GateConfig]:
    own = values.get("moeyard")
    return config_from_hf(values, str(folder / CONFIG_FILE)) if own is None else _own_config(own, folder)


def _read_config(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: there is no such model directory")
    path = folder / CONFIG_FILE
    if not path.is_file():
        names = sorted(entry.name for entry in folder.iterdir())[:_SHOWN]
        raise CheckpointError(f"{folder} is not a model directory: no {CONFIG_FILE} in it (has: {', '.join(names)})")
    values = _read_json(path)
    own = values.get("moeyard")
    if own is not None and not isinstance(own, dict):
        raise CheckpointError(f"{path}: 'moeyard' must be an object")
    return values


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} is damaged: must hold a JSON object")
    return values


def _own_config(own: Mapping[str, Any], folder: Path) -> tuple[ModelConfig, GateConfig]:
    path = folder / CONFIG_FILE
    version = own.get("version")
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: written in format {version!r}, this program reads up to {FORMAT_VERSION}; upgrade moeyard"
        )
    try:
        return ModelConfig.model_validate(own.get("model")), parse_gate_config(own.get("gate") or {})
    except ValidationError as error:
        lines = [f"{'.'.join(str(part) for part in e['loc'])}: {e['msg']}" for e in error.errors()]
        raise CheckpointError(f"{path}: {error.title} has wrong options: {'; '.join(lines)}") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _empty_model(config: ModelConfig, gate: GateConfig, folder: Path) -> Transformer:
    """The model without memory for its weights, which the files will bring; only its gates are real."""
    try:
        with torch.device("meta"):
            model = Transformer(config, gate)
        # A gate may compute buffers that are in no file.
        for _, layer in model.moe_layers():
            layer.gate = build_gate(gate, config.dim, config.moe.num_experts)
    except ValueError as error:
        raise CheckpointError(f"{folder / CONFIG_FILE}: {error}") from error
    return model


def _read_weights(folder: Path, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict with the keys and shapes of ``like`` from the weights files."""
    wanted = {piece.theirs: piece for piece in pieces(like)}
    state: dict[str, Tensor] = {}
    seen: set[str] = set()
    problems: list[str] = []
    unknown: list[str] = []
    for path in _weight_files(folder):
        for name, value in _tensors(path):
            piece = wanted.get(name)
            if piece is None:
                unknown.append(name)
            elif tuple(value.shape) != piece.shape:
                problems.append(f"{name} has shape {tuple(value.shape)}, the config says {piece.shape}")
            else:
                if piece.ours not in state:
                    state[piece.ours] = torch.empty(like[piece.ours].shape, dtype=value.dtype)
                piece.write(state, value)
            seen.add(name)
    missing = [name for name in wanted if name not in seen]
    problems = _listed("missing", missing) + _listed("unknown", unknown, wanted) + problems[:_SHOWN]
    if problems:
        raise CheckpointError(f"{folder}: the weights do not fit config.json: {'; '.join(problems)}")
    return state


def _listed(kind: str, names: Sequence[str], known: Mapping[str, object] | None = None) -> list[str]:
    if not names:
        return []
    shown = []
    for name in names[:_SHOWN]:
        near = difflib.get_close_matches(name, known, n=1) if known and len(known) < 10_000 else []
        shown.append(f"{name} (like {near[0]})" if near else name)
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return [f"{len(names)} {kind}: {', '.join(shown)}{more}"]


def _weight_files(folder: Path) -> list[Path]:
    index = folder / INDEX_FILE
    if not index.is_file():
        names = [WEIGHTS_FILE]
    else:
        weight_map = _read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{index} is damaged: no weight_map")
        names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        if Path(name).name != name or not (folder / name).is_file():
            raise CheckpointError(f"{folder}: {name} is missing")
    return [folder / name for name in names]


def _tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of every tensor in a safetensors file, fused experts split up."""
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  (safe_open is no mapping)
                yield from split_fused(name, file.get_tensor(name)).items()
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is truncated or damaged: {error}") from error
