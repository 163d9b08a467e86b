"""What a run will need, from its options alone: parameters, FLOPs, memory, traffic, disk. No module is built.

Memory is counted per rank for plain data parallel training. Activations are what autograd keeps for the backward pass
of one micro-batch, summed over the operations of ``moe/transformer.py``, and the first gradients; a test compares the
sum with the bytes that torch really holds at its peak. Not counted: Python and torch themselves (about 0.3 GiB a
process) and scratch space inside single operations.

Names: L layers, D width, E experts, F expert hidden width, K experts per token, H query heads, G key-value heads,
d head width, S sequence length, V vocabulary, W ranks.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass

import torch
from rich.console import Console
from rich.table import Table

from launch.config import COMPUTE_DTYPES, TokenizerConfig, TrainConfig
from moe.config import ParamCounts, count_params, flops_per_token
from moe.ops.causal_attention import choose_attention_op

INDEX_BYTES = 8
ATTENTION_BLOCK = 64
"""Positions of one block of ``moe/ops/causal_attention.py``."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on each rank during training; ``checkpoint_snapshot`` lies in the host's memory."""

    params: int
    gradients: int
    optimizer: int
    activations: int
    checkpoint_snapshot: int

    @property
    def total(self) -> int:
        return self.params + self.gradients + self.optimizer + self.activations + self.checkpoint_snapshot


@dataclass(frozen=True)
class Estimate:
    """Everything that follows from a config.

    Attributes:
        flops_per_token: of training, forward and backward.
        micro_batch: sequences per forward pass on each rank.
        memory: per rank.
        all_reduce_bytes_per_step: what each rank sends (and receives) for gradients, ring all-reduce.
        checkpoint_bytes: one training checkpoint on disk; model_bytes: the exported model.
        kv_cache_bytes_per_token: keys and values of one position when generating.
        corpus_tokens, epochs: None when the corpus' size was not given.
    """

    vocab_size: int
    params: ParamCounts
    flops_per_token: float
    world_size: int
    micro_batch: int
    tokens_per_step: int
    steps: int
    tokens: int
    memory: MemoryEstimate
    all_reduce_bytes_per_step: int
    checkpoint_bytes: int
    model_bytes: int
    kv_cache_bytes_per_token: int
    corpus_tokens: int | None
    epochs: float | None

    def to_json(self) -> dict[str, object]:
        """Plain values, with the derived totals."""
        values = asdict(self)
        values["params"]["total"] = self.params.total
        values["memory"] = {f"{name}_bytes": value for name, value in values["memory"].items()}
        values["memory"]["total_bytes"] = self.memory.total
        return values


def estimate(
    config: TrainConfig, *, world_size: int = 1, corpus_tokens: int | None = None, device: str | None = None
) -> Estimate:
    """Work out a run.

    Args:
        world_size: W.
        corpus_tokens: tokens of the training corpus, for the number of epochs.
        device: "cpu" or "cuda"; None: where a run started here would compute.

    Raises:
        TokenizerError: the vocabulary's size stands in a tokenizer file that cannot be read.
    """
    model, train = config.model, config.train
    vocab_size = model.vocab_size or tokenizer_vocab_size(config.data.tokenizer)
    params = count_params(model, config.gate, vocab_size)
    master_bytes = 8 if train.compute_dtype == "fp64" else 4
    weights = params.total * master_bytes
    rows = train.global_batch // world_size
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    micro_batch = train.micro_batch or rows
    state_bytes = 3 * weights  # weights and Adam's two moments
    memory = MemoryEstimate(
        params=weights,
        gradients=weights,
        optimizer=2 * weights,
        activations=activation_bytes(config, micro_batch * train.seq_len, vocab_size, device),
        checkpoint_snapshot=state_bytes if config.checkpoint.async_save else 0,
    )
    tokens_per_step = train.global_batch * train.seq_len
    tokens = train.steps * tokens_per_step
    return Estimate(
        vocab_size=vocab_size,
        params=params,
        flops_per_token=flops_per_token(model, config.gate, train.seq_len, vocab_size),
        world_size=world_size,
        micro_batch=micro_batch,
        tokens_per_step=tokens_per_step,
        steps=train.steps,
        tokens=tokens,
        memory=memory,
        all_reduce_bytes_per_step=round(2 * (world_size - 1) / world_size * weights),
        checkpoint_bytes=state_bytes,
        model_bytes=weights,
        kv_cache_bytes_per_token=2 * model.num_layers * model.kv_heads * model.width_per_head * 4,
        corpus_tokens=corpus_tokens,
        epochs=tokens / corpus_tokens if corpus_tokens else None,
    )


def tokenizer_vocab_size(config: TokenizerConfig) -> int:
    """Vocabulary of a run's tokenizer. A BPE that is yet to be trained counts as full."""
    if config.kind == "bpe":
        return config.vocab_size
    from moe.tokenizer import Tokenizer

    return Tokenizer.bytes().vocab_size if config.path is None else Tokenizer.load(config.path).vocab_size


