"""From an exported model directory to an engine."""

from __future__ import annotations

from pathlib import Path

from moe.checkpoint import load_model
from moe.config import count_params
from moe.tokenizer import IM_END, Tokenizer
from serve.client import ModelInfo
from serve.engine.admission import QueueLimits
from serve.engine.model_files import read_model_files
from serve.engine.runner import ModelRunner
from serve.engine.simple import SimpleEngine


def end_ids(tokenizer: Tokenizer, declared: frozenset[int]) -> frozenset[int]:
    """Tokens that end an answer: end of text, what generation_config.json declares, and ChatML's end of turn."""
    ends = {tokenizer.eos_id, *declared}
    if IM_END in (tokenizer.chat_template or ""):
        ends.update(tokenizer.encode(IM_END))
    return frozenset(ends)


def load_simple_engine(
    model_dir: Path,
    *,
    model_id: str,
    limits: QueueLimits | None = None,
    threads: int | None = None,
    device: str = "cpu",
) -> SimpleEngine:
    """Loads the model and puts an engine around it, not started yet.

    Raises:
        CheckpointError: a damaged or foreign directory.
        TokenizerError: its tokenizer cannot be read.
    """
    files = read_model_files(model_dir)
    loaded = load_model(model_dir, device=device)
    model, tokenizer = loaded.model, loaded.tokenizer
    counts = count_params(loaded.config, loaded.gate)
    runner = ModelRunner(model, end_ids(tokenizer, files.eos_ids))
    info = ModelInfo(
        model_id=model_id,
        created=files.created,
        context_length=loaded.config.max_seq_len,
        vocab_size=loaded.config.vocab_size or tokenizer.vocab_size,
        num_params=counts.total,
        active_params=counts.active,
        num_experts=loaded.config.moe.num_experts,
        moe_layers=tuple(loaded.config.moe_layer_indices()),
        weights_version=files.weights_version,
        chat_template=tokenizer.chat_template,
        special_tokens=files.special_tokens,
        defaults=files.defaults,
    )
    return SimpleEngine(runner, tokenizer, info, limits=limits, threads=threads)
