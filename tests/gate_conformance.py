"""What the conformance suite routes: every registered gate, the options to try it with, and the tokens it gets.

A new gate is covered with its defaults as soon as it is registered; add a row to ``CONFIGS`` to try other options.
"""

from __future__ import annotations

import itertools
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gates import Gate, GateConfig, GateInput, Mode, RoutingPlan, build_gate, gate_names, parse_gate_config

DIM = 12
EXPERT_COUNTS = (2, 3, 5, 6, 8, 16)
TOKEN_COUNTS = (0, 1, 2, 17, 256)
ALL_LOSSES = {"balance_coef": 1.0, "z_coef": 1.0, "importance_coef": 1.0, "load_coef": 1.0}

# One name for all processes of a run, which must collect the same tests.
RECORDING = Path(tempfile.gettempdir()) / f"moeyard-recorded-routing-{os.getuid()}.pt"
_own = RECORDING.with_suffix(f".{os.getpid()}")
torch.save({"0.0.0.row_ptr_T1": torch.tensor([0, 1, 3, 4]), "0.0.0.expert_N": torch.tensor([1, 0, 1, 0])}, _own)
_own.replace(RECORDING)

CONFIGS: dict[str, list[dict[str, Any]]] = {
    "topk": [
        {},
        {"k": 1, "renormalise": False, "jitter": 0.1, "capacity_factor": 1.0, "balance_scope": "micro_batch"},
        {"order": "topk_then_score", "renormalise": False, "balance_scope": "global", "z_coef": 1e-3},
        {"score": "sigmoid", "renormalise": False, "scale": 1.5},
        {"score": "sqrt_softplus", "balance": "frozen"},
        {"score": "sigmoid", "balance": "bias", "bias_update_rate": 0.1, "num_groups": 2, "scale": 2.5},
        {"renormalise": False, "num_groups": 3, "topk_groups": 2, "group_top": 1, "scale": 0.5},
        {"noise": "learned", **ALL_LOSSES},
        {"noise": "fixed", "renormalise": False, **ALL_LOSSES},
        {"noise": "second_choice", "capacity_factor": 1.0, "drop_policy": "choice", "renormalise_kept": True},
        {"noise": "learned", "jitter": 0.2, "capacity_factor": 0.7, "drop_policy": "probs", "min_capacity": 2},
        {"renormalise": False, "capacity_factor": 0.5, "drop_policy": "probs"},
        {"score": "sigmoid", "capacity_factor": 0.8, "drop_policy": "random"},
        {"k": 6, "score": "sigmoid", "balance": "bias"},
        {"balance": "quantile"},
    ],
    "comet": [{}, {"k": 1, "gamma": 0.01}, {"k": 3, "gamma": 10.0, "normalise": False, "entropy_warmup": 2}],
    "deepseek_v3": [
        {},
        {"num_groups": 2, "topk_groups": 1, "k": 1, "renormalise": False},
        {"num_groups": 1, "topk_groups": 1},
    ],
    "dense_to_sparse": [
        {"decay": 4, "harden": 100},
        {"decay": 2, "harden": 1, "noise": False, "decay_shape": "linear"},
        {"k": 1, "renormalise": False, "activation": "sigmoid", "threshold": 0.2, "harden": 4},
        {"activation": "tanh", "temperature_end": 2.0},
        {"activation": "gelu"},
    ],
    "dselect_k": [{}, {"k": 1, "gamma": 0.01}, {"per_token": False}, {"normalise": False, "gamma": 5.0}],
    "expert_choice": [{}, {"capacity_factor": 1.0, "max_k": 1}, {"thresholds_from": 2, "cover": True}],
    "feature_choice": [{}, {"alpha": 0.0, "affinity": "softmax"}, {"affinity": "relu", "max_k": 2}],
    "forced": [{}, {"imbalance": 1.5, "drift": 0.5}, {"k": 1, "imbalance": 2.0, "seed": 3}],
    "gshard": [{}, {"k": 1, "noise": "none", "renormalise": False, "renormalise_kept": False}],
    "hash": [{}, {"k": 2, "seed": 5}],
    "local_search": [
        {"search": 2},
        {"search": 100, "gate": {"name": "comet"}, "noise": 0.1},
        {"search": 4, "gate": {"name": "topk", "balance": "bias"}, "preset": "paper"},
        {"search": 1, "gate": {"name": "zero_computation"}},
        {"search": 2, "gate": {"name": "comet", "k": 1}},
        {"search": 1, "gate": {"name": "expert_choice"}},
    ],
    "mutual_choice": [{}, {"affinity": "relu", "load_cap": None, "mean_k": 1.5}, {"load_cap": 1.0}],
    "noisy_topk": [{}, {"load_coef": 0.0}],
    "relu": [{}, {"k": 1, "max_k": 2, "l1_start": 1.0, "bias": False}],
    "replay": [{"path": str(RECORDING), "strict": False}],
    "sinkhorn": [{}, {"k": 2, "renormalise": True}, {"k": 2, "temperature": 0.1}],
    "soft": [{}, {"slots": 3}],
    "sparse_ot": [
        {},
        {"k": 1},
        {"solver": "newton", "similarity": "logits", "weights": "plan", "iterations": 5},
        {"preset": "reference", "renormalise": True},
        {"orientation": "expert", "gamma": 1.0, "iterations": 10},
        {"orientation": "expert", "capacity_factor": 1.5, "gamma": 0.01, "iterations": 10},
    ],
    "top_p": [{}, {"mean_k": 2.0, "max_k": None, "renormalise": False}],
    "zero_computation": [{}, {"k": 3, "zero_experts": 0, "copy_experts": 2, "constant_experts": 0, "residual": False}],
}


