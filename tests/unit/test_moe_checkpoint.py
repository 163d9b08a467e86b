"""The exported model directory: bit-equal round trips, and every kind of damage named."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import moe.checkpoint
from moe import ModelConfig, Tokenizer, Transformer, load_model, save_model
from moe.errors import CheckpointError
from moe.hf import config_from_hf, hf_config, qwen3_moe_obstacles, split_fused

pytestmark = pytest.mark.unit

BASE: dict[str, Any] = {
    "vocab_size": 264,
    "dim": 16,
    "num_layers": 3,
    "num_heads": 4,
    "num_kv_heads": 2,
    "max_seq_len": 32,
    "num_dense_layers": 1,
    "qk_norm": True,
    "moe": {"num_experts": 4, "hidden_dim": 12},
}
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "qwen3_moe": ({}, {"k": 2}),
    "qwen3_moe untied": ({"tie_embeddings": False, "num_dense_layers": 0}, {"k": 1, "renormalise": False}),
    "shared, no qk_norm": ({"qk_norm": False, "moe": {**BASE["moe"], "num_shared_experts": 2}}, {"k": 2}),
    "gate state": ({}, {"k": 2, "score": "sigmoid", "balance": "bias", "noise": "learned"}),
}


def build(options: dict[str, Any] | None = None, gate: dict[str, Any] | None = None) -> Transformer:
    config = ModelConfig.model_validate({**BASE, **(options or {})})
    model = Transformer(config, {"name": "topk", **(gate or {})})
    model.init_weights(0)
    for _, layer in model.moe_layers():
        if layer.gate.selection_bias is not None:
            layer.gate.selection_bias.uniform_(-1, 1, generator=torch.Generator().manual_seed(1))
    return model


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.bytes()


@pytest.fixture
def saved(tmp_path: Path, tokenizer: Tokenizer) -> Path:
    save_model(tmp_path / "model", build(), tokenizer, max_shard_bytes=8_000)
    return tmp_path / "model"


@pytest.mark.parametrize(
    ("variant", "max_shard_bytes", "dtype"),
    [(variant, 4 * 2**30, torch.float32) for variant in VARIANTS]
    + [
        ("qwen3_moe", 6_000, torch.float32),
        ("gate state", 6_000, torch.bfloat16),
        ("gate state", 4 * 2**30, torch.float64),
    ],
)
def test_round_trip_is_bit_equal(
    variant: str, max_shard_bytes: int, dtype: torch.dtype, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    model = build(*VARIANTS[variant]).to(dtype)
    extra = {"train_config": {"run": {"name": "x"}}, "step": 7}
    save_model(tmp_path / "model", model, tokenizer, extra=extra, max_shard_bytes=max_shard_bytes)
    loaded = load_model(tmp_path / "model")
    assert (loaded.config, loaded.gate, loaded.extra) == (model.config, model.gate_config, extra)
    assert loaded.tokenizer.fingerprint == tokenizer.fingerprint
    assert not loaded.model.training
    state = loaded.model.state_dict()
    assert list(state) == list(model.state_dict())
    for name, value in model.state_dict().items():
        assert state[name].dtype == value.dtype, name
        assert torch.equal(state[name], value), name
    assert all(param.requires_grad for param in loaded.model.parameters())
    ids_BT = torch.arange(20).view(2, 10)
    assert torch.equal(loaded.model(ids_BT).logits_BTV, model.eval()(ids_BT).logits_BTV)
    shards = sorted((tmp_path / "model").glob("*.safetensors"))
    assert (len(shards) > 1) == (max_shard_bytes == 6_000)
    assert sum(len(load_file(shard)) for shard in shards) == len(moe.checkpoint.pieces(model.state_dict()))


def test_shards_keep_to_the_limit_and_the_index_names_them(saved: Path) -> None:
    index = json.loads((saved / "model.safetensors.index.json").read_text())
    sizes = {}
    for shard in saved.glob("*.safetensors"):
        tensors = load_file(shard)
        sizes[shard.name] = [t.numel() * t.element_size() for t in tensors.values()]
        assert all(index["weight_map"][name] == shard.name for name in tensors)
    assert index["metadata"]["total_size"] == sum(map(sum, sizes.values()))
    assert all(sum(size) <= 8_000 or len(size) == 1 for size in sizes.values())
    assert f"model-00001-of-{len(sizes):05d}.safetensors" in sizes


def test_files_and_dtype(saved: Path) -> None:
    names = {path.name for path in saved.iterdir()}
    assert {"config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"} <= names
    config = json.loads((saved / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("qwen3_moe", ["Qwen3MoeForCausalLM"])
    assert config["moeyard"]["version"] == 1
    generation = json.loads((saved / "generation_config.json").read_text())
    assert generation["eos_token_id"] == Tokenizer.bytes().eos_id
    half = load_model(saved, dtype=torch.bfloat16).model
    assert {param.dtype for param in half.parameters()} == {torch.bfloat16}


def test_what_qwen3_moe_cannot_say_is_named() -> None:
    def obstacles(variant: str) -> list[str]:
        model = build(*VARIANTS[variant])
        config = hf_config(model.config, model.gate_config, torch.float32, 0)
        found = qwen3_moe_obstacles(model.config, model.gate_config)
        assert config["model_type"] == ("moeyard" if found else "qwen3_moe")
        return found

    assert obstacles("qwen3_moe") == obstacles("qwen3_moe untied") == []
    assert obstacles("shared, no qk_norm") == ["model.qk_norm is false", "model.moe.num_shared_experts is not 0"]
    assert obstacles("gate state") == ["gate.score is sigmoid", "gate.balance is bias", "gate.noise is learned"]


def test_saving_replaces_a_model_but_nothing_else(saved: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    other = build({"num_layers": 2})
    save_model(saved, other, tokenizer)
    assert load_model(saved).config.num_layers == 2
    assert not list(saved.glob("model-*"))
    assert [path.name for path in tmp_path.iterdir()] == ["model"], "temporary folders must be gone"
    notes = tmp_path / "notes"
    notes.mkdir()
    (notes / "thesis.txt").write_text("precious")
    with pytest.raises(CheckpointError, match=r"notes holds other files and no config.json; it will not be replaced"):
        save_model(notes, other, tokenizer)
    with pytest.raises(CheckpointError, match=r"thesis.txt is a file; a model is a directory"):
        save_model(notes / "thesis.txt", other, tokenizer)
    assert (notes / "thesis.txt").read_text() == "precious"
    save_model(tmp_path / "new" / "deep" / "model", other, tokenizer)
    assert load_model(tmp_path / "new" / "deep" / "model").config.num_layers == 2


def test_full_disk_keeps_the_old_model(saved: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    written = []

    def full(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
        if written:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(path)
        save_file(tensors, path, metadata)

    monkeypatch.setattr(moe.checkpoint, "save_file", full)
    with pytest.raises(CheckpointError, match=r"cannot write the model to .*model: No space left on device"):
        save_model(saved, build({"num_layers": 2}), tokenizer, max_shard_bytes=5_000)
    assert load_model(saved).config.num_layers == 3
    assert [path.name for path in saved.parent.iterdir()] == ["model"]


def edit_config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def rewrite(folder: Path, change: Any) -> None:
    """Apply ``change`` to the tensors of every shard."""
    for shard in folder.glob("*.safetensors"):
        tensors = load_file(shard)
        change(tensors)
        save_file(tensors, shard, {"format": "pt"})


def fails(folder: Path, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        load_model(folder)


def test_truncated_and_damaged_files(saved: Path) -> None:
    shard = sorted(saved.glob("model-00002-of-*.safetensors"))[0]
    whole = shard.read_bytes()
    for damaged in (whole[: len(whole) // 2], whole[:5], b"", b"\xff" * len(whole)):
        shard.write_bytes(damaged)
        fails(saved, rf"{shard.name} is truncated or damaged")
    shard.unlink()
    fails(saved, rf"{shard.name} is missing")
    shard.write_bytes(whole)
    load_model(saved)
    (saved / "model.safetensors.index.json").write_text("{")
    fails(saved, r"model.safetensors.index.json is damaged")
    (saved / "model.safetensors.index.json").write_text('{"weight_map": {"x": "../../etc/passwd"}}')
    fails(saved, r"\.\./\.\./etc/passwd is missing")
    (saved / "model.safetensors.index.json").unlink()
    fails(saved, r"model.safetensors is missing")
    (saved / "config.json").write_text('{"moeyard": ')
    fails(saved, r"config.json is damaged")


def test_pain_6_missing_unknown_and_misshapen_tensors(saved: Path) -> None:
    """Dropped or misnamed expert weights must not load silently (Megatron-LM #5844)."""
    kept = saved.parent / "kept"
    shutil.copytree(saved, kept)

    def restore() -> None:
        shutil.rmtree(saved)
        shutil.copytree(kept, saved)

    name = "model.layers.1.mlp.experts.2.up_proj.weight"
    rewrite(saved, lambda tensors: tensors.pop(name, None))
    fails(saved, rf"the weights do not fit config.json: 1 missing: {name}")
    restore()

    def misname(tensors: dict[str, torch.Tensor]) -> None:
        if name in tensors:
            tensors[name.replace("up_proj", "up_prj")] = tensors.pop(name)

    rewrite(saved, misname)
    fails(saved, rf"1 missing: {name}; 1 unknown: {name.replace('up_proj', 'up_prj')} \(like {name}\)")
    restore()
    rewrite(saved, lambda tensors: tensors.update({name: torch.zeros(3, 3)}) if name in tensors else None)
    fails(saved, rf"{name} has shape \(3, 3\), the config says \(12, 16\)")
    restore()
    rewrite(saved, lambda tensors: [tensors.pop(n) for n in list(tensors) if ".experts." in n])
    fails(saved, r"24 missing: model.layers.1.mlp.experts.0.gate_proj.weight, .* and 19 more")


def test_foreign_directories(tmp_path: Path, saved: Path) -> None:
    fails(tmp_path / "nowhere", "nowhere: there is no such model directory")
    fails(tmp_path, r"is not a model directory: no config.json in it \(has: model\)")
    config = json.loads((saved / "config.json").read_text())
    del config["moeyard"]
    (saved / "config.json").write_text(json.dumps({**config, "model_type": "llama"}))
    fails(saved, "config.json: model_type is 'llama'; moeyard reads its own exports and qwen3_moe")


def test_wrong_config_values(saved: Path) -> None:
    own = json.loads((saved / "config.json").read_text())["moeyard"]
    edit_config(saved, moeyard={**own, "version": 99})
    fails(saved, r"written in format 99, this program reads up to 1; upgrade moeyard")
    edit_config(saved, moeyard={**own, "model": {**own["model"], "dims": 3}})
    fails(saved, r"ModelConfig has wrong options: dims: Extra inputs are not permitted")
    edit_config(saved, moeyard={**own, "gate": {"name": "topk", "kk": 3}})
    fails(saved, r"TopKConfig has wrong options: kk: Extra inputs are not permitted")
    edit_config(saved, moeyard={**own, "gate": {"name": "somebody_elses"}})
    fails(saved, r"config.json: unknown gate 'somebody_elses'. .*Known: .*topk")
    edit_config(saved, moeyard={**own, "model": {**own["model"], "num_heads": 5}})
    fails(saved, r"config.json: num_heads: 5 does not divide dim 16")
    edit_config(saved, moeyard="yes")
    fails(saved, "'moeyard' must be an object")


def test_tokenizer_must_belong_to_the_model(saved: Path, tmp_path: Path, tokenizer: Tokenizer) -> None:
    small = build({"vocab_size": 200})
    message = r"the tokenizer has 259 tokens, the model's embedding only 200 rows; they do not belong together"
    with pytest.raises(CheckpointError, match=message):
        save_model(tmp_path / "small", small, tokenizer)
    assert not (tmp_path / "small").exists()
    Tokenizer.train_bpe(["aaaa bbbb aaaa bbbb"] * 5, 262).save(saved)
    fails(saved, r"tokenizer.json is not the one that the model was exported with")
    Tokenizer.train_bpe(["the cat sat on the mat and that was that, the end"] * 9, 280).save(saved)
    fails(saved, r"the tokenizer has 2\d\d tokens, the model's embedding only 264 rows")


def test_model_of_another_program(saved: Path) -> None:
    """Without our object in config.json, and with experts fused as transformers 5 holds them in memory."""
    reference = load_model(saved)
    config = json.loads((saved / "config.json").read_text())
    del config["moeyard"]
    (saved / "config.json").write_text(json.dumps(config))
    tensors = {name: t for shard in saved.glob("*.safetensors") for name, t in load_file(shard).items()}
    for path in saved.glob("model*"):
        path.unlink()
    for layer in (1, 2):
        prefix = f"model.layers.{layer}.mlp.experts."
        parts = {k: [tensors.pop(f"{prefix}{e}.{k}_proj.weight") for e in range(4)] for k in ("gate", "up", "down")}
        tensors[prefix + "gate_up_proj"] = torch.cat([torch.stack(parts["gate"]), torch.stack(parts["up"])], 1)
        tensors[prefix + "down_proj"] = torch.stack(parts["down"])
    save_file(tensors, saved / "model.safetensors", {"format": "pt"})
    loaded = load_model(saved)
    assert loaded.extra == {}
    ids_BT = torch.arange(20).view(2, 10)
    assert torch.equal(loaded.model(ids_BT).logits_BTV, reference.model(ids_BT).logits_BTV)


def test_fused_names_only() -> None:
    tensor = torch.zeros(2, 3)
    assert split_fused("model.layers.0.mlp.down_proj.weight", tensor) == {"model.layers.0.mlp.down_proj.weight": tensor}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "gelu"}, "moeyard's model does not have this: hidden_act: 'gelu'"),
        ({"attention_bias": True}, "attention_bias: True"),
        ({"rope_parameters": None, "rope_scaling": {"type": "yarn"}}, "rope_parameters"),
        ({"mlp_only_layers": [2]}, r"mlp_only_layers: \[2\]"),
        ({"num_experts_per_tok": 1}, "norm_topk_prob: True"),
        ({"num_experts_per_tok": None}, "config.json: has no num_experts_per_tok"),
        ({"num_experts": None, "num_local_experts": None}, "has no num_experts or num_local_experts"),
        ({"hidden_size": -3}, "dim: Input should be greater than or equal to 1"),
    ],
)
def test_foreign_options_that_our_model_lacks(change: dict[str, Any], message: str) -> None:
    model = build()
    values = {**hf_config(model.config, model.gate_config, torch.float32, 0), **change}
    with pytest.raises(CheckpointError, match=message):
        config_from_hf(values, "config.json")


def test_state_without_a_name_is_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    model = build()
    model.blocks[0].register_buffer("surprise", torch.zeros(1))
    with pytest.raises(CheckpointError, match=r"cannot export blocks.0.surprise: it has no Hugging Face name"):
        save_model(tmp_path / "model", model, tokenizer)
    assert not (tmp_path / "model").exists()
