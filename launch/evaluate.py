"""Validation loss in nats per token and bits per byte of text, the second comparable across tokenizers."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

from gates import Causality, Mode
from launch.config import COMPUTE_DTYPES, TokenizerConfig
from launch.data import EvalWindows, prepare_data
from moe import Transformer
from moe.transformer import ForwardContext, next_token_loss
from parallel.topology import Topology, connect

SURROGATE_METRICS = ("surrogate_agreement", "surrogate_max_vio", "batch_max_vio")


@dataclass(frozen=True)
class EvalResult:
    """Sums over the evaluated windows; ``load_LE`` counts tokens per MoE layer and expert.

    ``surrogate`` is for gates that look at the whole batch, and empty for others: how the gate that generates text
    stands in for the trained one, means over layers and tokens ("agreement": Jaccard index of the pairs; "max_vio" of
    its load, "batch_max_vio" of the trained gate's).
    """

    nats: float
    tokens: int
    text_bytes: int
    load_LE: list[list[int]]
    surrogate: dict[str, float] = field(default_factory=dict)

    @property
    def loss(self) -> float:
        return self.nats / self.tokens

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / self.text_bytes


@torch.no_grad()
def evaluate(
    model: Transformer,
    windows: EvalWindows,
    topology: Topology,
    *,
    limit: int | None,
    batch: int,
    compute_dtype: torch.dtype | None = None,
    in_lockstep: bool = False,
) -> EvalResult:
    """Evaluate the first ``limit`` validation windows (None: all), split over the ranks; same result on each.

    Args:
        batch: windows per forward pass.
        in_lockstep: ranks with fewer windows run forward passes without any, because their experts may be asked.
    """
    count = windows.num_sequences if limit is None else min(limit, windows.num_sequences)
    begin, end = (count * (topology.rank + i) // topology.world_size for i in (0, 1))
    was_training = model.training
    model.eval()
    moe_layers = model.moe_layers()
    load_LE = torch.zeros(len(moe_layers), model.config.moe.num_experts, dtype=torch.int64)
    nats, tokens, text_bytes = 0.0, 0, 0
    compared = torch.zeros(len(SURROGATE_METRICS), dtype=torch.float64)
    longest = math.ceil(count / topology.world_size) if in_lockstep else end - begin
    passes = math.ceil(longest / batch)
    for start in range(begin, begin + passes * batch, batch):
        first, stop = min(start, end), min(start + batch, end)
        ids_BS, valid_BT = windows.rows(first, stop)
        ids_BS, valid_BT = ids_BS.to(topology.device), valid_BT.to(topology.device)
        context = ForwardContext(mode=Mode.EVAL, valid_BT=valid_BT, compute_dtype=compute_dtype)
        output = model(ids_BS[:, :-1], context=context)
        batch_nats, batch_tokens = next_token_loss(output.logits_BTV, ids_BS[:, 1:], valid_BT)
        nats += float(batch_nats)
        tokens += int(batch_tokens)
        text_bytes += windows.text_bytes(first, stop)
        for row, layer in enumerate(output.routing):
            load_LE[row] += layer.output.plan.load_E.cpu()
            found = layer.output.metrics
            if SURROGATE_METRICS[0] in found and int(batch_tokens):
                values = torch.stack([found[name].double().cpu() for name in SURROGATE_METRICS])
                compared += values * (int(batch_tokens) / len(output.routing))
    model.train(was_training)
    head = torch.tensor([nats, tokens, text_bytes]).double()
    sums = topology.sum_(torch.cat([head, compared, load_LE.flatten().double()]))
    head, compared, flat = sums.split([3, compared.numel(), load_LE.numel()])
    loads: list[list[int]] = flat.long().view_as(load_LE).tolist()
    surrogate = {}
    if any(gate.causality is Causality.BATCH for _, gate in model.gates()) and float(head[1]):
        means = (compared / head[1]).tolist()
        names = (name.removeprefix("surrogate_") for name in SURROGATE_METRICS)
        surrogate = dict(zip(names, means, strict=True))
    return EvalResult(float(head[0]), int(head[1]), int(head[2]), loads, surrogate)


def evaluate_path(path: str, overrides: list[str]) -> dict[str, float | int]:
    """Evaluate a run directory or an exported model on a config's validation data.

    Args:
        path: run directory (its config names the data) or model directory (the run's config was exported with it).
        overrides: dotted changes to that config, ``data.sources=[...]`` for another corpus.

    Returns:
        loss, bits_per_byte, tokens and text_bytes; for a gate that looks at the whole batch what
        :attr:`EvalResult.surrogate` has, each name with "surrogate_" before it.
    """
    from launch.config_file import config_from_values
    from launch.run_dir import resolve_model_dir
    from moe.checkpoint import load_model

    model_dir = resolve_model_dir(path)
    loaded = load_model(model_dir)
    stored = loaded.extra.get("train_config")
    config = config_from_values(stored if isinstance(stored, dict) else {}, overrides, origin=str(model_dir))
    # The model's own tokenizer, whatever the config would train anew.
    own = TokenizerConfig(kind="file", path=str(model_dir / "tokenizer.json"))
    data_config = config.data.model_copy(update={"tokenizer": own})
    data = prepare_data(data_config, seq_len=config.train.seq_len, progress=True)
    windows = EvalWindows(data.validation, config.train.seq_len, data.tokenizer)
    with connect() as topology:
        result = evaluate(
            loaded.model.to(topology.device),
            windows,
            topology,
            limit=config.eval.final_sequences,
            batch=max(1, 8192 // config.train.seq_len),
            compute_dtype=COMPUTE_DTYPES[config.train.compute_dtype],
        )
    return {
        "loss": result.loss,
        "bits_per_byte": result.bits_per_byte,
        "tokens": result.tokens,
        "text_bytes": result.text_bytes,
        **{f"surrogate_{name}": value for name, value in result.surrogate.items()},
    }
