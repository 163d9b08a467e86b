"""What a run is said to need, against the built model, torch's own counters and real files."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch.utils.flop_counter import FlopCounterMode

from launch.cli import main
from launch.config import TrainConfig
from launch.estimate import (
    ATTENTION_BLOCK,
    activation_bytes,
    describe_estimate,
    estimate,
    format_bytes,
    format_count,
    parameter_groups,
    print_dry_run,
)
from launch.optim import build_optimizer
from moe import Transformer
from moe.attention import KVCache
from moe.config import count_params
from parallel.checkpoint import CheckpointWriter, training_tensors
from parallel.topology import Topology
from tests.small_run import BATCH, SEQ_LEN, VOCAB, build, config, forward, some_ids

pytestmark = pytest.mark.unit

ALONE = Topology(0, 1, 0, 1, torch.device("cpu"), "", None)

SHAPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "untied": {"model__tie_embeddings": False},
    "one dense layer, shared experts": {"model__num_dense_layers": 1, "model__moe__num_shared_experts": 2},
    "grouped queries, qk norm": {"model__num_kv_heads": 2, "model__qk_norm": True, "model__head_dim": 24},
    "dense of its own width": {"model__num_dense_layers": 2, "model__dense_hidden_dim": 40},
    "no experts at all": {"model__num_dense_layers": 3},
    "learned noise": {"gate__noise": "learned", "gate__importance_coef": 0.1},
    "everything": {
        "model__tie_embeddings": False,
        "model__num_dense_layers": 1,
        "model__moe__num_shared_experts": 1,
        "model__num_kv_heads": 1,
        "model__qk_norm": True,
        "gate__k": 3,
    },
}


# --- parameters -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_parameters_are_those_of_the_built_model(shape: str) -> None:
    options = config(**SHAPES[shape])
    model = Transformer(options.model, options.gate)
    parts = {
        "embedding": ("embed.",),
        "head": ("head.",),
        "attention": (".wq.", ".wk.", ".wv.", ".wo."),
        "norm": ("norm.weight",),
        "dense_ffn": (".ffn.",),
        "gate": (".moe.gate.",),
        "shared_experts": (".moe.shared.",),
        "experts": (".moe.experts.",),
    }
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    counts = estimate(options).params
    for part, signs in parts.items():
        real = sum(size for name, size in sizes.items() if any(sign in name for sign in signs))
        assert getattr(counts, part) == real, part
    assert counts.total == sum(sizes.values())
    unvisited = counts.experts * (1 - options.gate.experts_per_token(4) / 4)
    rows_not_looked_up = 0 if options.model.tie_embeddings else counts.embedding
    # The looked-up row counts beside the head: of tied embeddings it is used twice.
    assert counts.active == counts.total - unvisited - rows_not_looked_up + options.model.dim


@pytest.mark.parametrize("shape", SHAPES)
def test_parameter_groups_are_the_model_s_parameters(shape: str) -> None:
    options = config(**SHAPES[shape])
    groups = parameter_groups(options, VOCAB)
    assert sum(group.copies * math.prod(group.shape) for group in groups) == estimate(options).params.total
    model = Transformer(options.model, options.gate)
    assert sum(group.copies for group in groups) == len(list(model.parameters()))
    assert (groups[0].name, groups[0].shape, groups[0].copies) == ("embed.weight", (VOCAB, 64), 1)
    wq = next(group for group in groups if group.name == "blocks.*.attn.wq.weight")
    assert wq.copies == 3


def test_the_vocabulary_comes_from_the_tokenizer_when_the_model_has_none(tmp_path: Path) -> None:
    from moe.tokenizer import Tokenizer

    model = {"model__vocab_size": None}
    assert estimate(config(**model, data__tokenizer={"kind": "bpe", "vocab_size": 777})).vocab_size == 777
    own = Tokenizer.bytes()
    assert estimate(config(**model, data__tokenizer={"kind": "bytes"})).vocab_size == own.vocab_size
    own.save(tmp_path)
    from_file = {"kind": "file", "path": str(tmp_path / "tokenizer.json")}
    assert estimate(config(**model, data__tokenizer=from_file)).vocab_size == own.vocab_size


# --- memory, traffic, disk --------------------------------------------------------------------------------------------


def test_memory_adds_up() -> None:
    options = config(train__micro_batch=1, checkpoint__async_save=True)
    result = estimate(options, world_size=2, device="cpu")
    memory, weights = result.memory, result.params.total * 4
    assert (memory.params, memory.gradients, memory.optimizer) == (weights, weights, 2 * weights)
    assert memory.checkpoint_snapshot == 3 * weights
    assert memory.activations == activation_bytes(options, SEQ_LEN, VOCAB, "cpu")
    assert memory.total == 7 * weights + memory.activations
    assert estimate(config(checkpoint__async_save=False)).memory.checkpoint_snapshot == 0
    assert estimate(config(train__compute_dtype="fp64")).memory.params == 2 * weights
    assert (result.micro_batch, result.tokens_per_step, result.tokens) == (1, 4 * SEQ_LEN, 500 * 4 * SEQ_LEN)


def test_optimizer_and_gradients_are_those_of_the_real_ones() -> None:
    options = config()
    model = build(options)
    optimizer = build_optimizer(model, options.optim)
    moments = sum(value.nbytes for state in optimizer.state.values() for value in state.values() if value.dim())
    result = estimate(options).memory
    assert result.optimizer == moments
    assert result.params == sum(parameter.nbytes for parameter in model.parameters())


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ring_all_reduce_sends_each_chunk_twice_but_to_one_rank(world_size: int) -> None:
    """W - 1 rounds of reduce-scatter and W - 1 of all-gather, one of W chunks in each round."""
    result = estimate(config(), world_size=world_size)
    chunk = result.memory.gradients / world_size
    rounds = (world_size - 1) + (world_size - 1)
    assert result.all_reduce_bytes_per_step == round(rounds * chunk)


def test_a_checkpoint_on_disk_is_as_large_as_said(tmp_path: Path) -> None:
    options = config(model__moe__hidden_dim=256)
    model = build(options)
    tensors = training_tensors(model, build_optimizer(model, options.optim))
    writer = CheckpointWriter(tmp_path, ALONE, keep_last=1, async_save=False)
    writer.save(1, tensors, {})
    on_disk = sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file())
    said = estimate(options).checkpoint_bytes
    # torch frames each tensor as a zip archive of its own and lists it in .metadata: less than 2 KiB each.
    assert said < on_disk < said + 2048 * len(tensors)


def test_an_exported_model_is_as_large_as_said(tmp_path: Path) -> None:
    from moe.checkpoint import save_model
    from moe.tokenizer import Tokenizer

    options = config(model__tie_embeddings=False)
    save_model(tmp_path / "model", build(options), Tokenizer.bytes())
    weights = sum(file.stat().st_size for file in (tmp_path / "model").glob("*.safetensors"))
    said = estimate(options).model_bytes
    assert said < weights < 1.02 * said + 20_000


@pytest.mark.parametrize("shape", ["plain", "grouped queries, qk norm", "everything"])
def test_the_key_value_cache_is_as_large_as_said(shape: str) -> None:
    options = config(**SHAPES[shape])
    cache = KVCache(options.model, capacity=50)
    held = sum(value.nbytes for value in vars(cache).values() if isinstance(value, torch.Tensor))
    assert estimate(options).kv_cache_bytes_per_token * 50 == held


# --- FLOPs ------------------------------------------------------------------------------------------------------------


def counted_flops(options: TrainConfig) -> float:
    """What torch counts in matrix products of forward and backward, per token."""
    model, ids_BS = build(options), some_ids(options)
    with FlopCounterMode(display=False) as counter:
        _, loss = forward(model, options, ids_BS)
        loss.backward()
    return counter.get_total_flops() / (BATCH * options.train.seq_len)


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape != "learned noise"])
def test_flops_are_torch_s_count_and_attention(shape: str) -> None:
    """Torch counts every product with a weight, exactly; its counter does not know the CPU's fused attention."""
    options = config(model__moe__expert_op="loop", **SHAPES[shape])
    model = options.model
    attention = 6 * model.num_layers * model.num_heads * model.width_per_head * SEQ_LEN
    assert estimate(options).flops_per_token - attention == counted_flops(options)


