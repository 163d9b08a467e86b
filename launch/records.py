"""What training reports: values that the trainer makes and callbacks show, store and draw.

Names: L MoE layers, E experts. Loads are integers; imbalance is max / mean load.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from parallel.engine_metrics import EngineMetrics


@dataclass(frozen=True)
class RunInfo:
    """What is fixed for the whole run.

    Attributes:
        steps: optimizer steps of the whole run; start_step is where this process began (> 0 after a resume).
        moe_layers: block index of each row of a load matrix.
        derived: labelled lines for the start banner (parameters, FLOPs per token, memory, device and why, ...).
        config: the resolved config as plain values.
    """

    name: str
    run_dir: Path
    steps: int
    start_step: int
    world_size: int
    tokens_per_step: int
    num_experts: int
    moe_layers: tuple[int, ...]
    derived: Mapping[str, str]
    config: Mapping[str, object]


@dataclass(frozen=True)
class LogRecord:
    """Averages over the steps since the last record; one row ``{"kind": "train", ...}`` of metrics.jsonl.

    Attributes:
        step: number of finished optimizer steps.
        loss: next-token cross-entropy in nats per token (without auxiliary losses), global mean.
        aux: unweighted auxiliary losses by name, mean over layers.
        gate: gate metrics by name, mean over layers.
        grad_norm: global norm before clipping, last step.
        imbalance: max / mean expert load, mean over layers; load_LE its counts over the interval.
        dead_expert_fraction: experts with no token in the interval, as a share.
        dropped_fraction: pairs that capacity dropped, as a share.
        memory_gib: peak of this rank: device memory on CUDA, resident set on CPU.
        phase_s: seconds per step by phase (data, forward, backward, reduce, optimizer, log, checkpoint, ...).
        engine: what spreading experts over ranks levelled, moved and cost; None in mode local. After a resume it begins
            at the step that was resumed from, as all times do.
    """

    step: int
    loss: float
    aux: Mapping[str, float]
    gate: Mapping[str, float]
    lr: float
    grad_norm: float
    tokens_per_s: float
    tokens_seen: int
    elapsed_s: float
    eta_s: float
    imbalance: float
    dead_expert_fraction: float
    dropped_fraction: float
    memory_gib: float
    load_LE: list[list[int]]
    phase_s: Mapping[str, float]
    engine: EngineMetrics | None = None


@dataclass(frozen=True)
class EvalRecord:
    """One evaluation; one row ``{"kind": "eval", ...}`` of metrics.jsonl.

    Attributes:
        loss: nats per token; bits_per_byte the same per byte of text, comparable across tokenizers.
        final: True for the evaluation that ends the run.
        surrogate: see :class:`launch.evaluate.EvalResult`; empty for a gate that generates text itself.
    """

    step: int
    loss: float
    bits_per_byte: float
    tokens: int
    text_bytes: int
    elapsed_s: float
    load_LE: list[list[int]]
    final: bool
    surrogate: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class SampleRecord:
    """A piece of text that the model wrote; one row ``{"kind": "sample", ...}`` of metrics.jsonl."""

    step: int
    prompt: str
    text: str
