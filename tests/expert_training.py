"""A small MoE model trained for a few steps under an expert engine, or without one as the plain reference."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gates import Mode, parse_gate_config
from launch.config import OptimConfig
from launch.optim import build_optimizer
from moe import Transformer
from moe.config import ModelConfig, MoEConfig
from moe.transformer import ForwardContext, next_token_loss
from parallel.checkpoint import training_tensors
from parallel.config import ParallelConfig
from parallel.dense import GradientReducer
from parallel.engine import ExpertEngine
from parallel.placement import Placement
from parallel.topology import Topology

ROWS, LENGTH, VOCAB = 12, 16, 31


@dataclass(frozen=True)
class Case:
    """What is trained and how; ``mode`` None is a single process without anything distributed."""

    mode: str | None
    micro: int = ROWS
    steps: int = 3
    num_experts: int = 5
    dtype: torch.dtype = torch.float64
    compute_dtype: torch.dtype | None = None
    recompute: str = "none"
    clip_norm: float = 0.3
    options: dict[str, Any] = field(default_factory=dict)
    copies_seed: int | None = 0  # random placements from this seed; None: those of the engine's own planner
    skew: float = 1.0
    rotate_owners: bool = False  # after each step every expert goes to its neighbour's owner


@dataclass
class Trained:
    """Losses and gradient norms of each step, every tensor of the training state that this rank has, bytes sent."""

    curve: list[tuple[float, float]]
    tensors: dict[str, Tensor]
    bytes: Counter[str]
    loads: list[list[list[int]]]


def build(case: Case) -> Transformer:
    moe = MoEConfig(num_experts=case.num_experts, hidden_dim=8, expert_op="auto")
    config = ModelConfig(
        vocab_size=VOCAB, dim=16, num_layers=3, num_heads=2, max_seq_len=32, moe=moe, recompute=case.recompute
    )
    model = Transformer(config, parse_gate_config({"name": "topk", "k": 2})).to(case.dtype)
    model.init_weights(0)
    with torch.no_grad():
        # All tokens have a direction in common, which the first experts like and the last one does not.
        model.embed.weight.add_(0.05)
        for _, gate in model.gates():
            gate.weight.mul_(10)
            gate.weight[0] += 0.02 * case.skew
            gate.weight[1] += 0.01 * case.skew
            gate.weight[-1] -= 0.02 * case.skew
    return model


def batch(step: int) -> Tensor:
    return torch.randint(VOCAB, (ROWS, LENGTH + 1), generator=torch.Generator().manual_seed(step))


def train(topology: Topology, case: Case) -> Trained:
    """``case.steps`` optimizer steps on this rank's share of the rows."""
    model, world = build(case), topology.world_size
    engine = None
    if case.mode is not None:
        config = ParallelConfig(mode=case.mode, **{"link_mbit": 1000, **case.options})
        engine = ExpertEngine(model, topology, config, compute_dtype=case.compute_dtype)
    optimizer = build_optimizer(model, OptimConfig(lr=1e-2))
    sharded = set(engine.parameters()) if engine else set()
    reducer = GradientReducer([p for p in model.parameters() if p not in sharded], topology, 1 << 20)
    rng = np.random.default_rng(case.copies_seed)
    rows = ROWS // world
    result = Trained([], {}, Counter(), [])
    for step in range(case.steps):
        reducer.zero()
        if engine:
            engine.begin_step()
            if case.copies_seed is not None and case.mode in ("fssdp-keep", "fssdp-rm"):
                for index, copies in enumerate(engine.layers):
                    more = rng.random((case.num_experts, world)) < 0.5
                    engine.planned[index] = Placement(copies.sharding.owner_E, copies.sharding.holders_EW | more)
        ids = batch(step)[topology.rank * rows : (topology.rank + 1) * rows]
        nats_sum = torch.zeros((), dtype=torch.float64)
        load_LE = torch.zeros(3, case.num_experts, dtype=torch.int64)
        for first in range(0, rows, min(rows, case.micro)):
            last = first + case.micro >= rows
            part = ids[first : first + case.micro]
            if engine:
                engine.forward_begins(last)
            context = ForwardContext(step=step, mode=Mode.TRAIN, compute_dtype=case.compute_dtype)
            output = model(part[:, :-1], context=context)
            nats, tokens = next_token_loss(output.logits_BTV, part[:, 1:])
            loss = nats / (ROWS * LENGTH) + output.aux_loss() * (int(tokens) / (ROWS * LENGTH))
            nats_sum += nats.detach()
            load_LE += torch.stack([layer.output.plan.load_E for layer in output.routing])
            reducer.expect(last)
            if engine:
                engine.backward(loss)
            else:
                loss.backward()
        reducer.finish()
        square = reducer.grad_norm() ** 2
        if engine:
            engine.finish()
            square = square + engine.grad_square_sum()
        norm = square.sqrt()
        reducer.clip_(norm, case.clip_norm)
        if engine and float(norm) > case.clip_norm:
            engine.scale_grads_(case.clip_norm / float(norm))
        optimizer.step()
        load_LE = topology.sum_(load_LE)
        if engine:
            engine.end_step(load_LE.numpy(), optimizer)
            if case.rotate_owners:
                engine.reshard(np.roll(engine.owner_LE, 1, axis=1), optimizer)
        result.curve.append((float(topology.sum_(nats_sum)), float(norm)))
        result.loads.append(load_LE.tolist())
    result.tensors = {key: tensor.detach().clone() for key, tensor in training_tensors(model, optimizer).items()}
    if engine:
        result.bytes = engine.sent_bytes()
        engine.close()
    return result


def train_all(topology: Topology, cases: list[Case], poison: bool = True) -> list[Trained]:
    """All ``cases`` one after another in the same processes; new memory is filled with NaN first."""
    torch.use_deterministic_algorithms(poison, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = poison
    return [train(topology, case) for case in cases]


def together(results: list[Trained]) -> dict[str, Tensor]:
    """The whole training state, put together from all ranks; what several have must be the same on all."""
    whole: dict[str, Tensor] = {}
    for result in results:
        for key, tensor in result.tensors.items():
            assert key not in whole or torch.equal(whole[key], tensor), key
            whole[key] = tensor
    return whole


def worst_error(state: dict[str, Tensor], reference: dict[str, Tensor]) -> float:
    """Largest difference of any tensor, relative to the largest value of that tensor in the reference."""
    assert set(state) == set(reference), set(state) ^ set(reference)
    errors = [
        float((tensor - reference[key]).abs().max() / reference[key].abs().max().clamp(min=1e-30))
        for key, tensor in state.items()
        if tensor.numel()
    ]
    return max(errors)
