"""Local search: any gate, and a permutation of experts that is learned for a while and then frozen.

Ibrahim et al., "COMET" (KDD 2023, arXiv:2306.02824, section 3.3): the weights g of a gate become P^T g with one
permutation P for all tokens, an escape from a bad early match of gate and experts. P is relaxed to the doubly
stochastic matrix of (A + noise) / tau with a learned matrix A, tau falling over ``search``; then the best permutation
(Hungarian) is taken and kept. While the search lasts a token visits every expert; afterwards the plan's indices are
relabelled, which costs nothing. For a gate whose experts start alike and untrained, relabelling changes nothing: this
is for experts that have specialised, were trained before, or differ in kind.

``solver: newton`` finds that matrix exactly and differentiates it implicitly, at a fraction of the cost of
``sinkhorn``, whose iterations (``sinkhorn_start`` rising to ``sinkhorn_end``) autograd records. ``preset: paper`` is
the latter with tau from 1e-3 to 1e-7, at which the relaxation is a vertex from the first step and the search hops; the
default starts at 0.1, which is smooth.

Shape suffixes: T tokens, E experts.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from gates.base import (
    Causality,
    Gate,
    GateConfig,
    GateInput,
    GateNumericsError,
    GateOutput,
    Mode,
    Steps,
    schedule_steps,
)
from gates.linear import draw_like, draw_uniform_
from gates.metrics import plan_metrics
from gates.plan import RoutingPlan, apply_permutation
from gates.registry import GateField, gate_type, register_gate
from gates.solvers.assignment import hungarian
from gates.solvers.relaxed_permutation import relaxed_permutation
from gates.topk import TopKConfig

COLDEST_NEWTON = 1e-4
_INNER_LOAD = "local_search.inner_load"
PAPER = {"solver": "sinkhorn", "tau_start": 1e-3, "tau_end": 1e-7}


class LocalSearchConfig(GateConfig):
    """Options of local search."""

    name: Literal["local_search"] = "local_search"
    gate: GateField = Field(TopKConfig(), description="the gate whose experts are permuted: {name: ..., options}")
    preset: Literal["default", "paper"] = Field("default", description="paper: Sinkhorn, tau from 1e-3 to 1e-7")
    search: Steps = Field(
        0.05, description="how long the permutation is learned: steps, or below 1 a share of training"
    )
    tau_start: float = Field(0.1, gt=0, description="temperature of the relaxed permutation in the first step")
    tau_end: float = Field(1e-3, gt=0, description="temperature at the end of the search")
    solver: Literal["newton", "sinkhorn"] = Field(
        "newton", description="of the relaxed permutation; newton: exact, for temperatures from some 1e-4 up"
    )
    sinkhorn_start: int = Field(20, ge=1, description="solver=sinkhorn: iterations in the first step")
    sinkhorn_end: int = Field(150, ge=1, description="solver=sinkhorn: iterations at the end of the search")
    noise: float = Field(0.0, ge=0, description="factor of Gumbel noise on A while searching")
    max_experts: int = Field(64, ge=1, description="refuse more experts: all of them are computed while searching")
    permutation_coef: float = Field(1e-4, ge=0, description="weight of the entropy of the relaxed permutation")

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        if values.get("preset") == "paper":
            values = {**PAPER, **values}
        if isinstance(values.get("gate"), Mapping) and "name" not in values["gate"]:
            values = {**values, "gate": {"name": TopKConfig().name, **values["gate"]}}
        return values

    def aux_coefs(self) -> dict[str, float]:
        """Those of the gate within, and that of the permutation."""
        return {**self.gate.aux_coefs(), "permutation": self.permutation_coef}

    def num_params(self, dim: int, num_experts: int) -> int:
        """Those of the gate within, and A."""
        return self.gate.num_params(dim, num_experts) + num_experts**2

    def experts_per_token(self, num_experts: int) -> float:
        """That of the gate within, after the search."""
        return self.gate.experts_per_token(num_experts)

    def reduces_in_forward(self) -> bool:
        """Whether the gate within does."""
        return self.gate.reduces_in_forward()

    def num_ids(self) -> int | None:
        """Those of the gate within."""
        return self.gate.num_ids()

    def files(self) -> dict[str, str]:
        """Those of the gate within."""
        return {f"gate.{field}": path for field, path in self.gate.files().items()}

    def check(self, num_experts: int) -> list[str]:
        """See :meth:`GateConfig.check`."""
        problems = [f"gate.{problem}" for problem in self.gate.check(num_experts)]
        if num_experts > self.max_experts:
            problems.append(
                f"max_experts: {num_experts} experts would all be computed while searching; raise it if that is meant"
            )
        if self.tau_end > self.tau_start:
            problems.append(f"tau_end: {self.tau_end:g} is above tau_start {self.tau_start:g}")
        if self.solver == "newton" and self.tau_end < COLDEST_NEWTON:
            problems.append(
                f"tau_end: {self.tau_end:g} is below {COLDEST_NEWTON:g}, where newton takes too many steps; set"
                " solver=sinkhorn"
            )
        if not self.gate.chooses_experts():
            problems.append(f"gate: {self.gate.name!r} sends mixtures of tokens to experts, and nothing to permute")
        problems += [
            f"{field}: has no effect with solver=newton"
            for field in ("sinkhorn_start", "sinkhorn_end")
            if self.solver == "newton" and getattr(self, field) != type(self).model_fields[field].default
        ]
        return problems

    def check_schedules(self, total_steps: int) -> list[str]:
        """See :meth:`GateConfig.check_schedules`."""
        return super().check_schedules(total_steps) + [f"gate.{p}" for p in self.gate.check_schedules(total_steps)]


@register_gate("local_search")
class LocalSearchGate(Gate):
    """A gate behind a permutation. See the module. ``expert_of_E`` is where e goes once ``frozen``."""

    config_type = LocalSearchConfig
    config: LocalSearchConfig
    interchangeable_experts = False
    tau: Tensor
    iterations: Tensor
    frozen: Tensor
    expert_of_E: Tensor

    def __init__(self, config: LocalSearchConfig, dim: int, num_experts: int) -> None:
        super().__init__(config, dim, num_experts)
        self.inner = gate_type(config.gate.name)(config.gate, dim, num_experts)
        self.needs, self.causality, self.weight_sum = self.inner.needs, self.inner.causality, self.inner.weight_sum
        self.score_EE = nn.Parameter(torch.empty(num_experts, num_experts))
        self.register_buffer("tau", torch.tensor(config.tau_start, dtype=torch.float32))
        self.register_buffer("iterations", torch.tensor(config.sinkhorn_start))
        self.register_buffer("frozen", torch.tensor(False))
        self.register_buffer("expert_of_E", torch.arange(num_experts))
        draw_uniform_(self.score_EE, 0.05, None)

    @property
    def num_logits(self) -> int:
        return self.inner.num_logits

    @property
    def trains_as_it_serves(self) -> bool:
        """Once the search is over, if the gate within does."""
        return bool(self.frozen) and self.inner.trains_as_it_serves

    @property
    def max_k(self) -> int | None:
        return self.inner.max_k if bool(self.frozen) else None

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """The gate within, and A from U(-0.05, 0.05)."""
        self.inner.reset_parameters(generator)
        draw_uniform_(self.score_EE, 0.05, generator)

    def begin_step(self, step: int, total_steps: int | None = None) -> None:
        """See :meth:`Gate.begin_step`. At the end of the search the permutation is taken from A, once."""
        self.inner.begin_step(step, total_steps)
        config = self.config
        length = schedule_steps(config.search, total_steps, "search")
        if step >= length:
            if not bool(self.frozen):
                self.expert_of_E.copy_(hungarian(whole(self.score_EE)))
                self.frozen.fill_(True)
            return
        done = step / max(1, length - 1)
        log_tau = math.log(config.tau_start) + done * (math.log(config.tau_end) - math.log(config.tau_start))
        self.tau.fill_(math.exp(log_tau))
        self.iterations.fill_(round(config.sinkhorn_start + done * (config.sinkhorn_end - config.sinkhorn_start)))

    def end_step(self, load_E: Tensor, signals: Mapping[str, Tensor]) -> None:
        """Hand the loads to the gate within, under its own labels. See :meth:`Gate.end_step`."""
        if bool(self.frozen):
            load_E = load_E[self.expert_of_E.to(load_E.device)]
        elif _INNER_LOAD in signals:  # while searching every expert sees every token, which says nothing
            load_E = signals[_INNER_LOAD].round().to(load_E)
        self.inner.end_step(load_E, {name: value for name, value in signals.items() if name != _INNER_LOAD})

    def nearest_permutation(self) -> Tensor:
        """(E,) where each expert of the gate within goes: what the search would be frozen to now.

        Of A, which has the same best match as the logarithm of the relaxed permutation. Entries of that itself are
        exact zeros where it is cold, and no match is better than another then.
        """
        return hungarian(self.score_EE)

    def route(self, inp: GateInput) -> GateOutput:
        """See :meth:`Gate.route`."""
        if not bool(torch.isfinite(self.score_EE.detach().sum())):
            raise GateNumericsError(f"gate {self.config.name!r}: the permutation's scores are NaN or infinite")
        try:
            return self._route(inp)
        except GateNumericsError as error:
            within = f"gate {self.config.gate.name!r}"
            raise GateNumericsError(str(error).replace(within, f"gate {self.config.name!r}", 1)) from error

    def _route(self, inp: GateInput) -> GateOutput:
        if inp.mode is Mode.TRAIN and not bool(self.frozen):
            return self._search(inp)
        expert_of_E = self.expert_of_E if bool(self.frozen) else self.nearest_permutation()
        back_E = torch.argsort(expert_of_E)
        replay = None if inp.replay is None else apply_permutation(inp.replay, back_E)
        # Scores stay under the labels of the gate within: the next layer's gate has learned to read them that way.
        out = self.inner.route(replace(inp, replay=replay))
        return replace(out, plan=apply_permutation(out.plan, expert_of_E))

    def _search(self, inp: GateInput) -> GateOutput:
        """All experts, weighted by the relaxed permutation of the gate's weights."""
        # The gate within chooses again in a replay: the plan is dense and does not say what it chose.
        out = self.inner.route(replace(inp, replay=None))
        dtype = out.plan.weight_N.dtype
        noise_EE = self.config.noise * draw_like(self.score_EE, inp, "gumbel") if self.config.noise else 0.0
        p_EE = self._relaxed((self.score_EE + noise_EE).to(dtype))
        weight_TE = out.plan.dense_weight_TE() @ p_EE
        everyone = torch.ones_like(weight_TE, dtype=torch.bool)
        plan = RoutingPlan.from_mask(everyone, weight_TE)
        if inp.replay is not None:
            plan = inp.replay.with_weight(inp.replay.pick(weight_TE))
        plan = replace(plan, undispatched=out.plan.undispatched, residual_T=out.plan.residual_T)
        aux, metrics = dict(out.aux), {**out.metrics, **plan_metrics(plan)}
        if self.config.permutation_coef:
            # Rows add up to 1; the second entropy is that of columns.
            column_EE = p_EE / p_EE.sum(0, keepdim=True).clamp_min(torch.finfo(dtype).tiny)
            aux["permutation"] = _entropy(p_EE) + _entropy(column_EE)
        metrics["permutation_entropy"] = (_entropy(p_EE) / self.num_experts).detach()
        signals = {**out.signals, _INNER_LOAD: out.plan.offered_E.double()}
        return replace(out, plan=plan, aux=aux, metrics=metrics, signals=signals)

    def _relaxed(self, score_EE: Tensor) -> Tensor:
        """(E, E) permutation of most score, softened by the present temperature; rows add up to 1, columns nearly."""
        if self.config.solver == "newton":
            return relaxed_permutation(score_EE, float(self.tau))
        log_EE = score_EE / self.tau.to(score_EE.dtype)
        for _ in range(int(self.iterations)):
            log_EE = log_EE - log_EE.logsumexp(0, keepdim=True)
            log_EE = log_EE - log_EE.logsumexp(1, keepdim=True)
        return log_EE.exp()

    def causal_surrogate(self) -> Gate | None:
        """That of the gate within, behind the same permutation; shares parameters and buffers."""
        if self.causality is not Causality.BATCH:
            return self
        inner = self.inner.causal_surrogate()
        if inner is None:
            return None
        surrogate = copy.copy(self)
        surrogate._modules = {**self._modules, "inner": inner}
        surrogate.causality = inner.causality
        return surrogate


def whole(parameter: Tensor) -> Tensor:
    """All of a parameter of which each rank may keep a slice (FSDP); all ranks must ask together."""
    gather = getattr(parameter, "full_tensor", None)
    full: Tensor = parameter.detach() if gather is None else gather().detach()
    return full


def _entropy(p_EE: Tensor) -> Tensor:
    entropy: Tensor = -torch.special.xlogy(p_EE, p_EE.clamp_min(torch.finfo(p_EE.dtype).tiny)).sum()
    return entropy
