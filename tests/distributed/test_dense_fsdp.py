"""Dense parameters in slices: the same training as one process that has them whole."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from gates import Mode
from launch.config import OptimConfig
from launch.optim import build_optimizer
from moe import Transformer
from moe.transformer import ForwardContext, next_token_loss
from parallel.checkpoint import training_tensors
from parallel.config import ParallelConfig
from parallel.engine import ExpertEngine
from parallel.model import ParallelModel
from parallel.topology import Topology
from tests.expert_training import LENGTH, ROWS, Case, Trained, batch, build, train, worst_error
from tests.harness import run_distributed, run_single

pytestmark = pytest.mark.distributed

MODES = ("ep", "fsdp", "fssdp-keep", "fssdp-rm")


@dataclass
class Spread:
    """A model that is spread over ranks, and its optimizer."""

    model: Transformer
    parallel: ParallelModel
    optimizer: torch.optim.Optimizer


@dataclass
class Outcome:
    """What one rank saw: see :class:`Trained`; ``tensors`` are whole wherever they were in slices."""

    curve: list[tuple[float, float]] = field(default_factory=list)
    tensors: dict[str, Tensor] = field(default_factory=dict)


def spread(topology: Topology, case: Case, dense: str = "fsdp") -> Spread:
    model = build(case)
    config = ParallelConfig(mode=case.mode, dense=dense, **{"link_mbit": 1000, **case.options})
    experts = None if case.mode == "local" else ExpertEngine(model, topology, config)
    parallel = ParallelModel(model, topology, config, experts)
    return Spread(model, parallel, build_optimizer(model, OptimConfig(lr=1e-2)))


def step(topology: Topology, case: Case, it: Spread, index: int) -> tuple[float, float]:
    """One optimizer step; loss over all ranks and gradient norm."""
    rows = ROWS // topology.world_size
    ids = batch(index)[topology.rank * rows : (topology.rank + 1) * rows]
    it.parallel.begin_step()
    total = torch.zeros((), dtype=torch.float64)
    load_LE = torch.zeros(3, case.num_experts, dtype=torch.int64)
    for first in range(0, rows, min(rows, case.micro)):
        last = first + case.micro >= rows
        part = ids[first : first + case.micro]
        it.parallel.forward_begins(last)
        output = it.model(part[:, :-1], context=ForwardContext(step=index, mode=Mode.TRAIN))
        nats, tokens = next_token_loss(output.logits_BTV, part[:, 1:])
        it.parallel.backward((nats + output.aux_loss() * int(tokens)) / (ROWS * LENGTH), last)
        total += nats.detach()
        load_LE += torch.stack([layer.output.plan.load_E for layer in output.routing])
    it.parallel.finish()
    norm = it.parallel.grad_norm()
    it.parallel.clip_(norm, case.clip_norm)
    it.optimizer.step()
    it.parallel.end_step(topology.sum_(load_LE), it.optimizer)
    return float(topology.sum_(total)), float(norm)


def whole_tensors(it: Spread) -> dict[str, Tensor]:
    tensors = training_tensors(it.model, it.optimizer)
    return {k: (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone() for k, t in tensors.items()}


def train_sliced(topology: Topology, cases: list[Case]) -> list[Outcome]:
    """All ``cases`` one after another; new memory is filled with NaN first."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    outcomes = []
    for case in cases:
        it = spread(topology, case)
        curve = [step(topology, case, it, index) for index in range(case.steps)]
        outcomes.append(Outcome(curve, whole_tensors(it)))
        it.parallel.close()
    return outcomes


def together(outcomes: list[Outcome]) -> dict[str, Tensor]:
    whole: dict[str, Tensor] = {}
    for outcome in outcomes:
        for key, tensor in outcome.tensors.items():
            assert key not in whole or torch.equal(whole[key], tensor), key
            whole[key] = tensor
    return whole


def agree(outcomes: list[Outcome], reference: Trained, tolerance: float) -> None:
    assert worst_error(together(outcomes), reference.tensors) < tolerance
    for outcome in outcomes:
        assert len(outcome.curve) == len(reference.curve)
        for got, wanted in zip(outcome.curve, reference.curve, strict=True):
            assert got == pytest.approx(wanted, rel=tolerance)


@pytest.fixture(scope="module")
def plain() -> Trained:
    return run_single(train, Case(None))


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_sliced_dense_parameters_train_as_one_process_in_every_mode(world: int, plain: Trained) -> None:
    """Loss, norm, clipping, weights and optimizer state in fp64, with and without accumulation; width 16 over 3."""
    assert plain.curve[0][1] > Case(None).clip_norm, "nothing would be clipped"
    cases = [Case(mode, micro) for mode in MODES for micro in (ROWS // world, 2)]
    by_rank = run_distributed(train_sliced, world, cases)
    for index in range(len(cases)):
        agree([outcomes[index] for outcomes in by_rank], plain, 1e-10)


def test_recomputed_blocks_gather_their_slices_again(plain: Trained) -> None:
    cases = [Case(mode, micro, recompute="block") for mode in MODES for micro in (6, 2)]
    by_rank = run_distributed(train_sliced, 2, cases)
    for index in range(len(cases)):
        agree([outcomes[index] for outcomes in by_rank], plain, 1e-10)