def activation_bytes(config: TrainConfig, tokens: int, vocab_size: int, device: str) -> int:
    """Bytes at the peak of one micro-batch of ``tokens`` tokens: what autograd keeps, and gradients on their way.

    The peak is either where backward begins, at the head, or in the middle of a block, which with recompute is whole
    again there.
    """
    model = config.model
    narrow = COMPUTE_DTYPES[config.train.compute_dtype].itemsize
    wide = max(4, narrow)  # residual stream, norms, gate and loss are fp32 at least
    attention = _attention_bytes(config, narrow, wide, device)
    moe = _moe_bytes(config, narrow, wide)
    dense = 4 * model.dense_width(config.gate) * narrow
    blocks = [attention + (moe if i in model.moe_layer_indices() else dense) for i in range(model.num_layers)]
    scores = vocab_size * wide
    chosen = config.gate.experts_per_token(model.moe.num_experts)
    head_copy, *block_copies = _cast_weight_bytes(config, vocab_size)
    if model.recompute == "block":  # kept: each block's input, its choice of experts and the gate's scores
        routing = chosen * 6 * INDEX_BYTES + model.moe.num_experts * wide
        kept = tokens * (model.num_layers * model.dim * wide + model.num_moe_layers * routing)
        again = max(tokens * block + copy for block, copy in zip(blocks, block_copies, strict=True))
    else:
        kept = tokens * sum(blocks) + sum(block_copies)
        again = 0.0
    # At the head: the final norm's input and output; scores, their log-softmax, and the gradients of both.
    at_the_head = tokens * (model.dim * (wide + narrow) + 4 * scores) + head_copy
    # In a block: the scores, which the model's output holds; gradients of the rows before and after an expert, and of
    # the largest matrix until it is added to those of other micro-batches.
    has_experts = model.num_moe_layers > 0
    rows = (2 * chosen if has_experts else 1) * model.dim * wide
    width = model.moe.num_experts * model.moe.hidden_dim if has_experts else model.dense_width(config.gate)
    matrix = model.dim * width * (wide + narrow if narrow < wide else wide)
    in_a_block = tokens * (scores + rows) + matrix + again
    return math.ceil(kept + max(at_the_head, in_a_block))


def _attention_bytes(config: TrainConfig, narrow: int, wide: int, device: str) -> float:
    """Per token: both norms' inputs and outputs, queries, keys, values, output; probabilities if the op keeps them."""
    model, seq_len, dtype = config.model, config.train.seq_len, COMPUTE_DTYPES[config.train.compute_dtype]
    heads, kv_heads, width = model.num_heads, model.kv_heads, model.width_per_head
    norms = 2 * (model.dim * (wide + narrow) + wide)
    before_norm = (heads + kv_heads) * (width + 1) * wide if model.qk_norm else 0
    # The output projection's input is a copy of the output with positions before heads.
    projections = (2 * heads + 2 * kv_heads) * width * narrow
    op = choose_attention_op(torch.device(device), dtype, seq_len, training=True)
    if op.name == "blocked":  # a block row reaches to the end of its diagonal block
        return norms + before_norm + projections + heads * (seq_len + ATTENTION_BLOCK) / 2 * narrow
    return norms + before_norm + projections + heads * (width * narrow + 4)  # the output itself and its log-sum-exp


def _moe_bytes(config: TrainConfig, narrow: int, wide: int) -> float:
    """Per token: the gate's scores, each expert's input, two hidden layers, their activation and product, output."""
    model, gate = config.model, config.gate
    chosen = gate.experts_per_token(model.moe.num_experts)
    hidden = model.moe.hidden_dim
    scores = 3 * model.moe.num_experts * wide
    routed = chosen * ((2 * model.dim + 4 * hidden) * narrow + 5 * INDEX_BYTES)
    shared = 4 * model.moe.num_shared_experts * hidden * narrow
    cast_for_gate = model.dim * wide if narrow < wide else 0
    return scores + routed + shared + cast_for_gate


def _cast_weight_bytes(config: TrainConfig, vocab_size: int) -> list[int]:
    """Copies of the matrices in the compute dtype, kept for backward: the head's, then each block's.

    Zeros when masters are computed with. Norms and gates compute in fp32; looking up an embedding needs no copy.
    """
    model = config.model
    if config.train.compute_dtype != "bf16":
        return [0] * (model.num_layers + 1)
    counts = count_params(model, config.gate, vocab_size)
    attention = counts.attention // model.num_layers
    dense = counts.dense_ffn // max(1, model.num_dense_layers)
    moe = (counts.experts + counts.shared_experts) // max(1, model.num_moe_layers)
    blocks = [attention + (moe if i in model.moe_layer_indices() else dense) for i in range(model.num_layers)]
    return [2 * count for count in (vocab_size * model.dim, *blocks)]


# --- showing it -------------------------------------------------------------------------------------------------------


