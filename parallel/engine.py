"""Fully sharded sparse data parallelism for any model with MoE layers (Hecate, arXiv:2502.02581).

    engine = ExpertEngine(model, topology, config)     # every rank keeps only the experts that it owns
    for each step:
        engine.begin_step()                            # which experts to copy where, from the loads so far
        for each micro-batch:
            engine.forward_begins(last)
            loss = ...model(...)                       # copies, tokens and outputs travel by themselves
            engine.backward(loss)
        engine.finish()                                # gradients of owned experts are complete
        optimizer.step()                               # on owned experts and the dense rest
        engine.end_step(load_LE)

One code path for all modes: with placement P (who owns) and P' (who holds while a layer runs), expert parallelism is
P' = P, FSDP over experts is P' = everything, and FSSDP anything between. It changes where experts are computed, never
what is computed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

import torch
from torch import Tensor, nn

from moe.errors import ConfigError
from moe.experts import Experts
from moe.layer import MoELayer
from parallel.collectives import Communicator
from parallel.config import ParallelConfig
from parallel.exchange import LinkModel, Schedule, choose_pieces, choose_schedule, gather_schedule
from parallel.layer_copies import LayerCopies
from parallel.placement import Ints, Placement, even_owners
from parallel.row_split import RowSplit, split_rows
from parallel.schedule import OverlapSchedule
from parallel.sharded_experts import ShardedExperts
from parallel.token_dispatch import RowExchange, TokenDispatcher
from parallel.topology import Topology


class ExpertEngine:
    """Owns the experts of a model's MoE layers and everything that moves because of them.

    Args:
        model: its MoE layers get sharded experts and a distributed dispatcher, in place. Weights may be on the meta
            device; owned experts are then allocated on ``topology.device`` and still have to be filled.
        compute_dtype: dtype of activations, in which copies travel; None: the parameters'.
        owner_LE: (L, E) owners; None: an even sharding.

    Raises:
        ConfigError: the model has no MoE layer, or they have different numbers of experts.
    """

    def __init__(
        self,
        model: nn.Module,
        topology: Topology,
        config: ParallelConfig,
        *,
        compute_dtype: torch.dtype | None = None,
        owner_LE: Ints | None = None,
    ) -> None:
        self.topology, self.config = topology, config
        named = [(name, module) for name, module in model.named_modules() if isinstance(module, MoELayer)]
        counts = {module.num_experts for _, module in named}
        if len(counts) != 1:
            found = "no MoE layer" if not named else f"layers of {sorted(counts)} experts"
            raise ConfigError(
                [f"parallel.mode: {config.mode} needs MoE layers with one number of experts, found {found}"]
            )
        self.num_experts = counts.pop()
        world = topology.world_size
        self.node_W = [rank // topology.local_world_size for rank in range(world)]
        self.owner_LE = even_owners(len(named), self.num_experts, world) if owner_LE is None else owner_LE
        self.comm = Communicator(topology)
        self.exchange = RowExchange(topology)
        self.link = LinkModel(latency_ns=200_000, bytes_per_s=10**9)
        self.experts: list[ShardedExperts] = []
        self.layers: list[LayerCopies] = []
        self._rows_L = [0] * len(named)
        self._peak_copy_bytes = 0
        scheduler = lru_cache(maxsize=8 * len(named))(self._schedule)
        for index, (name, layer) in enumerate(named):
            sharding = Placement(self.owner_LE[index], world_size=world)
            assert isinstance(layer.experts, Experts), f"{name} is sharded already"
            sharded = ShardedExperts(layer.experts, sharding.owned_by(topology.rank), topology.device)
            layer.experts = sharded
            dtype = compute_dtype or sharded.chunks_eX.dtype
            copies = LayerCopies(f"layer {index}", sharded, sharding, self.comm, scheduler, dtype)
            self.experts.append(sharded)
            self.layers.append(copies)
            self._connect(index, layer, sharded)
        self.schedule = OverlapSchedule(self.layers, keep=config.mode in ("ep", "fssdp-keep"))

    def _connect(self, index: int, layer: MoELayer, sharded: ShardedExperts) -> None:
        """Tell the schedule of everything that happens in this layer."""
        sharded.on_needed = lambda: self.schedule.weights_needed(index)
        layer.dispatcher = TokenDispatcher(
            self.exchange,
            place=lambda count_WE: self._place(index, count_WE),
            label=f"layer {index}",
            on_combined=lambda: self.schedule.outputs_home(index),
            on_arrived=lambda: self.schedule.weights_needed(index),
            on_returned=lambda: self.schedule.gradients_home(index),
        )

    def _schedule(self, sharding: Placement, placement: Placement, chunk_bytes: int) -> Schedule:
        if placement == sharding:
            return Schedule(False, "flat", 1, {})
        if self.config.algorithm == "auto":
            return choose_schedule(sharding, placement, chunk_bytes, self.link, self.node_W)
        pieces = choose_pieces(chunk_bytes, self.link, self.topology.world_size - 1)
        return gather_schedule(sharding, placement, self.config.algorithm, pieces, self.node_W)

    def _place(self, index: int, count_WE: Ints) -> tuple[RowSplit, list[int]]:
        copies = self.layers[index]
        split = split_rows(count_WE, copies.placement, self.topology.rank, self.node_W, self.config.split)
        self._rows_L[index] += int(split.received_WE.sum())
        return split, copies.placement.held_by(self.topology.rank)

    # --- a step ---------------------------------------------------------------------------------------------------

    def begin_step(self) -> None:
        """Gradients of owned experts are zero; the step's placements are decided."""
        for copies in self.layers:
            copies.experts.zero_grad_chunks()
            if self.config.mode == "fsdp":
                copies.plan(copies.sharding.everywhere())

    def forward_begins(self, last_micro_batch: bool = True) -> None:
        """Announce a forward pass with gradients; ``last_micro_batch`` of this step or not."""
        self.schedule.forward_begins(last_micro_batch)

    def backward(self, loss: Tensor) -> None:
        """``loss.backward()`` with the events that belong to it."""
        self.schedule.backward_begins()
        loss.backward()
        self.schedule.backward_ends()

    def finish(self) -> None:
        """Wait until the gradients of owned experts are complete."""
        self.schedule.step_ends()

    def end_step(self, load_LE: Ints) -> None:
        """Take notice of the step's global loads."""

    @contextmanager
    def inference(self) -> Iterator[None]:
        """Forward passes without gradients: experts compute on their owners."""
        before = [copies.placement for copies in self.layers]
        for copies in self.layers:
            copies.plan(copies.sharding)
        try:
            yield
        finally:
            for copies, placement in zip(self.layers, before, strict=True):
                copies.plan(placement)

    # --- gradients ------------------------------------------------------------------------------------------------

    def parameters(self) -> list[nn.Parameter]:
        """Owned experts: what this rank's optimizer updates besides the dense parameters."""
        return [experts.chunks_eX for experts in self.experts]

    def grad_square_sum(self) -> Tensor:
        """0-d fp64 sum of the squares of all experts' gradients, each counted once; the same on every rank."""
        total = torch.zeros((), dtype=torch.float64)
        for param in self.parameters():
            assert param.grad is not None
            total += torch.linalg.vector_norm(param.grad, dtype=torch.float64).cpu() ** 2
        return self.topology.sum_(total)

    def scale_grads_(self, factor: float) -> None:
        """Multiply the gradients of owned experts."""
        for param in self.parameters():
            assert param.grad is not None
            param.grad.mul_(factor)

    # --- what is counted ------------------------------------------------------------------------------------------

    def sent_bytes(self) -> Counter[str]:
        """Payload bytes that this rank has sent so far, by kind: spAG, spRS, tokens, counts."""
        return self.comm.sent_bytes + self.exchange.sent_bytes

    def close(self) -> None:
        """End the communicator's thread."""
        self.comm.close()
