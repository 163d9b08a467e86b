"""RUN/loads.trace: how many rows each rank had for each expert, every step; ``parallel.load_trace`` reads it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from launch.callbacks.base import Callback
from launch.config import TrainConfig
from launch.records import RunInfo
from parallel.load_trace import TraceHeader, TraceWriter


class LoadTraceWriter(Callback):
    """Records are numbered as steps are in metrics.jsonl: 1 is the first. A resumed run continues the file.

    Args:
        path: the trace.
        config: of the run; says what the counts are of.
    """

    def __init__(self, path: Path, config: TrainConfig) -> None:
        self._path, self._config = path, config
        self._trace: TraceWriter | None = None

    def on_start(self, info: RunInfo) -> None:
        """Open the trace, less what will be trained again.

        Raises:
            TraceError: there is one of another number of ranks or another model; it has to be moved away first.
        """
        model, gate = self._config.model, self._config.gate
        header = TraceHeader(
            num_layers=len(info.moe_layers),
            world_size=info.world_size,
            num_experts=info.num_experts,
            experts_per_token=max(1, round(gate.experts_per_token(info.num_experts))),
            width=model.dim,
            expert_hidden=model.moe.hidden_dim,
        )
        self._trace = TraceWriter(self._path, header, next_step=info.start_step + 1)

    def on_loads(self, step: int, count_LWE: NDArray[np.int64]) -> None:
        if self._trace is not None:
            self._trace.append(step, count_LWE)

    def on_end(self) -> None:
        if self._trace is not None:
            self._trace.close()
            self._trace = None
