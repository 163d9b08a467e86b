"""Hugging Face names and configs, in and out.

A model that the ``qwen3_moe`` architecture of transformers can express is exported as one, so that
``AutoModelForCausalLM.from_pretrained`` loads it; any other says ``model_type: moeyard``. Tensor names are the same in
both cases, with ``mlp.shared_expert.*`` and gate state added where that architecture has no place for them.

Shape suffixes: E experts, D width, F expert hidden width.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from gates import GateConfig, TopKConfig
from moe.config import ModelConfig
from moe.errors import CheckpointError

QWEN3_MOE = "qwen3_moe"
MOEYARD = "moeyard"

_OUTER = {
    "embed.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
}
_INNER = {
    "attn_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    **{f"attn.w{x}.weight": f"self_attn.{x}_proj.weight" for x in "qkvo"},
    **{f"attn.{x}_norm.weight": f"self_attn.{x}_norm.weight" for x in "qk"},
    **{f"ffn.w_{x}.weight": f"mlp.{x}_proj.weight" for x in ("gate", "up", "down")},
    **{f"moe.shared.w_{x}.weight": f"mlp.shared_expert.{x}_proj.weight" for x in ("gate", "up", "down")},
}
_EXPERT = {
    "moe.experts.w_gate_EDF": "gate_proj",
    "moe.experts.w_up_EDF": "up_proj",
    "moe.experts.w_down_EFD": "down_proj",
}
_GATE = "moe.gate."


@dataclass(frozen=True)
class Piece:
    """One tensor of an exported model.

    Attributes:
        theirs: its Hugging Face name.
        ours: the key of the state dict that it belongs to.
        expert: which expert's matrix it is, transposed to (out, in); None for a whole tensor.
        shape: in the file.
    """

    theirs: str
    ours: str
    expert: int | None
    shape: tuple[int, ...]

    def read(self, state: Mapping[str, Tensor]) -> Tensor:
        """This piece of our state dict, contiguous, as the file holds it."""
        tensor = state[self.ours].detach()
        return (tensor if self.expert is None else tensor[self.expert].t()).contiguous()

    def write(self, state: Mapping[str, Tensor], value: Tensor) -> None:
        """Copy ``value``, as the file holds it, into our state dict."""
        if self.expert is None:
            state[self.ours].copy_(value)
        else:
            state[self.ours][self.expert].copy_(value.t())


def pieces(state: Mapping[str, Tensor]) -> list[Piece]:
    """Every tensor of the exported model, in the order of the state dict; only names and shapes of ``state`` count.

    Raises:
        CheckpointError: a key that has no Hugging Face name, or a value that is not a tensor.
    """
    result = []
    for ours, tensor in state.items():
        if not isinstance(tensor, Tensor):
            raise CheckpointError(f"cannot export {ours}: its state is a {type(tensor).__name__}, not a tensor")
        if ours in _OUTER:
            result.append(Piece(_OUTER[ours], ours, None, tuple(tensor.shape)))
            continue
        _, block, inner = ours.split(".", 2) if ours.count(".") >= 2 else ("", "", ours)
        prefix = f"model.layers.{block}."
        if inner in _EXPERT:
            num_experts, rows, columns = tensor.shape
            for e in range(num_experts):
                theirs = f"{prefix}mlp.experts.{e}.{_EXPERT[inner]}.weight"
                result.append(Piece(theirs, ours, e, (columns, rows)))
        elif inner in _INNER:
            result.append(Piece(prefix + _INNER[inner], ours, None, tuple(tensor.shape)))
        elif inner.startswith(_GATE):
            theirs = f"{prefix}mlp.gate.{inner.removeprefix(_GATE)}"
            result.append(Piece(theirs, ours, None, tuple(tensor.shape)))
        else:
            raise CheckpointError(f"cannot export {ours}: it has no Hugging Face name")
    return result


def qwen3_moe_obstacles(model: ModelConfig, gate: GateConfig) -> list[str]:
    """What keeps a model from being a ``qwen3_moe`` at evaluation, one phrase each; empty when nothing does.

    Training-only options of the gate (noise without weights of its own, jitter, capacity) do not matter.
    """
    obstacles = []
    if not model.qk_norm:
        obstacles.append("model.qk_norm is false")
    if model.moe.num_shared_experts:
        obstacles.append("model.moe.num_shared_experts is not 0")
    if not isinstance(gate, TopKConfig):
        return [*obstacles, f"gate.name is {gate.name}"]
    if gate.score != "softmax":
        obstacles.append(f"gate.score is {gate.score}")
    if gate.scale != 1:
        obstacles.append(f"gate.scale is {gate.scale:g}")
    if gate.balance != "aux":
        obstacles.append(f"gate.balance is {gate.balance}")
    if gate.num_groups > 1:
        obstacles.append("gate.num_groups is more than 1")
    if gate.noise == "learned":
        obstacles.append("gate.noise is learned")
    return obstacles


def hf_config(model: ModelConfig, gate: GateConfig, dtype: torch.dtype, eos_id: int) -> dict[str, Any]:
    """The Hugging Face side of config.json: what transformers, vLLM and the like read."""
    assert model.vocab_size is not None
    expressible = not qwen3_moe_obstacles(model, gate)
    values: dict[str, Any] = {
        "architectures": ["Qwen3MoeForCausalLM" if expressible else "MoeyardForCausalLM"],
        "model_type": QWEN3_MOE if expressible else MOEYARD,
        "vocab_size": model.vocab_size,
        "hidden_size": model.dim,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.width_per_head,
        "max_position_embeddings": model.max_seq_len,
        # transformers 5 reads rope_parameters, 4 and most other readers rope_theta; likewise num_(local_)experts.
        "rope_theta": model.rope_theta,
        "rope_parameters": {"rope_theta": model.rope_theta, "rope_type": "default"},
        "rms_norm_eps": model.norm_eps,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": model.tie_embeddings,
        "initializer_range": model.init_std,
        "intermediate_size": model.dense_width(gate),
        "moe_intermediate_size": model.moe.hidden_dim,
        "num_experts": model.moe.num_experts,
        "num_local_experts": model.moe.num_experts,
        "decoder_sparse_step": 1,
        "mlp_only_layers": list(range(model.num_dense_layers)),
        "use_sliding_window": False,
        "sliding_window": None,
        "output_router_logits": False,
        "use_cache": True,
        "eos_token_id": eos_id,
        "bos_token_id": None,
        "pad_token_id": None,
        "dtype": str(dtype).removeprefix("torch."),
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
    if isinstance(gate, TopKConfig):
        values["num_experts_per_tok"] = gate.k
        values["norm_topk_prob"] = gate.weights_add_up
        values["router_aux_loss_coef"] = gate.balance_coef
    return values


def config_from_hf(values: Mapping[str, Any], where: str) -> tuple[ModelConfig, GateConfig]:
    """Our options of a ``qwen3_moe`` model that another program wrote.

    Args:
        values: its config.json.
        where: file name for messages.

    Raises:
        CheckpointError: another architecture, a missing key, or an option that our model does not have.
    """
    if values.get("model_type") != QWEN3_MOE:
        raise CheckpointError(
            f"{where}: model_type is {values.get('model_type')!r}; moeyard reads its own exports and {QWEN3_MOE}"
        )

    def need(*keys: str) -> Any:
        found = [values[key] for key in keys if values.get(key) is not None]
        if not found:
            raise CheckpointError(f"{where}: has no {' or '.join(keys)}")
        return found[0]

    rope = values.get("rope_parameters") or {"rope_theta": values.get("rope_theta", 1e4), **_scaling(values)}
    dense = list(values.get("mlp_only_layers") or [])
    unsupported = {
        "hidden_act": values.get("hidden_act", "silu") != "silu",
        "attention_bias": bool(values.get("attention_bias")),
        "use_sliding_window": bool(values.get("use_sliding_window")),
        "rope_parameters": rope.get("rope_type", "default") != "default",
        "decoder_sparse_step": values.get("decoder_sparse_step", 1) != 1,
        "mlp_only_layers": sorted(dense) != list(range(len(dense))),
        "norm_topk_prob": bool(values.get("norm_topk_prob")) and values.get("num_experts_per_tok") == 1,
    }
    wrong = [f"{key}: {values.get(key)!r}" for key, bad in unsupported.items() if bad]
    if wrong:
        raise CheckpointError(f"{where}: moeyard's model does not have this: {'; '.join(wrong)}")
    model = {
        "vocab_size": need("vocab_size"),
        "dim": need("hidden_size"),
        "num_layers": need("num_hidden_layers"),
        "num_heads": need("num_attention_heads"),
        "num_kv_heads": need("num_key_value_heads"),
        "head_dim": values.get("head_dim"),
        "max_seq_len": need("max_position_embeddings"),
        "rope_theta": rope["rope_theta"],
        "norm_eps": need("rms_norm_eps"),
        "qk_norm": True,
        "tie_embeddings": bool(values.get("tie_word_embeddings")),
        "init_std": values.get("initializer_range", 0.02),
        "num_dense_layers": len(dense),
        "dense_hidden_dim": values.get("intermediate_size"),
        "moe": {
            "num_experts": need("num_experts", "num_local_experts"),
            "hidden_dim": need("moe_intermediate_size"),
        },
    }
    gate = {
        "k": need("num_experts_per_tok"),
        "renormalise": bool(values.get("norm_topk_prob")),
        "balance_coef": values.get("router_aux_loss_coef", 0.001),
    }
    try:
        return ModelConfig.model_validate(model), TopKConfig.model_validate(gate)
    except ValidationError as error:
        lines = [f"{'.'.join(str(part) for part in e['loc'])}: {e['msg']}" for e in error.errors()]
        raise CheckpointError(f"{where}: {'; '.join(lines)}") from error


def _scaling(values: Mapping[str, Any]) -> dict[str, Any]:
    """The rope_scaling of transformers 4 in the words of rope_parameters."""
    scaling = values.get("rope_scaling") or {}
    return {"rope_type": scaling.get("rope_type", scaling.get("type", "default"))}


_FUSED = re.compile(r"(model\.layers\.\d+\.mlp\.experts\.)(gate_up_proj|down_proj)$")


def split_fused(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """Per-expert tensors of a fused one, as transformers 5 holds experts in memory; anything else unchanged.

    ``gate_up_proj`` is (E, 2 F, D), gate above up; ``down_proj`` is (E, D, F).
    """
    match = _FUSED.match(name)
    if match is None:
        return {name: tensor}
    prefix, kind = match.groups()
    split: dict[str, Tensor] = {}
    for e, matrix in enumerate(tensor):
        if kind == "down_proj":
            split[f"{prefix}{e}.down_proj.weight"] = matrix
        else:
            split[f"{prefix}{e}.gate_proj.weight"], split[f"{prefix}{e}.up_proj.weight"] = matrix.chunk(2)
    return split
