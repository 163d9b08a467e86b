"""Every mode of the expert engine is the same function: losses, norms, weights and optimizer state after some steps."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from parallel.topology import Topology
from tests.expert_training import Case, Trained, together, train, train_all, worst_error
from tests.harness import run_distributed, run_single

pytestmark = pytest.mark.distributed

MODES = ("ep", "fsdp", "fssdp-keep", "fssdp-rm")


@pytest.fixture(scope="module")
def plain() -> Trained:
    return run_single(train, Case(None))


def agree(results: list[Trained], reference: Trained, tolerance: float) -> None:
    assert worst_error(together(results), reference.tensors) < tolerance
    for result in results:
        for got, wanted in zip(result.curve, reference.curve, strict=True):
            assert got == pytest.approx(wanted, rel=tolerance)


def test_the_reference_has_skew_and_empty_experts(plain: Trained) -> None:
    loads = torch.tensor(plain.loads)
    assert (loads == 0).any()
    assert float((loads.amax(-1) / loads.double().mean(-1)).max()) > 2


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_pain_3_4_and_7_every_mode_equals_one_process_in_fp64(world: int, plain: Trained) -> None:
    """Scale of experts' gradients (pytorch 160285), clipping by one norm of all (Megatron 5916), NaN in new memory."""
    cases = [Case(mode, micro) for mode in MODES for micro in (12 // world, 1)]
    by_rank = run_distributed(train_all, world, cases)
    for index in range(len(cases)):
        agree([results[index] for results in by_rank], plain, 1e-10)


def test_every_mode_equals_one_process_in_fp32() -> None:
    reference = run_single(train, Case(None, dtype=torch.float32))
    cases = [Case(mode, dtype=torch.float32) for mode in MODES]
    by_rank = run_distributed(train_all, 2, cases)
    for index in range(len(cases)):
        results = [results[index] for results in by_rank]
        assert [c[0] for c in results[0].curve] == pytest.approx([c[0] for c in reference.curve], rel=1e-5)


def test_keep_and_rm_give_the_same_bits() -> None:
    cases = [Case("fssdp-keep"), Case("fssdp-rm"), Case("fssdp-rm", recompute="block")]
    by_rank = run_distributed(train_all, 3, cases)
    for keep, rm, recomputed in by_rank:
        for other in (rm, recomputed):
            assert keep.curve == other.curve
            assert all(torch.equal(tensor, other.tensors[key]) for key, tensor in keep.tensors.items())


def test_bf16_gradients_of_copies_are_summed_in_fp32() -> None:
    """Kept in bf16 for one backward pass, in fp32 over several; either way only sums are rounded, and those in fp32."""
    bf16: dict[str, Any] = {"dtype": torch.float32, "compute_dtype": torch.bfloat16, "steps": 1}
    modes = [Case(mode, micro, **bf16) for micro in (4, 2) for mode in ("ep", "fssdp-keep", "fssdp-rm")]
    by_rank = run_distributed(train_all, 3, modes)
    for index in (1, 4):
        keep, rm = (together([results[i] for results in by_rank]) for i in (index, index + 1))
        if index == 1:
            assert all(torch.equal(tensor, rm[key]) for key, tensor in keep.items())
        assert worst_error(keep, rm) < 1e-5
        # An expert on its owner alone rounds one large gradient to bf16, copies round several small ones.
        assert by_rank[0][index].curve[0] == pytest.approx(by_rank[0][index - 1].curve[0], rel=1e-2)


def test_pain_10_recomputed_activations_replay_plan_and_placement(plain: Trained) -> None:
    cases = [Case(mode, micro, recompute="block") for mode in MODES for micro in (6, 2)]
    by_rank = run_distributed(train_all, 2, cases)
    for index in range(len(cases)):
        agree([results[index] for results in by_rank], plain, 1e-10)


def test_bytes_are_those_of_the_formula() -> None:
    """fsdp gathers all experts twice (the last layer's stay for backward) and moves no token; ep moves no expert."""
    cases = [Case("ep", 6, steps=1), Case("fsdp", 6, steps=1)]
    by_rank = run_distributed(train_all, 2, cases)
    ep = [results[0].bytes for results in by_rank]
    fsdp = [results[1].bytes for results in by_rank]
    chunk_bytes, experts, layers = 3 * 16 * 8 * 8, 5, 3
    assert sum(b["spAG"] for b in ep) == sum(b["spRS"] for b in ep) == 0
    assert sum(b["tokens"] for b in ep) > 0
    assert sum(b["tokens"] for b in fsdp) == 0
    assert sum(b["spRS"] for b in fsdp) == layers * experts * chunk_bytes
    assert sum(b["spAG"] for b in fsdp) == (2 * layers - 1) * experts * chunk_bytes


def _no_gradient_to_the_tokens(topology: Topology) -> bool:
    """A layer whose input needs no gradient gets no event from dispatch's backward; its experts' gradients do come."""
    from moe.layer import MoELayer
    from parallel.config import ParallelConfig
    from parallel.engine import ExpertEngine

    torch.manual_seed(0)
    layer = MoELayer(8, 4, 4, {"name": "topk", "k": 2}).double()
    whole = {name: param.detach().clone() for name, param in layer.experts.named_parameters()}
    engine = ExpertEngine(layer, topology, ParallelConfig(mode="fsdp"))
    reference = MoELayer(8, 4, 4, {"name": "topk", "k": 2}).double()
    reference.gate.load_state_dict(layer.gate.state_dict())
    reference.experts.load_state_dict(whole)
    x = torch.randn(2, 10, 8, dtype=torch.float64)
    engine.begin_step()
    engine.forward_begins()
    engine.backward(layer(x[topology.rank]).y.square().sum())
    engine.finish()
    for part in x:
        reference(part).y.square().sum().backward()
    (experts,) = engine.experts
    for name, param in reference.experts.named_parameters():
        part = next(p for p in experts.layout if p.name == name)
        assert torch.allclose(part.of(experts.chunks_eX.grad), param.grad[experts.owned], rtol=1e-10)
    engine.close()
    return True


def test_tokens_without_gradient_still_bring_the_experts_gradients_home() -> None:
    assert run_distributed(_no_gradient_to_the_tokens, 2) == [True, True]


def test_pain_1_and_2_ranks_and_experts_without_tokens() -> None:
    """All tokens go to the same two experts, so that under ep two of four ranks compute nothing (DeepSpeed 5794)."""
    reference = run_single(train, replace(Case(None), skew=100.0))
    by_rank = run_distributed(train_all, 4, [Case(mode, 3, skew=100.0) for mode in MODES])
    for index in range(len(MODES)):
        agree([results[index] for results in by_rank], reference, 1e-9)


PLANNED = (
    {"overlap_degree": 2},
    {"overlap_degree": 3, "max_copies": 1, "split": "balanced"},
    {"overlap_degree": 3, "planner": "calibrate", "max_copies": 2},
    {"planner": "spill"},
    {"overlap_degree": 2, "algorithm": "tree", "predictor": "ema"},
    {"overlap_degree": 1, "reshard_interval": 2},
)


@pytest.mark.parametrize("world", [2, 4])
def test_every_planner_equals_one_process(world: int) -> None:
    """Also where ranks outnumber experts; the engine decides placements from the loads that it sees."""
    reference = run_single(train, Case(None, num_experts=3, steps=4))
    cases = [
        Case(mode, micro, num_experts=3, steps=4, copies_seed=None, options=options)
        for options in PLANNED
        for mode, micro in (("fssdp-keep", 2), ("fssdp-rm", 12), ("fssdp-rm", 1))
    ]
    by_rank = run_distributed(train_all, world, cases)
    moved = {"spAG": 0, "tokens": 0}
    for index in range(len(cases)):
        results = [results[index] for results in by_rank]
        agree(results, reference, 1e-10)
        moved = {kind: moved[kind] + sum(result.bytes[kind] for result in results) for kind in moved}
    assert min(moved.values()) > 0, moved


@pytest.mark.parametrize("world", [2, 4])
def test_owners_that_change_after_every_step_change_nothing_else(world: int, plain: Trained) -> None:
    """Weights and both AdamW moments travel; a stale moment would show in the weights (DeepSpeed 8147)."""
    cases = [Case(mode, 3, rotate_owners=True) for mode in ("ep", "fssdp-keep", "fssdp-rm")]
    by_rank = run_distributed(train_all, world, cases)
    chunk_bytes, layers = 3 * 16 * 8 * 8, 3
    for index in range(len(cases)):
        results = [results[index] for results in by_rank]
        agree(results, plain, 1e-10)
        owners = [sum(result.bytes["owners"] for result in results)]
        # Weights and two moments of each expert that changed its rank: blocks of experts meet at `world` borders.
        assert owners == [3 * chunk_bytes * layers * world * cases[index].steps]
