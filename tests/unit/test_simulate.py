"""The cost model on cases done by hand, policies by what they may do, replay by the shape of the paper's ablation."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from parallel.cost_model import (
    BERT_MOE,
    BERT_MOE_DEEP,
    CLUSTER_A,
    CLUSTER_B,
    GPT_MOE_L,
    GPT_MOE_S,
    ClusterModel,
    ModelShape,
    memory_ratio,
)
from parallel.load_trace import SyntheticLoads, TraceHeader, TraceStep
from parallel.placement import Placement
from parallel.policies import (
    FlexibleReplicas,
    Hecate,
    LayerPlan,
    Policy,
    RedundantExperts,
    Setting,
    Shadowing,
    SmartSwaps,
    Spill,
    StepPlan,
)
from parallel.simulate import Outcome, balanced, lower_bound, replay, routed_rows

pytestmark = pytest.mark.unit

# Two nodes of two ranks; numbers that make seconds easy to see.
SMALL = ClusterModel("small", 2, 2, rank_bytes_per_s=100.0, node_bytes_per_s=50.0, flop_per_s=1000.0, latency_s=0.0)


def trace_of(
    shape: ModelShape, cluster: ClusterModel, imbalance: float, steps: int, drift: float = 0.02
) -> list[TraceStep]:
    header = TraceHeader(
        shape.layers, cluster.world_size, shape.experts, shape.experts_per_token, shape.width, shape.expert_hidden
    )
    return list(SyntheticLoads(shape.rows_per_rank, imbalance, drift).steps(header, steps, seed=0))


# --- cost model -------------------------------------------------------------------------------------------------------


def test_an_exchange_takes_what_its_busiest_link_takes() -> None:
    def seconds(*sends: tuple[int, int, float]) -> float:
        sent = np.zeros((4, 4))
        for src, dst, size in sends:
            sent[src, dst] += size
        return SMALL.exchange_s(sent)

    assert seconds((0, 0, 1e9)) == 0  # stays at home
    assert seconds((0, 1, 100)) == 1  # inside the node
    assert seconds((0, 2, 100)) == 2  # over the node's link
    assert seconds((0, 2, 100), (1, 3, 100)) == 4  # which both ranks share
    assert seconds((0, 2, 100), (2, 0, 100)) == 2  # each way counts for itself
    assert seconds((0, 1, 400), (0, 2, 100)) == 5  # rank 0 sends 500
    assert replace(SMALL, latency_s=7.0).exchange_s(np.eye(4)) == 0


def test_copies_enter_each_node_once() -> None:
    def seconds(*pairs: tuple[int, int]) -> float:
        owners = Placement([0, 0, 2, 3], world_size=4)
        return SMALL.copies_s(owners.holders_EW, owners.with_copies(pairs).holders_EW, 100.0)

    assert seconds() == 0
    assert seconds((0, 1)) == 1
    assert seconds((0, 2)) == 2
    assert seconds((0, 1), (0, 2), (0, 3)) == 2
    assert seconds((0, 2), (1, 3)) == 4
    assert seconds((3, 2), (2, 3), (0, 1)) == 1


@pytest.mark.parametrize(
    ("shape", "billions"), [(GPT_MOE_S, 1.84), (GPT_MOE_L, 7.36), (BERT_MOE, 3.27), (BERT_MOE_DEEP, 6.54)]
)
def test_the_papers_models_have_the_papers_size(shape: ModelShape, billions: float) -> None:
    """Table 1 of the paper counts everything; experts are all but a few per cent of it."""
    experts = shape.layers * shape.experts * shape.expert_parameters / 1e9
    assert 0.95 * billions < experts < billions


def test_overlap_degree_is_how_many_copies_pass_the_slow_link_under_attention() -> None:
    shape = ModelShape("tiny", 1, 4, width=2, expert_hidden=4, sequence=1, tokens_per_rank=250)
    assert shape.expert_bytes == 32
    assert shape.attention_s(SMALL) == 10.0  # 250 tokens of 40 FLOP
    assert shape.overlap_degree(SMALL) == 4  # 500 bytes: 15 experts, but there are 4
    assert shape.overlap_degree(replace(SMALL, node_bytes_per_s=9.0)) == 2
    assert shape.overlap_degree(replace(SMALL, rank_bytes_per_s=7.0)) == 2


def test_memory_formulae_give_the_papers_ratios() -> None:
    """5.73 times the parameters kept, 90.2% fewer copies released; the paper says +64% and +11.6%."""
    owned = 24.0
    mean = 4.73 * owned / 12
    largest = 12 * (1 - 0.902) * mean
    copies_L = np.array([largest] + [(12 * mean - largest) / 11] * 11)
    assert memory_ratio(copies_L, owned, 2, keep=True) == pytest.approx(1.64, abs=0.02)
    assert memory_ratio(copies_L, owned, 2, keep=False) == pytest.approx(1.116, abs=0.002)
    assert memory_ratio(np.zeros(12), owned, 2, keep=True) == 1


# --- routing ----------------------------------------------------------------------------------------------------------


def test_rows_are_routed_by_each_rule() -> None:
    placement = Placement([0, 2], world_size=4).with_copies([(0, 1), (0, 3)])
    count_WE, node_W = np.array([[6, 1], [6, 1], [6, 1], [6, 1]]), np.array([0, 0, 1, 1])
    to_rank_2 = np.array([0, 0, 1, 0])  # expert 1 has one holder
    near = routed_rows(LayerPlan(placement, placement, "near"), count_WE, node_W)
    assert (near - to_rank_2).tolist() == [[6, 0, 0, 0], [0, 6, 0, 0], [0, 0, 0, 6], [0, 0, 0, 6]]
    spread = routed_rows(LayerPlan(placement, placement, "spread"), count_WE, node_W)
    assert (spread - to_rank_2).tolist() == [[2, 2, 0, 2]] * 4
    quota_EW = np.array([[9, 3, 0, 12], [0, 0, 4, 0]])
    quota = routed_rows(LayerPlan(placement, placement, "quota", quota_EW=quota_EW), count_WE, node_W)
    assert quota.sum(0).tolist() == [9, 3, 4, 12]
    assert np.diag(quota - to_rank_2).tolist() == [6, 3, 0, 6]


def test_a_step_of_expert_parallelism_costs_what_the_formula_says() -> None:
    """One layer, an expert a rank, all 40 rows for expert 0 on rank 0."""
    shape = ModelShape("tiny", 1, 4, 2, 4, sequence=1, tokens_per_rank=10, experts_per_token=1)
    count_LWE = np.zeros((1, 4, 4), dtype=np.int64)
    count_LWE[:, :, 0] = 10
    setting = Setting(shape, SMALL)
    outcome = replay(Hecate(setting, "EP", copies=False), [TraceStep(0, count_LWE)], setting, skip=0)
    attention, rows = 10 * 40 / 1000, 40 * 32 / 1000
    exchange = max(30 * 4 / 100, 20 * 4 / 50)  # rank 0 receives 30 rows of 4 bytes, its node 20 of them
    assert outcome.step_s == pytest.approx(3 * (attention + rows) + 4 * exchange)
    assert outcome.imbalance == 4
    assert outcome.token_bytes == 4 * 30 * 4
    assert (outcome.copy_bytes, outcome.moved_bytes, outcome.exposed_s, outcome.memory_ratio) == (0, 0, 0, 1)


class Fixed:
    """Every expert on every rank of ``SMALL``, brought there in one way or another."""

    name = "fixed"

    def __init__(self, early: str, gathers: int, resident: bool) -> None:
        owners = Placement([0, 1, 2, 3], world_size=4)
        self.gathers = gathers
        self._layer = LayerPlan(
            owners.everywhere(), owners.everywhere() if early == "all" else owners, resident=resident
        )

    def plan(self, step: int, count_LWE: np.ndarray) -> StepPlan:
        return StepPlan([self._layer], np.zeros((4, 4)))


@pytest.mark.parametrize(
    ("policy", "exposed_s", "copy_bytes", "gradient_bytes", "memory"),
    [
        (Fixed("all", 1, resident=False), (1.28 - 0.4) + (1.28 - 0.8), 384, 384, 1 + 6 * 2 / 16),
        (Fixed("all", 2, resident=False), (1.28 - 0.4) + (2.56 - 0.8), 768, 384, 1 + 6 * 2 / 16),
        (Fixed("none", 1, resident=False), 1.28 + (1.28 - 0.8), 384, 384, 1 + 6 * 2 / 16),
        (Fixed("all", 1, resident=True), 2.56 - 0.8, 0, 768, 4),
    ],
    ids=["kept", "released", "after the gate", "resident"],
)
def test_what_attention_does_not_hide_is_exposed(
    policy: Fixed, exposed_s: float, copy_bytes: int, gradient_bytes: int, memory: float
) -> None:
    """12 copies of 32 bytes: 2 enter each node at 50 bytes a second. Attention hides 0.4 s forward, 0.8 s backward."""
    shape = ModelShape("tiny", 1, 4, 2, 4, sequence=1, tokens_per_rank=10, experts_per_token=1)
    setting = Setting(shape, SMALL)
    outcome = replay(policy, [TraceStep(0, np.full((1, 4, 4), 3))], setting, skip=0)
    assert outcome.exposed_s == pytest.approx(exposed_s)
    assert outcome.step_s == pytest.approx(3 * (0.4 + 12 * 32 / 1000) + exposed_s)
    assert (outcome.copy_bytes, outcome.gradient_bytes, outcome.token_bytes) == (copy_bytes, gradient_bytes, 0)
    assert outcome.memory_ratio == pytest.approx(memory)


# --- policies ---------------------------------------------------------------------------------------------------------

SHAPE = ModelShape("test", 3, 16, 64, 128, sequence=256, tokens_per_rank=2048)
CLUSTER = ClusterModel("test", 2, 4, rank_bytes_per_s=5e9, node_bytes_per_s=2e9, flop_per_s=1e12)
SETTING = Setting(SHAPE, CLUSTER)


def every_policy(setting: Setting) -> list[Policy]:
    return [
        Hecate(setting, "EP", copies=False),
        Hecate(setting, "sharding", copies=False, reshard_interval=5),
        Hecate(setting, "both", reshard_interval=5, calibrate="more"),
        Hecate(setting, "both and spill", reshard_interval=5, calibrate="spill"),
        Hecate(setting, "rm", release=True),
        Spill(setting),
        Shadowing(setting),
        SmartSwaps(setting, interval=5),
        RedundantExperts(setting, interval=5),
        FlexibleReplicas(setting, interval=5),
    ]


@pytest.mark.parametrize("policy", every_policy(SETTING), ids=lambda policy: policy.name)
def test_every_policy_computes_every_row_and_knows_only_the_past_before_the_gate(policy: Policy) -> None:
    trace = trace_of(SHAPE, CLUSTER, 2.5, 12, drift=0.1)
    again = next(other for other in every_policy(SETTING) if other.name == policy.name)
    for index, (_, count_LWE) in enumerate(trace):
        plan = policy.plan(index, count_LWE)
        for layer, count_WE in zip(plan.layers, count_LWE, strict=True):
            rows_WW = routed_rows(layer, count_WE, CLUSTER.node_W)
            assert rows_WW.sum(1) == pytest.approx(count_WE.sum(1))
            assert not (layer.early.holders_EW & ~layer.placement.holders_EW).any()
        # Shown another step instead, it would have held the same before the gate.
        other = again.plan(index, count_LWE[:, :, ::-1] if index == 11 else count_LWE)
        assert [layer.early for layer in other.layers] == [layer.early for layer in plan.layers]
        assert np.array_equal(other.moved_WW, plan.moved_WW)


def test_resident_policies_keep_within_their_slots() -> None:
    trace = trace_of(SHAPE, CLUSTER, 2.5, 12)
    slots = {"SmartMoE swaps": 2, "EPLB": 3, "FlexMoE": 4}
    for policy in (SmartSwaps(SETTING, 5), RedundantExperts(SETTING, 5), FlexibleReplicas(SETTING, 5)):
        for index, (_, count_LWE) in enumerate(trace):
            for layer in policy.plan(index, count_LWE).layers:
                assert layer.placement.holders_EW.sum(0).max() <= slots[policy.name]


# --- replay -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def outcomes() -> dict[str, Outcome]:
    """GPT-MoE-S on the paper's cluster B, made-up loads, imbalance 4."""
    setting = Setting(GPT_MOE_S, CLUSTER_B)
    trace = trace_of(GPT_MOE_S, CLUSTER_B, 4.0, 30)
    policies: list[Policy] = [
        Hecate(setting, "ep", copies=False),
        Hecate(setting, "sharding", copies=False, reshard_interval=10),
        Hecate(setting, "copies"),
        Hecate(setting, "both", reshard_interval=10),
        Hecate(setting, "rm", reshard_interval=10, release=True),
        Hecate(setting, "calibrated", reshard_interval=10, calibrate="more"),
        Hecate(setting, "spilled", reshard_interval=10, calibrate="spill"),
        Spill(setting),
    ]
    found = {policy.name: replay(policy, trace, setting) for policy in policies}
    found["ideal"] = replay(Hecate(setting, "ep", copies=False), balanced(trace), setting)
    found["bound"] = lower_bound(trace, setting)
    return found


