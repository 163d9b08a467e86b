"""What users of other trainers complain about, as far as no other file has it: skew that fills memory and idles ranks.

Other complaints are tests called ``test_pain_N_...`` where they belong; N is their place in the list that the project
keeps of issues in DeepSpeed, Megatron, torchtitan, transformers and others.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from gates import Mode
from launch.config import OptimConfig, TrainConfig
from launch.optim import build_optimizer
from moe.transformer import ForwardContext, next_token_loss
from parallel.config import ParallelConfig
from parallel.engine import ExpertEngine
from parallel.engine_metrics import EngineMetrics
from parallel.topology import Topology
from tests.expert_training import LENGTH, ROWS, Case, batch, build
from tests.harness import run_distributed

pytestmark = pytest.mark.distributed

WORLD, LAYERS, EXPERTS, STEPS = 4, 3, 8, 6


@dataclass(frozen=True)
class Skewed:
    """What a rank saw: metrics of the steps with copies, most copies in a layer, bytes of one copy."""

    metrics: EngineMetrics
    most_copies: int
    chunk_bytes: int


def train_skewed(topology: Topology, modes: list[str], max_copies: int) -> list[Skewed]:
    """All tokens like the same few experts, which one rank owns."""
    seen = []
    for mode in modes:
        model = build(Case(mode, num_experts=EXPERTS, skew=6.0))
        options = {"overlap_degree": 4, "max_copies": max_copies, "link_mbit": 1000}
        engine = ExpertEngine(model, topology, ParallelConfig(mode=mode, split="balanced", **options))
        optimizer = build_optimizer(model, OptimConfig(lr=1e-5))
        rows, most = ROWS // topology.world_size, 0
        for step in range(STEPS):
            engine.begin_step()
            optimizer.zero_grad()
            if step == 1:
                engine.meter.take()  # nothing is predicted before the first loads
            most = max(most, *(int(placement.copies_W.max()) for placement in engine.planned))
            ids = batch(step)[topology.rank * rows : (topology.rank + 1) * rows]
            engine.forward_begins()
            output = model(ids[:, :-1], context=ForwardContext(step=step, mode=Mode.TRAIN))
            engine.backward(next_token_loss(output.logits_BTV, ids[:, 1:])[0] / (ROWS * LENGTH))
            engine.finish()
            optimizer.step()
            load_LE = topology.sum_(torch.stack([layer.output.plan.load_E for layer in output.routing]))
            engine.end_step(load_LE.numpy(), optimizer)
        metrics = engine.meter.take()
        assert metrics is not None
        seen.append(Skewed(metrics, most, engine.layers[0].chunk_bytes))
        engine.close()
    return seen


def test_pain_9_skew_neither_idles_ranks_nor_fills_memory() -> None:
    """DeepEP 99, verl 4103, Megatron 1839: one rank gets most rows, and what relieves it has a bound."""
    max_copies = 2
    for keep, rm in run_distributed(train_skewed, WORLD, ["fssdp-keep", "fssdp-rm"], max_copies):
        for seen in (keep, rm):
            assert seen.metrics.imbalance_before > 2.5, "no skew, no test"
            assert seen.metrics.imbalance_after < 1.3
            assert 0 < seen.most_copies <= max_copies
        assert rm.metrics.copy_peak_bytes <= 2 * max_copies * rm.chunk_bytes, "one layer's copies and their gradients"
        assert keep.metrics.copy_peak_bytes <= (LAYERS + 1) * max_copies * keep.chunk_bytes


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"parallel": {"dense": "fsdp"}}, "parallel.dense: fsdp needs experts that are spread over ranks"),
        ({"parallel": {"node_link_mbit": 100}}, "parallel.node_link_mbit: goes with parallel.link_mbit"),
        ({"parallel": {"planner": "spill"}}, "parallel.planner: spill decides which experts are copied, but"),
        (
            {"parallel": {"mode": "ep", "planner": "calibrate"}},
            "parallel.planner: calibrate decides which experts are copied, but parallel.mode=ep makes no copies",
        ),
        (
            {"parallel": {"mode": "fsdp", "max_copies": 2}},
            "parallel.max_copies: 2 is a bound on copies that parallel.mode",
        ),
        ({"parallel": {"mode": "fsdp", "overlap_degree": 0}}, "parallel.overlap_degree: 0 is a bound on copies that"),
        (
            {"parallel": {"reshard_interval": 9}},
            "parallel.reshard_interval: moving owners levels nothing with parallel.m",
        ),
        (
            {"parallel": {"mode": "ep", "reshard_interval": 9, "overlap_degree": 2}},
            "parallel.overlap_degree: with 2, parallel.reshard_interval=9 would leave the most loaded experts",
        ),
        (
            {"parallel": {"mode": "local"}, "track": {"chrome_trace_step": 2}},
            "track.chrome_trace_step: shows the engine",
        ),
        ({"train": {"global_batch": 6}}, "train.global_batch: 6 sequences do not split evenly over 4 ranks"),
    ],
)
def test_pain_13_what_does_not_go_together_is_refused_in_words(changes: dict[str, dict], words: str) -> None:
    """Megatron 7452: combinations that are silently wrong."""
    problems = TrainConfig.model_validate(changes).check(world_size=4)
    assert any(problem.startswith(words) for problem in problems), problems


@pytest.mark.parametrize(
    "options",
    [
        {"mode": "ep", "max_copies": 2, "overlap_degree": 4, "split": "balanced", "algorithm": "tree", "window": 9},
        {"mode": "ep", "reshard_interval": 9},
        {"mode": "local", "max_copies": 2, "overlap_degree": 4, "predictor": "ema"},
        {"mode": "fsdp", "split": "balanced", "algorithm": "chain", "link_mbit": 100, "node_link_mbit": 200},
        {"mode": "fssdp-rm", "max_copies": 1, "overlap_degree": 0, "planner": "spill", "reshard_interval": 9},
    ],
)
def test_pain_13_what_does_no_harm_is_not_refused(options: dict[str, Any]) -> None:
    """A run goes on in another mode without its bounds and rules being taken back one by one."""
    assert ParallelConfig(**options).check() == []