@dataclass(frozen=True)
class Case:
    """One gate with one set of options."""

    name: str
    options: Mapping[str, Any]

    @property
    def id(self) -> str:
        shown = ",".join(f"{key}={value}" for key, value in self.options.items() if not key.endswith("_coef"))
        return f"{self.name}[{shown or 'defaults'}]"

    @property
    def config(self) -> GateConfig:
        return parse_gate_config({"name": self.name, **self.options})

    @property
    def expert_counts(self) -> list[int]:
        """The E of the suite that these options allow."""
        return [count for count in EXPERT_COUNTS if not self.config.check(count)]

    @property
    def few_experts(self) -> int:
        """The smallest E above 3, for tests whose cost grows with E."""
        return next(count for count in self.expert_counts if count > 3)

    @property
    def equivariant(self) -> bool:
        # A solver that is cut short follows rounding where optima are many.
        return self.gate().interchangeable_experts and "iterations" not in self.options

    def with_one_expert(self) -> list[Case]:
        """These options, and what would make them fit a single expert."""
        fields = type(self.config).model_fields
        more = [{"k": 1}, {"k": 1, "renormalise": False}, {"mean_k": 1.0}, {"capacity_factor": 1.0}]
        changes = [{}, *(change for change in more if change.keys() <= fields.keys())]
        return [Case(self.name, {**self.options, **change}) for change in changes]

    def gate(self, num_experts: int | None = None, seed: int = 0, *, double: bool = False) -> Gate:
        """A gate whose parameters are far from their initial values, so that tokens differ in what they choose."""
        count = self.expert_counts[-1] if num_experts is None else num_experts
        gate = build_gate(self.config, DIM, count)
        if double:
            gate = gate.double()
        rng = torch.Generator().manual_seed(seed)
        gate.reset_parameters(rng)
        with torch.no_grad():
            for param in gate.parameters():
                param.add_(torch.randn(param.shape, generator=rng).to(param.dtype), alpha=0.5)
        return gate


def cases() -> list[Case]:
    """Every registered gate with every set of options to try."""
    return [Case(name, options) for name in gate_names() for options in CONFIGS.get(name, [{}])]