def test_the_ablation_has_the_papers_shape(outcomes: dict[str, Outcome]) -> None:
    """Both parts beat copies alone, which beat sharding alone, which beats EP (section 5.4); moves not counted."""
    step_s = {name: outcome.step_s - outcome.moved_s for name, outcome in outcomes.items()}
    assert step_s["both"] < step_s["copies"] < step_s["sharding"] < step_s["ep"]
    level = {name: outcome.imbalance for name, outcome in outcomes.items()}
    assert level["both"] < level["copies"] < level["sharding"] < level["ep"]


def test_releasing_trades_traffic_for_memory(outcomes: dict[str, Outcome]) -> None:
    keep, release = outcomes["both"], outcomes["rm"]
    assert release.copy_bytes == 2 * keep.copy_bytes
    assert release.gradient_bytes == keep.gradient_bytes
    assert 1 < release.memory_ratio < 1 + (keep.memory_ratio - 1) / 4
    assert release.imbalance == keep.imbalance


def test_true_loads_level_what_predicted_copies_left(outcomes: dict[str, Outcome]) -> None:
    assert outcomes["spilled"].imbalance < outcomes["calibrated"].imbalance <= outcomes["both"].imbalance
    assert outcomes["spilled"].imbalance < 1.1
    assert outcomes["spilled"].step_s < outcomes["both"].step_s


