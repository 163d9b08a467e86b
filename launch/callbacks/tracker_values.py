"""The bounded set of numbers that trackers get, the same for each: never a series per expert.

Expert health is five scalars (imbalance, dead, dropped, entropy, router z) and one imbalance a layer; the rest of what
loads can tell is in the heatmap. Names: L MoE layers, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from launch.heatmap import load_ratio
from launch.records import EvalRecord, LogRecord

if TYPE_CHECKING:
    from parallel.engine_metrics import EngineMetrics


def normalized_entropy(load_LE: Sequence[Sequence[int]]) -> float:
    """Entropy of the load shares over log E, mean over layers: 1 is perfectly even, 0 one expert taking all.

    Layers without any load do not count; nan when there is no layer left or only one expert.
    """
    load = np.asarray(load_LE, dtype=np.float64)
    if load.ndim != 2 or load.shape[1] < 2:
        return math.nan
    load = load[load.sum(axis=1) > 0]
    if not len(load):
        return math.nan
    share_LE = load / load.sum(axis=1, keepdims=True)
    nats_L = -(share_LE * np.log(share_LE, where=share_LE > 0, out=np.zeros_like(share_LE))).sum(axis=1)
    return float(nats_L.mean() / math.log(load.shape[1]))


def train_values(record: LogRecord, moe_layers: Sequence[int]) -> dict[str, float]:
    """Scalars of one log record by tracker name; those that the run does not have are left out.

    Args:
        moe_layers: block index of each row of ``record.load_LE``.
    """
    values = {
        "train/loss": record.loss,
        "train/lr": record.lr,
        "train/grad_norm": record.grad_norm,
        "speed/tokens_per_s": record.tokens_per_s,
        "speed/memory_gib": record.memory_gib,
    }
    values |= {f"train/aux/{name}": value for name, value in record.aux.items()}
    values |= {f"seconds_per_step/{name}": value for name, value in record.phase_s.items()}
    if record.load_LE:
        values |= {
            "experts/imbalance": record.imbalance,
            "experts/dead_fraction": record.dead_expert_fraction,
            "experts/dropped_fraction": record.dropped_fraction,
            "experts/entropy": normalized_entropy(record.load_LE),
        }
        if "z" in record.aux:
            values["experts/router_z"] = record.aux["z"]
        worst_L = load_ratio(record.load_LE).max(axis=1).tolist()
        for layer, worst in zip(moe_layers, worst_L, strict=True):
            values[f"imbalance_by_layer/layer_{layer:02d}"] = worst
    if record.engine is not None:
        values |= engine_values(record.engine)
    return {name: value for name, value in values.items() if not math.isnan(value)}


def engine_values(engine: EngineMetrics) -> dict[str, float]:
    """Scalars of how experts are spread over ranks, by tracker name; bytes and seconds are per step."""
    values = {
        "ranks/imbalance_before": engine.imbalance_before,
        "ranks/imbalance_after": engine.imbalance_after,
        "ranks/copies": float(sum(engine.copies_L)),
        "ranks/copy_peak_gib": engine.copy_peak_bytes / 2**30,
        "ranks/copies_hidden_s": engine.copies_hidden_s,
        "ranks/copies_exposed_s": engine.copies_exposed_s,
        "ranks/tokens_waited_s": engine.tokens_waited_s,
    }
    return values | {f"ranks/sent_mib/{kind}": sent / 2**20 for kind, sent in engine.sent_bytes.items()}


def eval_values(record: EvalRecord) -> dict[str, float]:
    """Scalars of one evaluation by tracker name."""
    values = {"eval/loss": record.loss, "eval/bits_per_byte": record.bits_per_byte}
    return values | {f"eval/surrogate_{name}": value for name, value in record.surrogate.items()}
