"""A model whose training is spread over ranks: dense parameters replicated or in slices, experts where the mode says.

What the training loop sees of ``parallel``: the events of a step, the one gradient norm, and forward passes in which
all ranks must take part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from parallel.chrome_trace import TraceEvent
from parallel.config import ParallelConfig
from parallel.dense import GradientReducer
from parallel.dense_fsdp import ShardedDense
from parallel.engine import ExpertEngine
from parallel.engine_metrics import EngineMetrics
from parallel.placement import Ints
from parallel.topology import Topology


class ParallelModel:
    """Per step: :meth:`begin_step`; per micro-batch :meth:`forward_begins` and :meth:`backward`; then :meth:`finish`,
    :meth:`grad_norm`, :meth:`clip_`, the optimizer, and :meth:`end_step`.

    Args:
        model: on this rank's device, weights in place; ``config.dense`` may slice its parameters, so an optimizer must
            be built afterwards.
        experts: the engine that its MoE layers were given to; None when every rank computes all experts itself.
    """

    def __init__(
        self, model: nn.Module, topology: Topology, config: ParallelConfig, experts: ExpertEngine | None = None
    ) -> None:
        self.model, self.topology, self.experts = model, topology, experts
        sharded = set(experts.parameters()) if experts else set()
        self.dense: GradientReducer | ShardedDense
        if config.dense == "fsdp":
            self.dense = ShardedDense(model, topology, sharded)
        else:
            dense = [param for param in model.parameters() if param not in sharded]
            self.dense = GradientReducer(dense, topology, int(config.bucket_mib * 2**20))

    @property
    def in_lockstep(self) -> bool:
        """Must all ranks run the same number of forward passes, because none has the whole model?"""
        return self.experts is not None or isinstance(self.dense, ShardedDense)

    # --- a step ---------------------------------------------------------------------------------------------------

    def begin_step(self) -> None:
        """Forget all gradients and decide where experts are copied to."""
        self.dense.zero()
        if self.experts:
            self.experts.begin_step()

    def forward_begins(self, last: bool) -> None:
        """Announce a forward pass with gradients; ``last`` micro-batch of the step or not."""
        if self.experts:
            self.experts.forward_begins(last)

    def backward(self, loss: Tensor, last: bool) -> None:
        """``loss.backward()``; in the ``last`` one of the step, gradients are summed over ranks while it runs."""
        self.dense.expect(last)
        if self.experts:
            self.experts.backward(loss)
        else:
            loss.backward()

    def finish(self) -> None:
        """Wait until all gradients are sums over all ranks. Must be called on every rank, every step."""
        self.dense.finish()
        if self.experts:
            self.experts.finish()

    def grad_norm(self) -> Tensor:
        """0-d fp64 L2 norm over dense parameters and experts, each counted once; the same on every rank."""
        norm = self.dense.grad_norm()
        if self.experts is None:
            return norm
        return (norm.cpu() ** 2 + self.experts.grad_square_sum()).sqrt()

    def clip_(self, norm: Tensor, max_norm: float) -> None:
        """Scale all gradients so that their norm, given as ``norm``, is at most ``max_norm``; 0 means no limit."""
        self.dense.clip_(norm, max_norm)
        if self.experts and max_norm > 0 and float(norm) > max_norm:
            self.experts.scale_grads_(max_norm / float(norm))

    def end_step(self, load_LE: Tensor, optimizer: torch.optim.Optimizer) -> None:
        """The optimizer has stepped; ``load_LE`` are the step's global loads. Owners of experts may change."""
        if self.experts:
            loads: Ints = load_LE.cpu().numpy()
            self.experts.end_step(loads, optimizer)

    def state(self) -> dict[str, Any] | None:
        """What a checkpoint must keep besides tensors; None where that is nothing."""
        return self.experts.state() if self.experts else None

    # --- what can be seen of it -----------------------------------------------------------------------------------

    def take_metrics(self) -> EngineMetrics | None:
        """What the experts' engine did since the last call; None without one. Collective."""
        return self.experts.meter.take() if self.experts else None

    def loads_by_rank(self, load_LE: Tensor) -> Ints:
        """(L, W, E) rows that each rank had for each expert in the step. Collective.

        Args:
            load_LE: (L, E) those of this rank.
        """
        if self.experts:
            return self.experts.meter.count_LWE
        count_LWE = torch.zeros(load_LE.shape[0], self.topology.world_size, load_LE.shape[1], dtype=torch.int64)
        count_LWE[:, self.topology.rank] = load_LE.cpu()
        counts: Ints = np.asarray(self.topology.sum_(count_LWE))
        return counts

    def begin_trace(self) -> None:
        """Note when what happens in the step that is about to begin."""
        if self.experts:
            self.experts.begin_trace()

    def take_trace(self) -> list[list[TraceEvent]]:
        """Events since :meth:`begin_trace` by rank, on every rank. Collective."""
        return self.topology.gather_objects(self.experts.take_trace() if self.experts else [])

    def close(self) -> None:
        """End background threads."""
        if self.experts:
            self.experts.close()

    # --- forward passes without gradients -------------------------------------------------------------------------

    @contextmanager
    def inference(self) -> Iterator[None]:
        """Forward passes without gradients; all ranks must run equally many if :attr:`in_lockstep`."""
        with self.experts.inference() if self.experts else nullcontext():
            yield
        if isinstance(self.dense, ShardedDense):
            self.dense.reshard()

    @contextmanager
    def first_rank_computes(self, forward_nothing: Callable[[], object]) -> Iterator[bool]:
        """The first rank runs the block, with forward passes as many as it likes; yields whether this is the one.

        Args:
            forward_nothing: a forward pass without tokens; the other ranks run one for each of the first rank's,
                because they are asked for experts or slices of parameters.
        """
        if not self.in_lockstep or self.topology.world_size == 1:
            yield self.topology.is_first
            return
        with self.inference():
            if not self.topology.is_first:
                with torch.no_grad():
                    while self.topology.broadcast_object(None):
                        forward_nothing()
                yield False
                return

            def announce(_module: nn.Module, _args: object) -> None:
                self.topology.broadcast_object(True)

            # Before all other hooks: those of sharded parameters already wait for the other ranks.
            hook = self.model.register_forward_pre_hook(announce, prepend=True)
            try:
                yield True
            finally:
                hook.remove()
            # Not after an error: the others may be inside a forward pass, and learn of it by this rank's end.
            self.topology.broadcast_object(False)