def test_nothing_beats_the_lower_bound_and_balanced_loads_are_level(outcomes: dict[str, Outcome]) -> None:
    assert all(outcome.step_s >= outcomes["bound"].step_s for outcome in outcomes.values())
    assert outcomes["ideal"].imbalance == pytest.approx(1, abs=0.01)
    assert outcomes["spill"].imbalance < 1.15


def test_a_trace_of_another_shape_or_too_short_is_refused() -> None:
    trace = trace_of(SHAPE, CLUSTER, 2.0, 3)
    with pytest.raises(ValueError, match=r"the trace has counts of shape \(3, 8, 16\), the setting \(L, W, E\) = "):
        replay(Spill(SETTING), trace, Setting(GPT_MOE_S, CLUSTER_A))
    with pytest.raises(ValueError, match="the trace has no step behind the first 3, which are not counted"):
        replay(Spill(SETTING), trace, SETTING, skip=3)


def test_balanced_counts_keep_each_ranks_rows() -> None:
    trace = trace_of(SHAPE, CLUSTER, 2.0, 1)
    even = balanced(trace)[0].count_LWE
    assert np.array_equal(even.sum(2), trace[0].count_LWE.sum(2))
    assert np.ptp(even, axis=2).max() <= 1
    assert np.ptp(even.sum(1), axis=1).max() <= 8
