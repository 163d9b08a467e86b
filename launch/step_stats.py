"""What one optimizer step counted, summed over ranks in one small collective; and its sums over a log interval.

The same reduced loads feed the gates' end_step, the log lines and the heatmaps, so they cannot disagree.
Names: L MoE layers, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moe import ModelOutput
from parallel.topology import Topology


class StepStats:
    """Counts of one optimizer step: per micro-batch with :meth:`add`, then over all ranks with :meth:`reduce`.

    After :meth:`reduce`: ``loss`` is nats per token over the global batch; ``load_LE`` and ``offered_LE`` are global
    integer loads; ``stop`` and ``bad`` are true when any rank said so; ``scalars_L`` holds per layer the aux losses
    ("aux/<name>") and gate metrics ("gate/<name>"), means over the step; ``signals_L`` what gates want added up for
    :meth:`gates.Gate.end_step`. ``load_LWE`` holds loads by rank (W) where the trainer records them.
    """

    def __init__(self, num_moe_layers: int, num_experts: int) -> None:
        self.nats = 0.0
        self.tokens = 0
        self.stop = False
        self.bad = False
        self.load_LE = torch.zeros(num_moe_layers, num_experts, dtype=torch.int64)
        self.offered_LE = torch.zeros_like(self.load_LE)
        self.scalars_L: list[dict[str, float]] = [{} for _ in range(num_moe_layers)]
        self.load_LWE: NDArray[np.int64] | None = None
        self.signals_L: list[dict[str, Tensor]] = [{} for _ in range(num_moe_layers)]
        self._micro_batches = 0

    @property
    def loss(self) -> float:
        return self.nats / self.tokens if self.tokens else float("nan")

    def add(self, output: ModelOutput, nats: Tensor, tokens: int) -> None:
        """Count one micro-batch of this rank."""
        self.nats += float(nats.detach())
        self.tokens += tokens
        self._micro_batches += 1
        for row, layer in enumerate(output.routing):
            plan = layer.output.plan
            self.load_LE[row] += plan.load_E.cpu()
            self.offered_LE[row] += plan.offered_E.cpu()
            scalars = self.scalars_L[row]
            for kind, values in (("aux", layer.output.aux), ("gate", layer.output.metrics)):
                for name, value in values.items():
                    key = f"{kind}/{name}"
                    scalars[key] = scalars.get(key, 0.0) + float(value.detach())
            signals = self.signals_L[row]
            for name, sums in layer.output.signals.items():
                signals[name] = signals.get(name, 0.0) + sums.detach().double().cpu()

    def reduce(self, topology: Topology) -> None:
        """Sum over ranks. Loads travel as float64, which is exact below 2**53."""
        head = torch.tensor([self.nats, self.tokens, self.stop, self.bad, self._micro_batches], dtype=torch.float64)
        loads = torch.cat([self.load_LE.flatten(), self.offered_LE.flatten()]).double()
        vector = topology.sum_(torch.cat([head, loads]))
        self.nats, self.tokens = float(vector[0]), int(vector[1])
        self.stop, self.bad = bool(vector[2] > 0), bool(vector[3] > 0)
        flat_load, flat_offered = vector[5:].long().chunk(2)
        self.load_LE = flat_load.view_as(self.load_LE)
        self.offered_LE = flat_offered.view_as(self.offered_LE)
        if self.bad:
            return  # a rank that failed in forward has no scalars to add
        scalars = [(row, key) for row, scalars in enumerate(self.scalars_L) for key in sorted(scalars)]
        signals = [(row, name) for row, signals in enumerate(self.signals_L) for name in sorted(signals)]
        values = torch.tensor([self.scalars_L[row][key] for row, key in scalars], dtype=torch.float64)
        sums = topology.sum_(torch.cat([values, *(self.signals_L[row][name].flatten() for row, name in signals)]))
        for (row, key), mean in zip(scalars, (sums[: len(scalars)] / float(vector[4])).tolist(), strict=True):
            self.scalars_L[row][key] = mean
        parts = sums[len(scalars) :].split([self.signals_L[row][name].numel() for row, name in signals])
        for (row, name), part in zip(signals, parts, strict=True):
            self.signals_L[row][name] = part.view_as(self.signals_L[row][name])


@dataclass
class Interval:
    """Sums over the steps since the last log record; part of a checkpoint, so that a resumed record is the same."""

    steps: int = 0
    loss_sum: float = 0.0
    scalar_sums: dict[str, float] = field(default_factory=dict)
    load_LE: list[list[int]] = field(default_factory=list)
    offered_LE: list[list[int]] = field(default_factory=list)

    def add(self, stats: StepStats) -> None:
        """Count one reduced step."""
        self.steps += 1
        self.loss_sum += stats.loss
        layers = max(1, len(stats.scalars_L))
        for scalars in stats.scalars_L:
            for key, value in scalars.items():
                self.scalar_sums[key] = self.scalar_sums.get(key, 0.0) + value / layers
        self.load_LE = _added(self.load_LE, stats.load_LE)
        self.offered_LE = _added(self.offered_LE, stats.offered_LE)

    @property
    def loss(self) -> float:
        return self.loss_sum / self.steps

    def means(self, kind: str) -> dict[str, float]:
        """Mean over steps and layers of the scalars of ``kind`` ("aux" or "gate"), by name."""
        prefix = kind + "/"
        return {
            key.removeprefix(prefix): value / self.steps
            for key, value in sorted(self.scalar_sums.items())
            if key.startswith(prefix)
        }

    def imbalance(self) -> float:
        """Mean over layers of max / mean load; 1 is perfect, E is one expert taking all."""
        rows = [row for row in self.load_LE if sum(row)]
        return sum(max(row) * len(row) / sum(row) for row in rows) / len(rows) if rows else 1.0

    def dead_expert_fraction(self) -> float:
        """Share of experts that no token was offered to."""
        experts = [count for row in self.offered_LE for count in row]
        return sum(count == 0 for count in experts) / len(experts) if experts else 0.0

    def dropped_fraction(self) -> float:
        """Share of offered pairs that were not kept."""
        offered = sum(map(sum, self.offered_LE))
        return 1 - sum(map(sum, self.load_LE)) / offered if offered else 0.0

    def to_values(self) -> dict[str, Any]:
        """JSON-able form for a checkpoint; floats survive JSON exactly."""
        return asdict(self)

    @staticmethod
    def from_values(values: Mapping[str, Any]) -> Interval:
        return Interval(**values)


def _added(sums_LE: list[list[int]], load_LE: Tensor) -> list[list[int]]:
    loads: list[list[int]] = load_LE.tolist()
    if not sums_LE:
        return loads
    return [[a + b for a, b in zip(x, y, strict=True)] for x, y in zip(sums_LE, loads, strict=True)]
