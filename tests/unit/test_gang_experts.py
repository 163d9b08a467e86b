"""Experts as a rank of a serving gang holds them: parts of a bank, as bytes, and read from a model directory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from moe.checkpoint import load_model, save_model
from moe.config import ModelConfig, MoEConfig
from moe.errors import CheckpointError
from moe.experts import ExpertBank, Experts
from moe.ops.packed_experts import PackedExperts, pack_experts
from moe.tokenizer import Tokenizer
from moe.transformer import Transformer
from parallel.gang_experts import HeldExperts, bank_of_chunks, chunk_of, expert_bytes, num_stacked, sub_bank
from parallel.gang_weights import read_held_experts

pytestmark = pytest.mark.unit

# F: whole vectors of any processor, because the scalar tail of a vector loop rounds silu otherwise.
E, D, F = 5, 16, 32
LOAD_E = torch.tensor([3, 0, 7, 1, 2])


def bank(packed: bool, dtype: torch.dtype) -> ExpertBank:
    torch.manual_seed(0)
    plain = Experts(E, D, F, "loop").to(dtype).requires_grad_(False)
    return PackedExperts(plain) if packed else plain


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parts_of_a_bank_compute_the_bits_of_the_whole(packed: bool, dtype: torch.dtype) -> None:
    whole = bank(packed, dtype)
    rows_ND = torch.randn(int(LOAD_E.sum()), D).to(dtype)
    parts = dict(zip(range(E), rows_ND.split(LOAD_E.tolist()), strict=True))
    wanted = dict(zip(range(E), whole(rows_ND, LOAD_E).split(LOAD_E.tolist()), strict=True))

    held = HeldExperts(sub_bank(whole, [2, 4]))
    held.copies = bank_of_chunks(whole, [chunk_of(whole, 0), chunk_of(whole, 1)])
    order = [2, 4, 0, 1]
    got = held(torch.cat([parts[e] for e in order]), LOAD_E[order])
    assert torch.equal(got, torch.cat([wanted[e] for e in order]))
    assert held(rows_ND[:0], torch.zeros(4, dtype=torch.int64)).shape == (0, D)
    only_copies = held(parts[0], torch.tensor([0, 0, 3, 0]))
    assert torch.equal(only_copies, wanted[0])

    assert num_stacked(held.copies) == 2
    assert chunk_of(whole, 3).numel() == expert_bytes(whole) == 3 * D * F * dtype.itemsize
    assert torch.equal(chunk_of(held.owned, 1), chunk_of(whole, 4))
    assert num_stacked(sub_bank(whole, [])) == 0


def test_a_bank_that_is_not_stacked_by_expert_is_refused() -> None:
    class Odd(PackedExperts):
        def __init__(self) -> None:
            super().__init__(Experts(E, D, F))
            self.scale = nn.Parameter(torch.ones(3))

    with pytest.raises(TypeError, match="Odd are not stacked by expert"):
        HeldExperts(Odd())


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    tokenizer = Tokenizer.bytes()
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size,
        dim=D,
        num_layers=3,
        num_dense_layers=1,
        num_heads=2,
        max_seq_len=32,
        moe=MoEConfig(num_experts=E, hidden_dim=F),
    )
    model = Transformer(config, "topk")
    model.init_weights(0)
    save_model(tmp_path / "model", model, tokenizer, max_shard_bytes=20_000)
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 1
    return tmp_path / "model"


def read(model_dir: Path, owned_L: list[list[int]], packed: bool = True) -> list[HeldExperts]:
    return read_held_experts(
        model_dir,
        [1, 2],
        owned_L,
        D,
        F,
        dtype=torch.bfloat16,
        device=torch.device("cpu"),
        packed=packed,
        native=False,
        batch_invariant=False,
    )


@pytest.mark.parametrize("packed", [True, False])
def test_a_worker_reads_the_experts_that_it_owns_as_rank_0_has_them(model_dir: Path, packed: bool) -> None:
    model = load_model(model_dir, dtype=torch.bfloat16).model
    if packed:
        pack_experts(model)
    owned_L = [[1, 4], []]
    banks = read(model_dir, owned_L, packed)
    for (_, layer), held, owned in zip(model.moe_layers(), banks, owned_L, strict=True):
        assert num_stacked(held.owned) == len(owned)
        assert type(held.owned) is type(layer.experts)
        for place, expert in enumerate(owned):
            assert torch.equal(chunk_of(held.owned, place), chunk_of(layer.experts, expert))


def test_a_worker_reads_fused_experts_of_another_program(model_dir: Path) -> None:
    wanted = read(model_dir, [[3], [0, 2]])
    tensors = {name: t for path in model_dir.glob("*.safetensors") for name, t in load_file(path).items()}
    for block in (1, 2):
        prefix = f"model.layers.{block}.mlp.experts."
        matrices = [
            [tensors.pop(f"{prefix}{e}.{kind}_proj.weight") for kind in ("gate", "up", "down")] for e in range(E)
        ]
        tensors[f"{prefix}gate_up_proj"] = torch.stack([torch.cat(m[:2]) for m in matrices])
        tensors[f"{prefix}down_proj"] = torch.stack([m[2] for m in matrices])
    for path in (*model_dir.glob("*.safetensors"), model_dir / "model.safetensors.index.json"):
        path.unlink()
    save_file(tensors, model_dir / "model.safetensors")
    for held, want in zip(read(model_dir, [[3], [0, 2]]), wanted, strict=True):
        for name, tensor in want.owned.named_parameters():
            assert torch.equal(dict(held.owned.named_parameters())[name], tensor)


def test_missing_and_damaged_files_are_told_by_name(model_dir: Path) -> None:
    with pytest.raises(CheckpointError, match=r"there is no model\.layers\.1\.mlp\.experts\.9\.gate_proj"):
        read(model_dir, [[9], []])
    first = sorted(model_dir.glob("*.safetensors"))[0]
    first.write_bytes(first.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=f"{first.name} is truncated or damaged"):
        read(model_dir, [[0], []])
