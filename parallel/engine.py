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
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from moe.errors import ConfigError
from moe.experts import Experts
from moe.layer import MoELayer
from parallel.chrome_trace import StepRecorder, TraceEvent
from parallel.collectives import Communicator
from parallel.config import ParallelConfig
from parallel.copy_policy import CopyPolicy
from parallel.engine_metrics import EngineMeter
from parallel.exchange import LinkModel, Schedule, choose_pieces, choose_schedule, gather_schedule
from parallel.layer_copies import LayerCopies
from parallel.link_profile import MESSAGE_NS, UNLIMITED, measure_link
from parallel.migration import move_experts
from parallel.placement import Ints, Placement, even_owners
from parallel.row_split import RowSplit, split_by_quota, split_rows
from parallel.schedule import OverlapSchedule
from parallel.sharded_experts import ShardedExperts
from parallel.sharder import moves
from parallel.token_dispatch import RowExchange, TokenDispatcher
from parallel.topology import Topology


class ExpertEngine:
    """Owns the experts of a model's MoE layers and everything that moves because of them.

    Args:
        model: its MoE layers get sharded experts and a distributed dispatcher, in place. Weights may be on the meta
            device; owned experts are then allocated on ``topology.device`` and still have to be filled.
        compute_dtype: dtype of activations, in which copies travel; None: the parameters'.
        state: of a run that goes on, from :meth:`state`; owners and measured times are taken over if as many ranks do.

    Attributes:
        meter: counts what happens in training steps.
        planned: P' of each layer for the step, decided in :meth:`begin_step`; may be replaced until the first forward.

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
        state: Mapping[str, Any] | None = None,
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
        shape = (len(named), self.num_experts)
        same_ranks = state is not None and state["world_size"] == world
        self.owner_LE = even_owners(*shape, world)
        if state is not None and same_ranks:
            self.owner_LE = np.array(state["owner_LE"])
        self._slots_W = np.bincount(self.owner_LE.flatten(), minlength=world)
        self._steps = 0
        self.comm = Communicator(topology)
        self.exchange = RowExchange(topology)
        self.policy = CopyPolicy(config, topology, self.node_W, shape)
        if state is not None:
            self._steps = int(state["steps"])
            self.policy.load_state(state["policy"], same_ranks=same_ranks)
        if self.policy.link is None:
            self.policy.link = self._link()
        self.experts: list[ShardedExperts] = []
        self.layers: list[LayerCopies] = []
        self._quota_L: list[Ints | None] = [None] * len(named)
        self._inference = False
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
            self._connect(index, layer, sharded, copies)
        keep = config.mode in ("ep", "fssdp-keep")
        self.schedule = OverlapSchedule(self.layers, keep=keep, hold=keep and not self.policy.decides_after_gate)
        if not self.schedule.hold:  # no sums over micro-batches
            for sharded in self.experts:
                sharded.copy_grad_dtype = compute_dtype or sharded.chunks_eX.dtype
        self.planned = [copies.sharding for copies in self.layers]
        self.meter = EngineMeter(topology, self.num_experts, self.comm, self.exchange, self.schedule)
        self._recorder: StepRecorder | None = None

    def _connect(self, index: int, layer: MoELayer, sharded: ShardedExperts, copies: LayerCopies) -> None:
        """Tell the schedule of everything that happens in this layer."""
        sharded.on_needed = lambda: self.schedule.weights_needed(index)
        sharded.on_gradients = lambda: self.schedule.weights_used(index)
        layer.dispatcher = TokenDispatcher(
            self.exchange,
            place=lambda count_WE: self._place(index, count_WE),
            label=f"layer {index}",
            on_routed=lambda: self.schedule.tokens_routed(index),
            on_combined=lambda: self.schedule.outputs_home(index),
            on_arrived=lambda: self.schedule.weights_needed(index),
            on_returned=lambda: self.schedule.gradients_home(index),
        )

    def _link(self) -> LinkModel:
        """What the options say of the links, or a measurement; nothing where no copy travels."""
        config = self.config
        if config.mode == "ep":
            return UNLIMITED
        if config.link_mbit is None:
            return measure_link(self.comm, self.topology, self.node_W)
        node_rate = None if config.node_link_mbit is None else max(1, round(config.node_link_mbit * 125_000))
        return LinkModel(MESSAGE_NS, max(1, round(config.link_mbit * 125_000)), node_rate)

    def _schedule(self, source: Placement, target: Placement, chunk_bytes: int) -> Schedule:
        """How copies travel from ``source`` to ``target``."""
        assert self.policy.link is not None
        if self.config.algorithm == "auto" or source == target:
            return choose_schedule(source, target, chunk_bytes, self.policy.link, self.node_W)
        depth = gather_schedule(source, target, self.config.algorithm, 1, self.node_W).num_rounds
        pieces = choose_pieces(chunk_bytes, self.policy.link, depth)
        return gather_schedule(source, target, self.config.algorithm, pieces, self.node_W)

    def _place(self, index: int, count_WE: Ints) -> tuple[RowSplit, list[int]]:
        """Where the rows of a layer go, and which experts compute here; may still add copies."""
        copies, rank = self.layers[index], self.topology.rank
        if self.policy.decides_after_gate and not self._inference and not self.schedule.in_backward:
            placement, self._quota_L[index] = self.policy.after_gate(index, copies.placement, count_WE)
            copies.extend(placement)
        quota_EW = None if self._inference else self._quota_L[index]
        if quota_EW is None:
            split = split_rows(count_WE, copies.placement, rank, self.node_W, self.config.split)
        else:
            split = split_by_quota(count_WE, quota_EW, rank, self.node_W)
        if not self._inference and not self.schedule.in_backward:
            self.meter.placed(index, count_WE, copies.placement, split.received_WE)
        return split, copies.placement.held_by(rank)

    # --- a step ---------------------------------------------------------------------------------------------------

    def begin_step(self) -> None:
        """Gradients of owned experts are zero; placements are decided, as far as they do not wait for the gate."""
        self.meter.step_begins()
        for experts in self.experts:
            experts.zero_grad_chunks()
            experts.compute_ns = experts.computed_rows = 0
        self.planned = self.policy.before_step([copies.sharding for copies in self.layers])

    def forward_begins(self, last_micro_batch: bool = True) -> None:
        """Announce a forward pass with gradients; ``last_micro_batch`` of this step or not."""
        for copies, placement in zip(self.layers, self.planned, strict=True):
            copies.plan(placement)
        self.schedule.forward_begins(last_micro_batch)

    def backward(self, loss: Tensor) -> None:
        """``loss.backward()`` with the events that belong to it."""
        self.schedule.backward_begins()
        loss.backward()
        self.schedule.backward_ends()

    def finish(self) -> None:
        """Wait until the gradients of owned experts are complete."""
        self.schedule.step_ends()
        self.meter.gradients_complete()

    def end_step(self, load_LE: Ints, optimizer: torch.optim.Optimizer) -> None:
        """The optimizer has stepped: take notice of the global loads and move experts to new owners if that is due.

        Args:
            load_LE: (L, E) rows of each expert over all ranks.
        """
        rows = sum(experts.computed_rows for experts in self.experts)
        ns_per_row = sum(experts.compute_ns for experts in self.experts) // max(1, rows)
        self.policy.after_step(
            load_LE,
            chunk_bytes=self.layers[0].chunk_bytes,
            row_bytes=self.layers[0].row_bytes,
            free_ns_L=list(self.schedule.free_ns_L),
            ns_per_row=ns_per_row,
        )
        self._steps += 1
        interval = self.config.reshard_interval
        if interval and self._steps % interval == 0:
            chunks_eX = self.experts[0].chunks_eX
            expert_bytes = 3 * self.experts[0].chunk_numel * chunks_eX.element_size()  # AdamW keeps two moments
            self.reshard(self.policy.owners(self.owner_LE, self._slots_W, expert_bytes), optimizer)
        collectives = self.meter.step_ends()
        if self._recorder:
            self._recorder.reached("optimizer")
            self._recorder.collectives(collectives)

    def reshard(self, owner_LE: Ints, optimizer: torch.optim.Optimizer) -> int:
        """Give experts to new owners, with their optimizer state; between two steps.

        Args:
            owner_LE: (L, E) the same on every rank.

        Returns:
            How many experts moved.
        """
        moved = moves(self.owner_LE, owner_LE)
        for index, (experts, copies) in enumerate(zip(self.experts, self.layers, strict=True)):
            sharding = Placement(owner_LE[index], world_size=self.topology.world_size)
            of_layer = [move for move in moved if move.layer == index]
            if of_layer:
                owned = sharding.owned_by(self.topology.rank)
                move_experts(experts, owned, of_layer, optimizer, self.exchange, copies.label)
                copies.reshard(sharding)
        self.owner_LE = owner_LE
        return len(moved)

    @contextmanager
    def inference(self) -> Iterator[None]:
        """Forward passes without gradients: experts compute on their owners."""
        for copies in self.layers:
            copies.plan(copies.sharding)
        self._inference = True
        try:
            yield
        finally:
            self._inference = False

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

    def begin_trace(self) -> None:
        """Note the events of the step that is about to begin."""
        self._recorder = self.schedule.recorder = self.exchange.recorder = StepRecorder()

    def take_trace(self) -> list[TraceEvent]:
        """This rank's events since :meth:`begin_trace`; no more are noted."""
        assert self._recorder is not None, "begin_trace was not called"
        events = self._recorder.events
        self._recorder = self.schedule.recorder = self.exchange.recorder = None
        return events

    def state(self) -> dict[str, Any]:
        """What a checkpoint must keep so that a resumed run places experts as the uninterrupted one; JSON-able."""
        return {
            "world_size": self.topology.world_size,
            "owner_LE": self.owner_LE.tolist(),
            "steps": self._steps,
            "policy": self.policy.state(),
        }

    def close(self) -> None:
        """End the communicator's thread."""
        self.comm.close()
