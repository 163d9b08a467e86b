"""Cardinality-constrained optimal transport: a plan between tokens and experts with at most k entries a column.

Liu, Puigcerver and Blondel, "Sparsity-Constrained Optimal Transport", ICLR 2023 (arXiv:2209.15466, section 6.3), and
its router in V-MoE. Scores are softmax(logits) (or the logits), and the non-zeros of the plan are the pairs.

``orientation: token``   columns are tokens with at most k experts; the dual variable is one number an expert, whose
                         running mean serves generation: a token's plan by a frozen number needs no other token.
``orientation: expert``  columns are experts with at most C = capacity_factor * T / E tokens; tokens that no expert
                         would have chosen are covered (the paper's main use). Its dual variable is one number a token,
                         which no later token has. So generation routes by the experts' thresholds: a token visits the
                         expert whose threshold it clears best (or misses least, so that it is covered here too), and
                         those that come within a ``slack``, with which it would have been as many pairs in training.

The plan chooses; weights are softmax(logits) at the chosen pairs, as in the reference. ``weights: plan`` takes the
plan's entries instead, whose gradient is that of the transport problem on its support (both marginals held). ``preset:
reference`` is gamma=1, similarity=softmax, solver=adam (20 steps of 1e-2 from zeros). At k=1, and by experts where
E C = T (unless solver=adam is asked for), the plan is an assignment, solved exactly, with even loads.

Shape suffixes: T tokens, E experts, K experts per token, C tokens per expert, N pairs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from gates.base import GateInput
from gates.batch_choice import between
from gates.capacity import expert_capacity
from gates.plan import RoutingPlan
from gates.potentials import PotentialConfig, PotentialGate
from gates.registry import register_gate
from gates.scores import top_k
from gates.solvers.assignment import balanced_assignment
from gates.solvers.plan_gradient import row_weights, transport_weights
from gates.solvers.sparse_ot import Solver, solve_semi_dual
from gates.solvers.sparse_simplex import project_sparse_simplex

REFERENCE = {"gamma": 1.0, "similarity": "softmax", "solver": "adam", "iterations": 20, "learning_rate": 1e-2}


class SparseOTConfig(PotentialConfig):
    """Options of cardinality-constrained transport."""

    name: Literal["sparse_ot"] = "sparse_ot"
    preset: Literal["none", "reference"] = Field(
        "none",
        description="reference: gamma=1, similarity=softmax, solver=adam, 20 iterations of 1e-2, as V-MoE's router",
    )
    orientation: Literal["token", "expert"] = Field(
        "token", description="token: at most k experts a token; expert: at most C tokens an expert"
    )
    k: int = Field(2, ge=1, description="orientation=token: most experts per token")
    capacity_factor: float = Field(1.0, gt=0, description="orientation=expert: C = capacity_factor * T / E, rounded up")
    gamma: float = Field(
        0.1, gt=0, description="weight of the quadratic term; large spreads the plan, small sharpens it"
    )
    similarity: Literal["softmax", "logits"] = Field("softmax", description="what is transported for")
    solver: Solver = Field("lbfgs", description="of the semi-dual; newton needs orientation=token and k of 2 or more")
    iterations: int | None = Field(
        None, ge=1, description="of the solver, at most; null: 20, or 150 with orientation=expert, which needs them"
    )
    learning_rate: float = Field(1e-2, gt=0, description="of solver=adam")
    weights: Literal["softmax", "plan"] = Field(
        "softmax", description="softmax: of the logits, at the chosen pairs; plan: the plan's entries"
    )
    renormalise: bool = Field(False, description="divide the weights of a token by their sum")

    @model_validator(mode="before")
    @classmethod
    def _fill_preset(cls, values: Any) -> Any:
        if isinstance(values, Mapping) and values.get("preset") == "reference":
            return {**REFERENCE, **values}
        return values

    def experts_per_token(self, num_experts: int) -> float:
        """k, or the capacity factor."""
        return min(float(num_experts), float(self.k) if self.orientation == "token" else self.capacity_factor)

    def check(self, num_experts: int) -> list[str]:
        """See :meth:`GateConfig.check`."""
        token = self.orientation == "token"
        no_gradient = "makes every weight 1, so that the task does not train the gate"
        rules = [
            (
                "capacity_factor",
                not token and self.capacity_factor > num_experts,
                f"{self.capacity_factor:g} experts per token, but there are only {num_experts}",
            ),
            (
                "renormalise",
                not token and self.capacity_factor <= 1 and self.renormalise,
                f"with about one expert per token it {no_gradient}",
            ),
            ("k", token and self.k > num_experts, f"{self.k} experts per token, but there are only {num_experts}"),
            ("k", not token and self.k != 2, "has no effect with orientation=expert; set capacity_factor"),
            ("capacity_factor", token and self.capacity_factor != 1, "has no effect with orientation=token; set k"),
            (
                "solver",
                self.solver == "newton" and not (token and self.k > 1),
                "newton needs orientation=token, k >= 2",
            ),
            ("renormalise", token and self.k == 1 and self.renormalise, f"with k=1 it {no_gradient}"),
            (
                "weights",
                not token and self.weights == "plan",
                "plan needs orientation=token, or no token could be served",
            ),
            ("weights", token and self.k == 1 and self.weights == "plan", f"with k=1 plan {no_gradient}"),
            ("renormalise", self.weights == "plan" and self.renormalise, "the plan's entries add up already"),
        ]
        return [f"{field}: {message}" for field, wrong, message in rules if wrong]


@register_gate("sparse_ot")
class SparseOTGate(PotentialGate):
    """A linear gate whose pairs are the non-zeros of a transport plan. See the module.

    With orientation=expert the buffer ``potential`` holds minus the experts' thresholds, and the slack after them.
    """

    config_type = SparseOTConfig
    config: SparseOTConfig

    def __init__(self, config: SparseOTConfig, dim: int, num_experts: int) -> None:
        super().__init__(config, dim, num_experts)
        renormalised = config.renormalise and config.orientation == "token"
        self.weight_sum = "one" if renormalised else "at_most_one" if config.weights == "softmax" else "free"

    @property
    def num_potentials(self) -> int:
        """E, and the slack with orientation=expert."""
        return self.num_experts + (self.config.orientation == "expert")

    @property
    def max_k(self) -> int | None:
        return self.config.k if self.config.orientation == "token" else None

    def choose_batch(self, logits_TE: Tensor) -> tuple[RoutingPlan, Tensor]:
        """See :class:`PotentialGate`."""
        similar_TE = self._similarity(logits_TE)
        num_tokens, num_experts = similar_TE.shape
        config = self.config
        if config.orientation == "expert":
            return self._choose_by_expert(similar_TE)
        if config.k == 1:
            capacity_E = torch.full((num_experts,), num_tokens // num_experts)
            favoured_E = torch.argsort(-similar_TE.mean(0), stable=True)[: num_tokens % num_experts]
            capacity_E[favoured_E.cpu()] += 1
            expert_T, alpha_E = balanced_assignment(similar_TE, capacity_E)
            plan = RoutingPlan.from_topk(expert_T.unsqueeze(1), similar_TE, num_experts)
            return plan, alpha_E.to(similar_TE.dtype)
        solved = solve_semi_dual(
            similar_TE,
            config.k,
            config.gamma,
            row_mass=num_tokens / num_experts,
            column_mass=1.0,
            solver=config.solver,
            iterations=config.iterations or 20,
            learning_rate=config.learning_rate,
        )
        alpha_E = solved.alpha_N - solved.alpha_N.mean()
        return self.choose_frozen(logits_TE, alpha_E), alpha_E

    def _choose_by_expert(self, similar_TE: Tensor) -> tuple[RoutingPlan, Tensor]:
        num_tokens, num_experts = similar_TE.shape
        config = self.config
        capacity = min(num_tokens, expert_capacity(num_tokens, 1, num_experts, config.capacity_factor))
        if (
            capacity * num_experts == num_tokens and config.solver != "adam"
        ):  # room for exactly one expert a token: an assignment, solved exactly
            expert_T, bonus_E = balanced_assignment(similar_TE, torch.full((num_experts,), capacity))
            plan = RoutingPlan.from_topk(expert_T.unsqueeze(1), similar_TE, num_experts)
            return plan, torch.cat([bonus_E, bonus_E.new_zeros(1)]).to(similar_TE.dtype)
        solved = solve_semi_dual(
            similar_TE.t().contiguous(),
            capacity,
            config.gamma,
            row_mass=1.0,
            column_mass=num_tokens / num_experts,
            solver=config.solver,
            iterations=config.iterations or 150,
            learning_rate=config.learning_rate,
        )
        plan_TE = solved.columns.dense(num_tokens).t()
        plan = RoutingPlan.from_mask(plan_TE > 0, plan_TE)
        # A column takes what is above its threshold, tokens' potentials included.
        load_E = plan.load_E.clamp(1, num_tokens)
        ranked_TE = (similar_TE + solved.alpha_N.unsqueeze(1)).sort(0, descending=True).values
        last_E = ranked_TE.gather(0, (load_E - 1).unsqueeze(0)).squeeze(0)
        next_E = ranked_TE.gather(0, load_E.clamp_max(num_tokens - 1).unsqueeze(0)).squeeze(0)
        threshold_E = between(last_E, next_E)
        threshold_E = threshold_E - threshold_E.mean()
        behind_TE = _behind_best(similar_TE - threshold_E)
        pairs = plan.num_pairs
        slack = behind_TE.flatten().kthvalue(pairs).values if pairs > num_tokens else threshold_E.new_zeros(())
        return plan, torch.cat([-threshold_E, slack.unsqueeze(0)])

    def choose_frozen(self, logits_TE: Tensor, potential_E: Tensor) -> RoutingPlan:
        """Each token's own projection of potential + score; orientation=expert: by thresholds, see the module."""
        config, similar_TE = self.config, self._similarity(logits_TE)
        if config.orientation == "expert" and not int(self.potential_steps):  # no thresholds yet
            wanted = max(1, round(config.experts_per_token(self.num_experts)))
            return RoutingPlan.from_topk(top_k(similar_TE, wanted), similar_TE, self.num_experts)
        if config.orientation == "expert":
            threshold_E, slack = -potential_E[:-1], potential_E[-1]
            return RoutingPlan.from_mask(_behind_best(similar_TE - threshold_E) <= slack, similar_TE)
        rows = project_sparse_simplex((similar_TE + potential_E) / config.gamma, config.k)
        mask_TE = torch.zeros_like(similar_TE, dtype=torch.bool).scatter_(1, rows.index_BK, rows.value_BK > 0)
        return RoutingPlan.from_mask(mask_TE, similar_TE)

    def weigh(self, logits_TE: Tensor, chosen: RoutingPlan, inp: GateInput) -> RoutingPlan:
        """See the option ``weights``."""
        config = self.config
        if config.weights == "plan" and self._frozen:
            return chosen.with_weight(row_weights(self._similarity(logits_TE) + self.potential, chosen, config.gamma))
        if config.weights == "plan":
            return chosen.with_weight(transport_weights(self._similarity(logits_TE), chosen, config.gamma))
        if config.renormalise:
            return chosen.with_weight(chosen.softmax_rows(chosen.pick(logits_TE)))
        return chosen.with_weight(chosen.pick(logits_TE.softmax(-1)))

    def metrics(self, logits_TE: Tensor, plan: RoutingPlan, inp: GateInput) -> dict[str, Tensor]:
        """Share of tokens without an expert."""
        return {"uncovered_frac": (plan.row_ptr_T1.diff() == 0).sum() / max(1, plan.num_tokens)}

    def _similarity(self, logits_TE: Tensor) -> Tensor:
        return logits_TE.softmax(-1) if self.config.similarity == "softmax" else logits_TE


def _behind_best(score_TE: Tensor) -> Tensor:
    """(T, E) how far each entry is below the best of its row."""
    return score_TE.amax(-1, keepdim=True) - score_TE
