"""An expert worker's weights from a model directory: its own experts and nothing else.

Files hold one tensor for each expert and matrix (see :mod:`moe.hf`); files of other programs may hold all experts of a
layer in one, of which only parts are read. That the directory is whole was checked by rank 0, which reads all of it.

Shape suffixes: L MoE layers, E experts.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from moe.checkpoint import INDEX_FILE, WEIGHTS_FILE
from moe.errors import CheckpointError
from moe.experts import Experts
from moe.hf import pieces
from moe.ops.packed_experts import pack_experts
from parallel.gang_experts import HeldExperts


def read_held_experts(
    model_dir: Path,
    blocks: Sequence[int],
    owned_L: Sequence[Sequence[int]],
    dim: int,
    hidden_dim: int,
    *,
    dtype: torch.dtype,
    device: torch.device,
    packed: bool,
    native: bool,
    batch_invariant: bool,
) -> list[HeldExperts]:
    """The owned experts of each MoE layer.

    Args:
        blocks: index of each MoE layer among all blocks.
        owned_L: the experts to read, per layer.
        dtype, device, packed, native, batch_invariant: how they are held and computed; as rank 0 does its own, or
            results would differ. See :class:`moe.ops.packed_experts.PackedExperts`.

    Raises:
        CheckpointError: a tensor is missing, of another shape, or a file is damaged.
        UserError: native ops are asked for and are not here.
    """
    banks = []
    with ExitStack() as stack:
        files = _Files(model_dir, stack)
        for block, owned in zip(blocks, owned_L, strict=True):
            with torch.device("meta"):
                bank = Experts(len(owned), dim, hidden_dim)
            # Names come from where all names come from; only the expert's number differs.
            keys = {f"blocks.{block}.moe.experts.{name}": tensor for name, tensor in bank.named_parameters()}
            state: dict[str, Tensor] = {}
            for piece in pieces(keys):
                assert piece.expert is not None
                prefix, _, suffix = piece.theirs.rpartition(f".experts.{piece.expert}.")
                value = files.read(f"{prefix}.experts.", owned[piece.expert], suffix)
                if tuple(value.shape) != piece.shape:
                    raise CheckpointError(f"{model_dir}: {piece.theirs} has shape {tuple(value.shape)}")
                if piece.ours not in state:
                    state[piece.ours] = torch.empty(keys[piece.ours].shape, dtype=dtype, device=device)
                piece.write(state, value)
            for ours, like in keys.items():
                fresh = state[ours] if ours in state else torch.empty(like.shape, dtype=dtype, device=device)
                bank.register_parameter(ours.rpartition(".")[2], nn.Parameter(fresh, requires_grad=False))
            holder = nn.ModuleList([bank])
            if packed:
                pack_experts(holder, native, batch_invariant=batch_invariant)
            banks.append(HeldExperts(holder[0]))  # type: ignore[arg-type]
    return banks


class _Files:
    """The safetensors files of a directory, each opened once."""

    def __init__(self, model_dir: Path, stack: ExitStack) -> None:
        self._dir = model_dir
        self._file_of: dict[str, Any] = {}
        for path in _paths(model_dir):
            try:
                file = stack.enter_context(safe_open(path, framework="pt"))
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{path} is truncated or damaged: {error}") from error
            self._file_of |= dict.fromkeys(file.keys(), file)

    def read(self, prefix: str, expert: int, suffix: str) -> Tensor:
        """One expert's matrix, as (out, in)."""
        name = f"{prefix}{expert}.{suffix}"
        if name in self._file_of:
            value: Tensor = self._file_of[name].get_tensor(name)
            return value
        kind = suffix.removesuffix(".weight")
        fused = prefix + ("down_proj" if kind == "down_proj" else "gate_up_proj")
        if fused not in self._file_of:
            raise CheckpointError(f"{self._dir}: there is no {name}")
        whole: Tensor = self._file_of[fused].get_slice(fused)[expert : expert + 1][0]
        return whole if kind == "down_proj" else whole.chunk(2)[0 if kind == "gate_proj" else 1]


def _paths(model_dir: Path) -> Iterator[Path]:
    index = model_dir / INDEX_FILE
    if not index.is_file():
        yield model_dir / WEIGHTS_FILE
        return
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{index} is damaged: {error}") from error
    for name in sorted(names):
        yield model_dir / str(name)
