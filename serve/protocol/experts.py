"""What experts did, as JSON: how many tokens each one took, and how unevenly."""

from __future__ import annotations

from collections.abc import Sequence

from typing_extensions import TypedDict

from serve.client import EngineStats, ExpertRecord, ModelInfo


class ExpertLoads(TypedDict):
    """A picture of now, for a page that asks for it again and again.

    Rows of ``tokens`` and ``imbalance`` belong to ``layers``, which are block indices.
    """

    model: str
    gate: str
    weights_version: str
    layers: list[int]
    num_experts: int
    tokens: list[list[int]]
    imbalance: list[float]
    requests_running: int
    requests_waiting: int
    kv_cache_usage: float
    generation_tokens: int


class ExpertRecordBody(TypedDict):
    """What was counted between a start and a stop, or now; ``peak_imbalance`` is of single forward passes."""

    model: str
    gate: str
    weights_version: str
    recording: bool
    seconds: float
    steps: int
    tokens: int
    layers: list[int]
    num_experts: int
    load: list[list[int]]
    imbalance: list[float]
    peak_imbalance: list[float]


def load_imbalance(load_E: Sequence[int]) -> float:
    """Maximum over mean load of one layer's experts; 1 is perfect balance, and no load at all counts as that."""
    total = sum(load_E)
    return max(load_E) * len(load_E) / total if total else 1.0


def layer_indices(model: ModelInfo | None, rows: int) -> list[int]:
    """Block index of each row of a load table; the row's number where the model does not say."""
    layers = model.moe_layers if model is not None else ()
    return list(layers) if len(layers) == rows else list(range(rows))


def expert_loads(model: ModelInfo, stats: EngineStats) -> ExpertLoads:
    return {
        "model": model.model_id,
        "gate": model.gate,
        "weights_version": model.weights_version,
        "layers": layer_indices(model, len(stats.expert_load)),
        "num_experts": model.num_experts,
        "tokens": [list(load_E) for load_E in stats.expert_load],
        "imbalance": [round(load_imbalance(load_E), 4) for load_E in stats.expert_load],
        "requests_running": stats.num_running,
        "requests_waiting": stats.num_waiting,
        "kv_cache_usage": cache_usage(stats),
        "generation_tokens": stats.generation_tokens,
    }


def expert_record(model: ModelInfo, record: ExpertRecord) -> ExpertRecordBody:
    return {
        "model": model.model_id,
        "gate": model.gate,
        "weights_version": model.weights_version,
        "recording": record.recording,
        "seconds": round(record.seconds, 3),
        "steps": record.steps,
        "tokens": record.tokens,
        "layers": layer_indices(model, len(record.load)),
        "num_experts": model.num_experts,
        "load": [list(load_E) for load_E in record.load],
        "imbalance": [round(load_imbalance(load_E), 4) for load_E in record.load],
        "peak_imbalance": [round(peak, 4) for peak in record.peak_imbalance],
    }


def cache_usage(stats: EngineStats) -> float:
    """Share of the key-value cache's blocks that running requests hold, from 0 to 1."""
    return round(stats.cache.used / stats.cache.total, 4) if stats.cache.total else 0.0
