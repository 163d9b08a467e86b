"""What gates have in common whose pairs are chosen among all tokens of the batch, and by thresholds one by one.

Experts (or the whole batch) pick the best scores, so that a token's routing depends on its neighbours, later ones
included. To generate text, and to train without looking ahead, the scores that were just good enough are averaged over
steps, and a pair is chosen when its score passes (BatchTopK's inference rule; Expert Threshold routing,
arXiv:2603.11535).

Shape suffixes: T tokens, E experts.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Mapping

import torch
from pydantic import Field
from torch import Tensor

from gates.base import Causality, GateInput, Mode
from gates.linear import LinearGate, LinearGateConfig
from gates.plan import RoutingPlan
from gates.scores import top_k


class BatchChoiceConfig(LinearGateConfig):
    """Options of every gate whose experts choose."""

    max_k: int | None = Field(None, ge=1, description="most experts of one token, the best ones; null: no limit")
    threshold_decay: float = Field(
        0.95, ge=0, lt=1, description="decay per step of the running mean of thresholds that generation routes by"
    )
    thresholds_from: int | None = Field(
        None,
        ge=1,
        description="optimizer step from which training and evaluation route by thresholds as well; null: never",
    )
    cover: bool = Field(
        False, description="when routing by thresholds, a token that passes none visits its best expert"
    )

    def check(self, num_experts: int) -> list[str]:
        """See :meth:`GateConfig.check`."""
        if self.max_k is not None and self.max_k > num_experts:
            return [f"max_k: {self.max_k} experts for a token, but there are only {num_experts}"]
        return []

    def check_schedules(self, total_steps: int) -> list[str]:
        """See :meth:`GateConfig.check_schedules`."""
        problems = super().check_schedules(total_steps)
        if self.thresholds_from is not None and self.thresholds_from >= total_steps:
            problems.append(
                f"thresholds_from: step {self.thresholds_from} never comes, training takes {total_steps}; give an"
                " earlier one, or null for never"
            )
        return problems


class BatchChoiceGate(LinearGate):
    """A subclass writes :meth:`scores` and :meth:`pick_batch`; thresholds and what serves them are here."""

    causality = Causality.BATCH
    has_signals = True
    config: BatchChoiceConfig
    threshold: Tensor
    threshold_steps: Tensor
    step: Tensor

    def __init__(self, config: BatchChoiceConfig, dim: int, num_experts: int) -> None:
        super().__init__(config, dim, num_experts)
        self.register_buffer("threshold", torch.zeros(num_experts, dtype=torch.float32))
        self.register_buffer("threshold_steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        self._by_threshold = False

    @property
    def max_k(self) -> int | None:
        return self.config.max_k

    @abstractmethod
    def scores(self, logits_TE: Tensor) -> Tensor:
        """(T, E) non-negative scores, differentiable: what is compared, and the weights."""

    @abstractmethod
    def pick_batch(self, score_TE: Tensor) -> tuple[Tensor, Tensor]:
        """(T, E) bool, which pairs are chosen among all of T >= 1 tokens; (E,) score that a pair had to pass."""

    def choose(self, logits_TE: Tensor, inp: GateInput) -> tuple[RoutingPlan, dict[str, Tensor]]:
        """See :meth:`LinearGate.choose`."""
        score_TE = self.scores(logits_TE)
        limit = self.config.max_k
        signals: dict[str, Tensor] = {}
        started = self.config.thresholds_from is not None and int(self.step) >= self.config.thresholds_from
        num_tokens = score_TE.shape[0]
        mask_TE, threshold_E = score_TE > self.threshold, self.threshold
        if not self._by_threshold and not started and num_tokens:
            mask_TE, threshold_E = self.pick_batch(score_TE)
        elif not int(self.threshold_steps):  # before the first step: so many as are wanted on average
            k = max(1, round(self.config.experts_per_token(self.num_experts)))
            mask_TE = torch.zeros_like(mask_TE).scatter_(1, top_k(score_TE, k), True)
        elif self.config.cover and num_tokens:
            mask_TE.scatter_(1, top_k(score_TE, 1), True)
        if inp.mode is Mode.TRAIN and not self._by_threshold:
            if started and num_tokens:
                _, threshold_E = self.pick_batch(score_TE)
            share = float(num_tokens)  # a micro-batch counts by its tokens
            signals = {"threshold": threshold_E.float() * share, "tokens": torch.tensor(share)}
        if limit is not None and limit < self.num_experts:
            best_TK = top_k(score_TE.masked_fill(~mask_TE, -torch.inf), limit)
            mask_TE &= torch.zeros_like(mask_TE).scatter_(1, best_TK, True)
        return RoutingPlan.from_mask(mask_TE, score_TE), signals

    def weigh(self, logits_TE: Tensor, chosen: RoutingPlan, inp: GateInput) -> RoutingPlan:
        """The scores themselves, as experts compared them."""
        return chosen.with_weight(chosen.pick(self.scores(logits_TE)))

    def metrics(self, logits_TE: Tensor, plan: RoutingPlan, inp: GateInput) -> dict[str, Tensor]:
        """Share of tokens that no expert chose."""
        return {"uncovered_frac": (plan.row_ptr_T1.diff() == 0).sum() / max(1, plan.num_tokens)}

    def begin_step(self, step: int, total_steps: int | None = None) -> None:
        """See :meth:`Gate.begin_step`."""
        self.step.fill_(step)

    @torch.no_grad()
    def end_step(self, load_E: Tensor, signals: Mapping[str, Tensor]) -> None:
        """Move the running mean of thresholds; its first step sets it. See :meth:`Gate.end_step`."""
        if not signals or float(signals["tokens"]) == 0:
            return
        mean_E = (signals["threshold"] / signals["tokens"]).to(self.threshold)
        self.threshold_steps += 1
        # As Adam does: the mean so far is that of few steps, and weighs no zeros.
        decay = self.config.threshold_decay
        fresh = (1 - decay) / (1 - decay ** int(self.threshold_steps))
        self.threshold.lerp_(mean_E, fresh)

    def causal_surrogate(self) -> BatchChoiceGate:
        """This gate, routing each token by the thresholds alone; shares parameters and buffers."""
        surrogate = copy.copy(self)
        surrogate._by_threshold = True
        surrogate.causality = Causality.PER_TOKEN
        return surrogate


def between(higher: Tensor, lower: Tensor) -> Tensor:
    """A number that ``higher`` exceeds and ``lower`` does not, as far from both as floats allow."""
    middle = (higher + lower) / 2
    return torch.where(middle < higher, middle, lower)