def describe_estimate(config: TrainConfig, result: Estimate) -> list[tuple[str, str, str]]:
    """(what, how much, remark) lines for people."""
    counts, memory, model, train = result.params, result.memory, config.model, config.train
    accumulate = train.global_batch // result.world_size // result.micro_batch
    shape = f"{result.world_size} rank(s) x {accumulate} micro-batch(es) x {result.micro_batch} x {train.seq_len}"
    flops_per_step = result.flops_per_token * result.tokens_per_step
    epochs = f"{result.epochs:.2f} epochs of {result.corpus_tokens:,} tokens" if result.epochs is not None else ""
    parts = {name: value for name, value in asdict(counts).items() if name != "active" and value}
    needs = {
        "weights": (memory.params, "fp64" if train.compute_dtype == "fp64" else "fp32 masters"),
        "gradients": (memory.gradients, ""),
        "Adam moments": (memory.optimizer, ""),
        "activations": (memory.activations, f"{train.compute_dtype}, recompute {model.recompute}"),
        "checkpoint copy": (memory.checkpoint_snapshot, "host memory while saving; checkpoint.async_save"),
    }
    return [
        ("parameters", f"{counts.total:,}", f"{counts.active:,} ({counts.active / counts.total:.0%}) active per token"),
        *(
            (f"  {name.replace('_', ' ')}", f"{value:,}", f"{value / counts.total:.0%}")
            for name, value in parts.items()
        ),
        ("FLOPs per token", format_count(result.flops_per_token), "forward and backward"),
        ("FLOPs per step", format_count(flops_per_step), f"{format_count(flops_per_step * result.steps)} in all"),
        ("tokens per step", f"{result.tokens_per_step:,}", shape),
        ("tokens in all", f"{result.tokens:,}", f"{result.steps:,} steps{', ' * bool(epochs)}{epochs}"),
        ("memory per rank", format_bytes(memory.total), "plus Python and torch, about 0.3 GiB"),
        *((f"  {name}", format_bytes(value), remark) for name, (value, remark) in needs.items() if value),
        ("traffic per step", format_bytes(result.all_reduce_bytes_per_step), "sent by each rank for gradients"),
        ("checkpoint", format_bytes(result.checkpoint_bytes), f"on disk; {config.checkpoint.keep_last} kept"),
        ("exported model", format_bytes(result.model_bytes), "on disk"),
        (
            "key-value cache",
            format_bytes(result.kv_cache_bytes_per_token),
            f"per generated token; {format_bytes(result.kv_cache_bytes_per_token * model.max_seq_len)} for a"
            f" context of {model.max_seq_len:,}",
        ),
    ]


def print_estimate(config: TrainConfig, result: Estimate, console: Console | None = None) -> None:
    """The table of :func:`describe_estimate` on the terminal."""
    table = Table(title=f"{config.run.name}: what it needs", title_justify="left", show_header=False, box=None)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True, justify="right")
    table.add_column(overflow="fold", style="dim")
    for line in describe_estimate(config, result):
        table.add_row(*line)
    (console or Console(highlight=False)).print(table)


def print_dry_run(config: TrainConfig, *, world_size: int | None = None, console: Console | None = None) -> None:
    """The estimate and the shape of every parameter; only rank 0 prints.

    Args:
        world_size: ranks that would train; None takes those that torchrun has started.
    """
    if int(os.environ.get("RANK", "0")) != 0:
        return
    console = console or Console(highlight=False)
    result = estimate(config, world_size=world_size or int(os.environ.get("WORLD_SIZE", "1")))
    print_estimate(config, result, console)
    table = Table(title="\nparameters by shape", title_justify="left", box=None, header_style="dim")
    for name in ("parameter", "shape", "copies", "numbers"):
        table.add_column(name, justify="left" if name == "parameter" else "right")
    for group in parameter_groups(config, result.vocab_size):
        shape = " x ".join(f"{size:,}" for size in group.shape)
        table.add_row(group.name, shape, f"{group.copies:,}", f"{group.copies * math.prod(group.shape):,}")
    console.print(table)
    console.print("\nNothing was trained or written.")


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters of one name and shape in several blocks; the block number stands as ``*`` in the name."""

    name: str
    shape: tuple[int, ...]
    copies: int


def parameter_groups(config: TrainConfig, vocab_size: int) -> list[ParameterGroup]:
    """Every parameter of the model, in order. The model is built without memory for its weights."""
    from moe.transformer import Transformer

    with torch.device("meta"):
        model = Transformer(config.model.model_copy(update={"vocab_size": vocab_size}), config.gate)
    return _grouped((name, tuple(parameter.shape)) for name, parameter in model.named_parameters())


def _grouped(parameters: Iterable[tuple[str, tuple[int, ...]]]) -> list[ParameterGroup]:
    copies: dict[tuple[str, tuple[int, ...]], int] = {}
    for name, shape in parameters:
        key = (re.sub(r"^blocks\.\d+\.", "blocks.*.", name), shape)
        copies[key] = copies.get(key, 0) + 1
    return [ParameterGroup(name, shape, count) for (name, shape), count in copies.items()]


def format_bytes(count: float) -> str:
    """``1536`` -> ``1.5 KiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:,.1f} TiB"


def format_count(count: float) -> str:
    """``1.2e7`` -> ``12.0 M``."""
    for unit in ("", " k", " M", " G", " T", " P"):
        if count < 1000:
            return f"{count:.0f}" if unit == "" else f"{count:.1f}{unit}"
        count /= 1000
    return f"{count:,.1f} E"
