"""Prescribed routing (hash, forced, replay) against plain NumPy loops.

Shape suffixes: T tokens, E experts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gates import GateInput, Mode, build_gate, record_routing
from gates.hash import balanced_table, clustered_table, hash_experts
from gates.metrics import imbalance
from moe import ForwardContext, ModelConfig, MoEConfig, Transformer

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(("num_experts", "k"), [(2, 1), (5, 3), (8, 2), (16, 4), (3, 3)])
def test_hashed_experts_are_distinct_and_even(num_experts: int, k: int) -> None:
    ids_T = torch.arange(20_000)
    expert_TK = hash_experts(ids_T, num_experts, k)
    assert all(len(set(row)) == k for row in expert_TK[:2000].tolist())
    for column in range(k):
        share_E = torch.bincount(expert_TK[:, column], minlength=num_experts) * num_experts / 20_000
        np.testing.assert_allclose(share_E.numpy(), 1, atol=0.1)
    gate = build_gate({"name": "hash", "k": k}, 4, num_experts)
    out = gate(GateInput(torch.randn(20_000, 4), ids_T=ids_T))
    assert torch.equal(out.plan.expert_N.view(-1, k), expert_TK)
    np.testing.assert_allclose(out.plan.weight_N, 1 / k)
    other = hash_experts(ids_T, num_experts, k, seed=1)
    if k < num_experts:
        assert not torch.equal(other.sort(1).values, expert_TK.sort(1).values)


def test_table_balanced_by_frequency() -> None:
    rng = np.random.default_rng(0)
    count_V = torch.from_numpy((1e4 / (1 + rng.permutation(500)) ** 1.1).astype(np.int64))
    table_V1 = balanced_table(count_V, 8)
    load = np.zeros(8)
    np.add.at(load, table_V1[:, 0].numpy(), count_V.numpy())
    assert table_V1.shape == (500, 1)
    assert load.max() - load.min() <= count_V.max()
    loop = np.zeros(8)
    for v in sorted(range(500), key=lambda v: (-int(count_V[v]), v)):
        assert loop[table_V1[v, 0]] == loop.min(), "not the expert with least load so far"
        loop[table_V1[v, 0]] += int(count_V[v])
    without_counts = balanced_table(torch.zeros(24), 8)
    assert torch.bincount(without_counts[:, 0]).tolist() == [3] * 8


def test_tables_by_cluster() -> None:
    rng = np.random.default_rng(0)
    cluster = rng.permutation(np.repeat(np.arange(4), 12))
    vectors = rng.normal(size=(4, 6))[cluster] * 10 + rng.normal(size=(48, 6))
    clustered = clustered_table(torch.from_numpy(vectors), 4)[:, 0].numpy()
    dispersed = clustered_table(torch.from_numpy(vectors), 4, dispersed=True)[:, 0].numpy()
    for c in range(4):
        assert len(set(clustered[cluster == c])) == 1, "a cluster is one expert"
        assert np.bincount(dispersed[cluster == c], minlength=4).tolist() == [3] * 4, "a cluster is on all experts"
    assert len(set(clustered)) == 4


def test_hash_with_a_table(tmp_path: Path) -> None:
    path = tmp_path / "table.pt"
    options = {"name": "hash", "table": str(path), "vocab_size": 30, "k": 2}
    table_VK = hash_experts(torch.arange(30), 5, 2, seed=7)
    torch.save(table_VK, path)
    gate = build_gate(options, 4, 5)
    ids_T = torch.tensor([29, 0, 7, 7])
    plan = gate(GateInput(torch.zeros(4, 4), ids_T=ids_T)).plan
    assert torch.equal(plan.expert_N.view(-1, 2), table_VK[ids_T])
    for wrong in (30, -1):
        with pytest.raises(ValueError, match=rf"the table knows ids 0 to 29, got .*{wrong}"):
            gate(GateInput(torch.zeros(1, 4), ids_T=torch.tensor([wrong])))
    with pytest.raises(ValueError, match="pass ids_T"):
        gate(GateInput(torch.zeros(1, 4)))
    missing = build_gate({**options, "table": str(tmp_path / "no.pt")}, 4, 5)  # a checkpoint may still fill it
    with pytest.raises(ValueError, match="cannot read"):
        missing.reset_parameters()
    for bad, message in (
        (table_VK[:29], r"must hold an int64 tensor .*\(30, 2\), not torch\.int64 \(29, 2\)"),
        (table_VK.float(), r"not torch\.float32"),
        (table_VK + 1, "not among 0 to 4"),
        (table_VK[:, :1].repeat(1, 2), "same expert twice"),
        ({"table": table_VK}, "not dict"),
    ):
        torch.save(bad, path)
        with pytest.raises(ValueError, match=message):
            build_gate(options, 4, 5)


@pytest.mark.parametrize(
    ("num_experts", "k", "wanted"),
    [(8, 2, 1.0), (8, 2, 1.5), (8, 2, 2.0), (8, 2, 3.5), (16, 1, 4.0), (16, 1, 12.0), (16, 4, 2.0), (5, 1, 1.2)],
)
def test_forced_imbalance(num_experts: int, k: int, wanted: float) -> None:
    num_tokens = 20_000
    gate = build_gate({"name": "forced", "k": k, "imbalance": wanted}, 6, num_experts)
    ids_T = torch.randint(0, 5000, (num_tokens,), generator=torch.Generator().manual_seed(0))
    position_T = torch.arange(num_tokens) % 512
    plans = [
        gate(GateInput(torch.randn(num_tokens, 6) * scale, ids_T=ids_T, position_T=position_T, mode=mode)).plan
        for scale, mode in ((1.0, Mode.TRAIN), (10.0, Mode.EVAL))
    ]
    assert torch.equal(plans[0].expert_N, plans[1].expert_N), "what the tokens say counts"
    assert imbalance(plans[0].load_E).item() == pytest.approx(wanted, rel=0.1)
    assert all(len(set(row)) == k for row in plans[0].expert_N.view(-1, k)[:500].tolist())


def test_drift_moves_who_is_popular() -> None:
    gate = build_gate({"name": "forced", "k": 1, "imbalance": 4.0, "drift": 0.5}, 6, 8)
    place: dict[str, Any] = {"ids_T": torch.arange(4000), "position_T": torch.arange(4000)}
    popular = [
        int(gate(GateInput(torch.zeros(4000, 6), **place, step=step)).plan.load_E.argmax()) for step in range(16)
    ]
    assert all(popular[step] == popular[step + 1] for step in range(0, 16, 2))
    assert sorted(popular[::2]) == list(range(8))


def small_transformer(gate: dict[str, Any], num_experts: int = 4) -> Transformer:
    sizes = {"vocab_size": 50, "dim": 16, "num_layers": 2, "num_heads": 2, "max_seq_len": 32}
    config = ModelConfig(**sizes, moe=MoEConfig(num_experts=num_experts, hidden_dim=8))
    torch.manual_seed(0)
    return Transformer(config, gate)


def loads(model: Transformer, ids_BT: Tensor, step: int, row: int = 0, mode: Mode = Mode.TRAIN) -> list[list[int]]:
    routing = model(ids_BT, context=ForwardContext(step=step, mode=mode, row=row)).routing
    return [layer.output.plan.load_E.tolist() for layer in routing]


def test_replay(tmp_path: Path) -> None:
    path = tmp_path / "routing.pt"
    ids_BT = torch.randint(0, 50, (4, 12), generator=torch.Generator().manual_seed(0))
    recorded_from = small_transformer({"name": "top_p", "p": 0.6, "init_std": 2.0})
    micro_batches = [(step, row) for step in (5, 6, 7) for row in (0, 2)]  # counted from the first recorded step
    with record_routing(recorded_from, path):
        recorded = {key: loads(recorded_from, ids_BT[key[1] : key[1] + 2].roll(key[0]), *key) for key in micro_batches}
        loads(recorded_from, ids_BT, 9, mode=Mode.EVAL)
    assert len({str(value) for value in recorded.values()}) > 3
    model = small_transformer({"name": "replay", "path": str(path)})
    for step, row in [*micro_batches, (8, 0), (10, 2)]:
        again = loads(model, ids_BT[:2], step - 5, row)
        assert again == recorded[5 + (step - 5) % 3, row]
    evaluated = model(ids_BT, context=ForwardContext(mode=Mode.EVAL)).routing[0].output.plan
    assert evaluated.uniform_k == 2
    with pytest.raises(ValueError, match="nothing for step 0, layer 0, sequence 1"):
        loads(model, ids_BT[:2], 0, 1)
    with pytest.raises(ValueError, match="has 24 tokens for step 0, layer 0, sequence 0; 36 are to be routed"):
        loads(model, ids_BT[:3], 0)
    loose = small_transformer({"name": "replay", "path": str(path), "strict": False})
    assert loads(loose, ids_BT.repeat(1, 2), 1)[0] == [4 * load for load in recorded[6, 0][0]]
    with pytest.raises(ValueError, match=r"routes to expert \d, but there are only 2 experts"):
        loads(small_transformer({"name": "replay", "path": str(path)}, num_experts=2), ids_BT[:2], 0)
    with pytest.raises(ValueError, match="path: name the file"):
        small_transformer({"name": "replay"})
    torch.save({"weight": torch.zeros(3)}, tmp_path / "other.pt")
    for name in ("missing.pt", "other.pt"):
        with pytest.raises(ValueError, match="cannot read"):
            loads(small_transformer({"name": "replay", "path": str(tmp_path / name)}), ids_BT[:2], 0)
    with record_routing(recorded_from, path):
        pass
    with pytest.raises(ValueError, match="holds no step"):
        loads(small_transformer({"name": "replay", "path": str(path)}), ids_BT[:2], 0)
