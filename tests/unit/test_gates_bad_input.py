"""What users get wrong about gates: each a named error that says what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from gates import GateInput, Mode, build_gate, parse_gate_config
from moe import MoELayer

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("options", "experts", "message"),
    [
        ({"name": "comet", "k": 5}, 4, "k: 5 trees, but there are only 4 experts"),
        ({"name": "sparse_ot", "k": 5}, 4, "k: 5 experts per token, but there are only 4"),
        ({"name": "sparse_ot", "k": 1, "renormalise": True}, 4, "renormalise: with k=1 it makes every weight 1"),
        ({"name": "sparse_ot", "k": 1, "solver": "newton"}, 4, "solver: newton needs orientation=token, k >= 2"),
        ({"name": "sparse_ot", "orientation": "expert", "weights": "plan"}, 4, "weights: plan needs orientation=token"),
        ({"name": "dense_to_sparse", "k": 1}, 4, "renormalise: with k=1 it makes every weight 1"),
        ({"name": "dense_to_sparse", "temperature_end": 3.0}, 4, "temperature_end: 3 is above temperature_start 2"),
        ({"name": "forced", "imbalance": 4.0}, 4, "imbalance: 4 is above E / k = 2"),
        ({"name": "hash", "table": "ids.pt"}, 4, "vocab_size: needed with a table from a file"),
        ({"name": "hash", "vocab_size": 9}, 4, "vocab_size: has no effect without a table"),
        ({"name": "top_p", "mean_k": 5.0}, 4, "mean_k: 5 must be from 1 to 4"),
        ({"name": "top_p", "integral": 0.5}, 4, "integral: has no effect without mean_k"),
        ({"name": "expert_choice", "max_k": 5}, 4, "max_k: 5 experts for a token, but there are only 4"),
        ({"name": "relu", "max_k": 1}, 4, "max_k: 1 must be from k=2 to the 4 experts"),
        ({"name": "feature_choice", "beta": 0.0}, 4, "beta: ranks begin at 0, so it must be above 0"),
        ({"name": "local_search", "gate": {"name": "topk", "k": 9}}, 4, "gate.k: 9 experts per token"),
        ({"name": "local_search", "sinkhorn_end": 9}, 4, "sinkhorn_end: has no effect with solver=newton"),
        ({"name": "local_search", "max_experts": 3}, 4, "max_experts: 4 experts would all be computed"),
        ({"name": "topk", "balance": "quantile", "k": 4}, 4, "balance: with k = E there is nothing to balance"),
        ({"name": "topk", "quantile_rate": 0.5}, 4, "quantile_rate: has no effect without balance=quantile"),
        ({"name": "replay"}, 4, "path: name the file to repeat"),
        ({"name": "top_p", "max_k": 1}, 4, "renormalise: with max_k=1 it makes every weight 1, so that the task does"),
        ({"name": "sinkhorn", "renormalise": True}, 4, "renormalise: with k=1 it makes every weight 1, so that the"),
        (
            {"name": "sparse_ot", "orientation": "expert", "renormalise": True},
            4,
            "renormalise: with about one expert per token it makes every weight 1",
        ),
        ({"name": "expert_choice", "capacity_factor": 9.0}, 4, "capacity_factor: 9 experts per token, but there are"),
        (
            {"name": "sparse_ot", "orientation": "expert", "capacity_factor": 9.0},
            4,
            "capacity_factor: 9 experts per token, but there are only 4",
        ),
        ({"name": "topk"}, 1, "k: 2 experts per token, but there are only 1; with k=1 set renormalise to false"),
    ],
)
def test_options_that_do_not_fit_are_refused_by_name(options: dict[str, Any], experts: int, message: str) -> None:
    with pytest.raises(ValueError, match=f"gate '{options['name']}' with {experts} experts: .*") as caught:
        build_gate(options, 8, experts)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("length", "message"),
    [
        (1.0, "1.0 is no share of the training run below 1; for a number of optimizer steps leave out the point"),
        (-1, "-1 optimizer steps are less than none"),
        ("long", "must be a whole number of optimizer steps, or a share of the training run below 1"),
        (True, "must be a whole number of optimizer steps, or a share of the training run below 1"),
    ],
)
def test_lengths_of_schedules_are_steps_or_a_share(length: Any, message: str) -> None:
    with pytest.raises(ValueError, match="search") as caught:
        build_gate({"name": "local_search", "search": length}, 8, 4)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "expert_choice", "thresholds_from": 20}, "thresholds_from: step 20 never comes, training takes 20"),
        (
            {"name": "comet", "entropy_warmup": 21},
            "entropy_warmup: the schedule ends after 21 steps, training after 20",
        ),
        ({"name": "local_search", "search": 21}, "search: the schedule ends after 21 steps"),
        (
            {"name": "local_search", "gate": {"name": "comet", "entropy_warmup": 30}},
            "gate.entropy_warmup: the schedule",
        ),
    ],
)
def test_schedules_past_the_end_of_training_are_named(options: dict[str, Any], message: str) -> None:
    problems = parse_gate_config(options).check_schedules(20)
    assert len(problems) == 1
    assert problems[0].startswith(message)
    assert parse_gate_config(options).check_schedules(100) == []


def test_a_short_run_still_searches() -> None:
    gate = build_gate({"name": "local_search", "search": 0.05}, 8, 4)
    gate.begin_step(0, 8)
    assert not bool(gate.get_buffer("frozen"))
    gate.begin_step(1, 8)
    assert bool(gate.get_buffer("frozen"))


def test_hash_without_ids_says_where_they_go() -> None:
    with pytest.raises(ValueError, match="gate 'hash' needs ids: pass ids_T"):
        MoELayer(8, 8, 4, "hash")(torch.randn(3, 8))


@pytest.mark.parametrize("content", [b"no tensor", b"", b"PK\x03\x04 broken"])
def test_files_that_are_no_tables_are_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "file.pt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"gate.table: cannot read .*file\.pt"):
        build_gate({"name": "hash", "table": str(path), "vocab_size": 4}, 8, 4)
    gate = build_gate({"name": "replay", "path": str(path)}, 8, 4)
    with pytest.raises(ValueError, match=r"gate.path: cannot read .*file\.pt"):
        gate(GateInput(torch.randn(3, 8), mode=Mode.TRAIN))


@pytest.mark.parametrize("content", [7, {"a": torch.ones(1)}, {"0.0.0.row_ptr_T1": torch.ones(1)}, [1, 2]])
def test_recordings_of_another_shape_are_named(tmp_path: Path, content: Any) -> None:
    path = tmp_path / "file.pt"
    torch.save(content, path)
    with pytest.raises(ValueError, match=r"gate.path: cannot read .*file\.pt"):
        build_gate({"name": "replay", "path": str(path)}, 8, 4)(GateInput(torch.randn(3, 8), mode=Mode.TRAIN))


def test_shares_of_an_unknown_length_say_what_to_do() -> None:
    for name, field in (("comet", "entropy_warmup"), ("dense_to_sparse", "decay"), ("local_search", "search")):
        with pytest.raises(
            ValueError, match=rf"{field} is 0\.\d+ of the training run: tell begin_step\(\) its total_steps"
        ):
            build_gate(name, 8, 4).begin_step(0)


def test_ties_go_to_the_lower_expert_under_a_limit() -> None:
    gate = build_gate({"name": "relu", "k": 1, "max_k": 2}, 4, 8)
    with torch.no_grad():
        gate.get_parameter("weight").fill_(1.0)
    assert gate(GateInput(torch.ones(3, 4))).plan.expert_N.tolist() == [0, 1] * 3