def tokens(
    num_tokens: int,
    num_experts: int,
    *,
    mode: Mode = Mode.EVAL,
    seed: int = 0,
    noise_seed: int | None = None,
    valid_T: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> GateInput:
    """Tokens of sequences of five, with everything that a gate may need.

    Args:
        noise_seed: seed of the gate's generator; None: no generator.
    """
    rng = torch.Generator().manual_seed(seed)
    index_T = torch.arange(num_tokens)
    return GateInput(
        x_TD=torch.randn(num_tokens, DIM, generator=rng).to(dtype),
        ids_T=torch.randint(1000, (num_tokens,), generator=rng),
        valid_T=valid_T,
        segment_T=index_T // 5,
        position_T=index_T % 5,
        prev_logits_TE=torch.randn(num_tokens, num_experts, generator=rng).to(dtype),
        mode=mode,
        rng=None if noise_seed is None else torch.Generator().manual_seed(noise_seed),
    )


def take(inp: GateInput, index_T: Tensor, **changes: Any) -> GateInput:
    """The tokens ``index_T`` (int64 positions) of ``inp``, in that order."""
    per_token = ("x_TD", "ids_T", "valid_T", "segment_T", "position_T", "prev_logits_TE")
    picked = {name: getattr(inp, name)[index_T] for name in per_token if getattr(inp, name) is not None}
    return replace(inp, **{**picked, **changes})


def live(gate: Gate, steps: range) -> None:
    """Take the gate through optimizer steps with a load that grows from the first expert to the last."""
    for step in steps:
        gate.begin_step(step, total_steps=10)
        out = gate(tokens(32, gate.num_logits, mode=Mode.TRAIN, seed=step, noise_seed=step))
        gate.end_step(torch.arange(gate.num_experts) * (step + 1), out.signals)


def rows(plan: RoutingPlan) -> list[dict[int, float]]:
    """Weight by expert of each token; with slots also the token's part in each, numbered from E on."""
    pairs = list(zip(plan.expert_N.tolist(), plan.weight_N.tolist(), strict=True))
    edges = plan.row_ptr_T1.tolist()
    found = [dict(pairs[begin:end]) for begin, end in itertools.pairwise(edges)]
    if plan.slots is not None:
        for row, parts in zip(found, plan.slots.dispatch_TS.tolist(), strict=True):
            row.update(enumerate(parts, plan.num_experts))
    return found


def assert_same_rows(got: list[dict[int, float]], expected: list[dict[int, float]], what: str) -> None:
    """The same experts in every row, with weights that differ by rounding at most."""
    assert len(got) == len(expected)
    for t, (row, other) in enumerate(zip(got, expected, strict=True)):
        # Where weights end at 0 rounding decides whether a pair of next to no weight exists.
        both = row.keys() & other.keys()
        row, other = ({e: w for e, w in pairs.items() if w > 1e-6 or e in both} for pairs in (row, other))
        assert row.keys() == other.keys(), f"{what}: row {t} visits {sorted(row)} instead of {sorted(other)}"
        assert row == pytest.approx(other, rel=1e-5, abs=1e-5), f"{what}: weights of row {t}"


def assert_legal(plan: RoutingPlan, gate: Gate, inp: GateInput) -> None:
    """Every invariant of a plan, counted anew with plain Python."""
    num_tokens, num_experts = inp.x_TD.shape[0], gate.num_experts
    assert plan.num_experts == num_experts
    for index in (plan.row_ptr_T1, plan.expert_N, plan.load_E, plan.offered_E):
        assert index.dtype == torch.int64
    both_double = inp.x_TD.dtype == torch.float64 and all(p.dtype == torch.float64 for p in gate.parameters())
    assert plan.weight_N.dtype == (torch.float64 if both_double else torch.float32)
    edges = plan.row_ptr_T1.tolist()
    assert len(edges) == num_tokens + 1
    assert edges[0] == 0
    assert edges[-1] == plan.num_pairs == plan.expert_N.numel() == plan.weight_N.numel()
    experts, weights = plan.expert_N.tolist(), plan.weight_N.tolist()
    assert all(0 <= e < num_experts for e in experts)
    assert all(w >= 0 and w < float("inf") for w in weights)
    valid = [True] * num_tokens if inp.valid_T is None else inp.valid_T.tolist()
    for t, (begin, end) in enumerate(itertools.pairwise(edges)):
        assert begin <= end
        row = experts[begin:end]
        assert len(set(row)) == len(row), f"token {t} visits an expert twice: {row}"
        assert gate.max_k is None or len(row) <= gate.max_k
        total = sum(weights[begin:end])
        if not valid[t]:
            assert row == [], f"padding token {t} is routed"
        elif gate.weight_sum == "one":
            assert abs(total - 1) < 1e-5
        elif gate.weight_sum == "at_most_one":
            assert total < 1 + 1e-5
    assert plan.load_E.tolist() == [experts.count(e) for e in range(num_experts)]
    assert bool((plan.offered_E >= plan.load_E).all())
    if plan.uniform_k is not None:
        assert edges == [plan.uniform_k * t for t in range(num_tokens + 1)]
    if plan.before_drop is None:
        assert plan.offered_E.tolist() == plan.load_E.tolist()
    else:
        assert plan.kept_M is not None
        assert plan.before_drop.load_E.tolist() == plan.offered_E.tolist()
        assert plan.before_drop.expert_N[plan.kept_M].tolist() == experts
