"""Small training configs, their models and their batches, for tests of what a run needs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gates import Mode
from launch.config import TrainConfig
from launch.estimate import COMPUTE_DTYPES
from moe import ForwardContext, ModelOutput, Transformer, next_token_loss

SEQ_LEN, BATCH, VOCAB = 64, 2, 300


def config(**changes: Any) -> TrainConfig:
    """A small config; ``model__moe__num_experts=8`` sets ``model.moe.num_experts``."""
    values: dict[str, Any] = {
        "model": {
            "dim": 64,
            "num_layers": 3,
            "num_heads": 4,
            "max_seq_len": 512,
            "vocab_size": VOCAB,
            "moe": {"num_experts": 4, "hidden_dim": 96},
        },
        "gate": {"name": "topk", "k": 2},
        "train": {"seq_len": SEQ_LEN, "global_batch": 4},
    }
    for path, value in changes.items():
        *parents, leaf = path.split("__")
        section = values
        for parent in parents:
            section = section.setdefault(parent, {})
        section[leaf] = value
    return TrainConfig.model_validate(values)


def build(options: TrainConfig) -> Transformer:
    model = Transformer(options.model, options.gate)
    model.init_weights(0)
    if options.train.compute_dtype == "fp64":
        model.double()
    return model.train()


def forward(model: Transformer, options: TrainConfig, ids_BS: Tensor) -> tuple[ModelOutput, Tensor]:
    """(output, loss) as the trainer has them."""
    dtype = COMPUTE_DTYPES[options.train.compute_dtype]
    context = ForwardContext(mode=Mode.TRAIN, rng=torch.Generator().manual_seed(0), compute_dtype=dtype)
    output = model(ids_BS[:, :-1], context=context)
    nats, tokens = next_token_loss(output.logits_BTV, ids_BS[:, 1:])
    return output, nats / tokens + output.aux_loss()


def some_ids(options: TrainConfig) -> Tensor:
    size = (BATCH, options.train.seq_len + 1)
    return torch.randint(0, options.model.vocab_size or 0, size, generator=torch.Generator().manual_seed(1))