def test_flops_of_attention_are_those_of_the_lower_triangle() -> None:
    """Blocked attention is made of products that torch counts: it reaches half a block beyond the diagonal.

    Of its six products a block (two forward, four backward) the counter leaves out the two that add in place.
    """
    options = config(model__moe__expert_op="loop", train__seq_len=256)
    model = options.model
    counts = count_params(model, options.gate)
    weights = 6 * (counts.active - model.dim - counts.norm)
    six_products = estimate(options).flops_per_token - weights
    counted = counted_flops(options) - weights
    assert counted == six_products * (4 / 6) * (256 + ATTENTION_BLOCK) / 256


# --- showing it -------------------------------------------------------------------------------------------------------


def test_json_has_plain_values_and_totals() -> None:
    result = estimate(config(), world_size=2, corpus_tokens=64_000)
    values = json.loads(json.dumps(result.to_json()))
    assert values["params"]["total"] == result.params.total
    parts = {name: value for name, value in values["memory"].items() if name != "total_bytes"}
    assert values["memory"]["total_bytes"] == sum(parts.values()) == result.memory.total
    assert set(parts) == {
        f"{name}_bytes" for name in ("params", "gradients", "optimizer", "activations", "checkpoint_snapshot")
    }
    assert values["epochs"] == 500 * 4 * SEQ_LEN / 64_000
    assert values["world_size"] == 2
    assert estimate(config()).epochs is None


