"""From an exported model directory to an engine."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from gates import Mode
from moe.checkpoint import load_model
from moe.config import count_params
from moe.ops.native import NativeOps
from moe.tokenizer import IM_END, Tokenizer
from moe.transformer import Transformer
from serve.client import ModelInfo
from serve.engine.admission import QueueLimits
from serve.engine.checks import RequestChecker
from serve.engine.core import EngineCore
from serve.engine.engine import AsyncEngine
from serve.engine.invariance import layers_that_mix_tokens, require_invariant_products
from serve.engine.model_files import read_model_files
from serve.engine.paged_cache import choose_num_blocks
from serve.engine.products import choose_products
from serve.engine.runner import ModelRunner
from serve.engine.scheduler import BatchLimits
from serve.engine.settings import EngineSettings
from serve.engine.structured import StructureCompiler
from serve.engine.threads import without_a_team
from serve.engine.weights import WeightsLoader

LOG = logging.getLogger("moeyard.serve.engine")
DTYPES = {"auto": None, "fp32": torch.float32, "bf16": torch.bfloat16}


def end_ids(tokenizer: Tokenizer, declared: frozenset[int]) -> frozenset[int]:
    """Tokens that end an answer: end of text, what generation_config.json declares, and ChatML's end of turn."""
    ends = {tokenizer.eos_id, *declared}
    if IM_END in (tokenizer.chat_template or ""):
        ends.update(tokenizer.encode(IM_END))
    return frozenset(ends)


def serving_gate_names(model: Transformer) -> list[str]:
    """Names of the gates that route while text is generated, one per MoE layer.

    Raises:
        UserError: a gate looks at the whole batch and has no causal surrogate.
    """
    return [layer.gate_for(Mode.DECODE).config.name for _, layer in model.moe_layers()]


def build_engine(
    model: Transformer,
    tokenizer: Tokenizer,
    info: ModelInfo,
    ends: frozenset[int],
    settings: EngineSettings,
    weights: WeightsLoader | None = None,
    ops: NativeOps | None = None,
) -> AsyncEngine:
    """An engine around a model in memory, not started yet. ``ops`` attend, if the model is prepared for them."""
    config = model.config
    num_blocks = choose_num_blocks(
        config,
        settings.block_size,
        settings.max_sequences,
        settings.kv_cache_gib,
        model.embed.weight.element_size(),
    )
    runner = ModelRunner(model, num_blocks, settings.block_size, batch_invariant=settings.batch_invariant, ops=ops)
    core = EngineCore(
        runner,
        tokenizer,
        ends,
        info.context_length,
        limits=BatchLimits(settings.max_sequences, settings.max_step_tokens),
        prefix_cache=settings.prefix_cache,
        version=info.weights_version,
    )
    structures = StructureCompiler(tokenizer, ends, info.vocab_size)
    checker = RequestChecker(tokenizer, info.context_length, info.vocab_size, structures)
    limits = QueueLimits(settings.max_queue, settings.max_queue_tokens)
    return AsyncEngine(core, info, checker, weights=weights, limits=limits, threads=settings.threads)


@without_a_team()
def load_engine(model_dir: Path, *, model_id: str, settings: EngineSettings | None = None) -> AsyncEngine:
    """Loads the model and puts an engine around it, not started yet.

    Raises:
        CheckpointError: a damaged or foreign directory.
        TokenizerError: its tokenizer cannot be read.
        UserError: its gate cannot generate text; or batch-invariant mode, or native ops, were asked for and are not
            possible.
    """
    settings = settings or EngineSettings()
    files = read_model_files(model_dir)
    loaded = load_model(model_dir, device=settings.device, dtype=DTYPES[settings.dtype])
    model, tokenizer, config = loaded.model, loaded.tokenizer, loaded.config
    dtype = model.embed.weight.dtype
    products = choose_products(settings.native, dtype, settings.device, batch_invariant=settings.batch_invariant)
    LOG.info("products: %s: %s", "torch" if products.ops is None else "native ops", products.reason)
    products.prepare(model)
    counts = count_params(config, loaded.gate)
    gates = serving_gate_names(model)
    if settings.batch_invariant:
        require_invariant_products(model)
        for index, layer in layers_that_mix_tokens(model):
            name = layer.gate_for(Mode.DECODE).config.name
            LOG.warning("gate %s of block %d is not batch-invariant: it is asked token by token", name, index)
            layer.route_alone = True
    info = ModelInfo(
        model_id=model_id,
        created=files.created,
        context_length=config.max_seq_len,
        vocab_size=config.vocab_size or tokenizer.vocab_size,
        num_params=counts.total,
        active_params=counts.active,
        num_experts=config.moe.num_experts,
        moe_layers=tuple(config.moe_layer_indices()),
        embedding_dim=config.dim,
        gate=gates[0] if gates else "",
        batch_invariant=settings.batch_invariant,
        weights_version=files.weights_version,
        chat_template=tokenizer.chat_template,
        special_tokens=files.special_tokens,
        defaults=files.defaults,
    )
    weights = WeightsLoader(config, loaded.gate.name, tokenizer, settings.device, dtype, products)
    return build_engine(model, tokenizer, info, end_ids(tokenizer, files.eos_ids), settings, weights, products.ops)