def test_the_command_prints_json_and_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    small = ["model.dim=32", "model.num_heads=2", "model.vocab_size=300", "train.global_batch=6"]
    assert main(["estimate", "--json", "--ranks", "3", "--corpus-tokens", "1000", *small]) == 0
    values = json.loads(capsys.readouterr().out)
    assert (values["vocab_size"], values["world_size"], values["micro_batch"]) == (300, 3, 2)
    assert main(["estimate", *small]) == 0
    text = capsys.readouterr().out
    for word in ("parameters", "FLOPs per step", "memory per rank", "traffic per step", "key-value cache"):
        assert word in text
    assert main(["estimate", "--ranks", "5", *small]) == 2
    assert "train.global_batch: 6 sequences do not split evenly over 5 ranks" in capsys.readouterr().err


def test_the_table_names_the_shape_of_the_batch_and_the_epochs() -> None:
    options = config(train__micro_batch=1)
    lines = {
        line[0]: line for line in describe_estimate(options, estimate(options, world_size=2, corpus_tokens=64_000))
    }
    assert lines["tokens per step"] == ("tokens per step", "256", "2 rank(s) x 2 micro-batch(es) x 1 x 64")
    assert lines["tokens in all"][2] == "500 steps, 2.00 epochs of 64,000 tokens"
    assert lines["  activations"][2] == "fp32, recompute none"


def test_dry_run_prints_shapes_and_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RANK", raising=False)
    options = config(run__root=str(tmp_path / "runs"))
    out = io.StringIO()
    print_dry_run(options, world_size=2, console=Console(file=out, width=120))
    text = out.getvalue()
    assert "2 rank(s) x 1 micro-batch(es) x 2 x 64" in text
    line = next(line for line in text.splitlines() if "blocks.*.moe.experts.w_down_EFD" in line)
    assert line.split()[1:] == ["4", "x", "96", "x", "64", "3", "73,728"]
    assert "Nothing was trained or written." in text
    assert list(tmp_path.iterdir()) == []


def test_dry_run_speaks_once_for_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    out = io.StringIO()
    print_dry_run(config(), console=Console(file=out))
    assert out.getvalue() == ""


def test_a_huge_model_is_counted_without_memory_for_it() -> None:
    huge = config(
        model__dim=8192, model__num_layers=60, model__num_heads=64, model__moe={"num_experts": 256, "hidden_dim": 4096}
    )
    assert estimate(huge).params.total > 1.5e12


def test_numbers_are_written_for_people() -> None:
    assert [format_bytes(n) for n in (0, 1023, 1536, 2**20, 5 * 2**30, 3 * 2**50)] == [
        "0 B",
        "1023 B",
        "1.5 KiB",
        "1.0 MiB",
        "5.0 GiB",
        "3,072.0 TiB",
    ]
    assert [format_count(n) for n in (7, 1200, 1.2e7, 3e21)] == ["7", "1.2 k", "12.0 M", "3,000.0 E"]
