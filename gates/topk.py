"""Top-k routing: each token visits the k experts with the best scores. One class, the published variants are options.

===================  ==================================================================================================
Mixtral              the defaults (arXiv 2401.04088)
Switch Transformer   k=1 renormalise=false jitter=0.01 capacity_factor=1.25 (arXiv 2101.03961)
GShard               noise=second_choice capacity_factor=1 drop_policy=choice renormalise_kept=true (arXiv 2006.16668)
Noisy top-k          noise=learned balance_coef=0 importance_coef=.1 load_coef=.1 (Shazeer et al., arXiv 1701.06538)
V-MoE                renormalise=false noise=fixed balance_coef=0 importance_coef=.005 load_coef=.005 (arXiv 2106.05974)
DeepSeek-V3          k=8 score=sigmoid scale=2.5 balance=bias num_groups=8 topk_groups=4 (arXiv 2412.19437)
===================  ==================================================================================================

Scores, losses and weights are computed in fp32 (fp64 when tokens and weight are fp64), under autocast too. Routing of
a token depends on nothing but the token, except where capacity drops pairs, which happens in training only.

Shape suffixes: T tokens, D width, E experts, K experts per token.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from gates import balance
from gates.base import Causality, Gate, GateConfig, GateInput, GateOutput, Mode, check_finite
from gates.capacity import DropPolicy, apply_capacity, expert_capacity, normalise_rows
from gates.metrics import plan_metrics
from gates.plan import RoutingPlan, keep_pairs
from gates.registry import register_gate
from gates.scores import ScoreFunction, limit_groups, log_score, score, top_k


class TopKConfig(GateConfig):
    """Options of the top-k family."""

    name: Literal["topk"] = "topk"
    k: int = Field(2, ge=1, description="experts per token")
    score: ScoreFunction = Field("softmax", description="how a logit becomes a score")
    order: Literal["score_then_topk", "topk_then_score"] = Field(
        "score_then_topk", description="whether a softmax runs over all experts or over the chosen ones only"
    )
    renormalise: bool = Field(True, description="divide the weights of a token by their sum; never with k=1")
    scale: float = Field(1.0, gt=0, description="factor on all weights (DeepSeek-V3: 2.5)")
    noise: Literal["none", "learned", "fixed", "second_choice"] = Field(
        "none",
        description="in training; learned: Gaussian of width softplus(x W_n) (Shazeer); fixed: Gaussian of width"
        " noise_std/E (V-MoE); second_choice: Gumbel noise on all choices but the first (GShard)",
    )
    noise_std: float = Field(1.0, gt=0, description="noise=fixed: the Gaussian's standard deviation, times E")
    jitter: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="in training the gate sees x * U(1 - jitter, 1 + jitter); the experts see x (Switch)",
    )
    balance: Literal["aux", "bias", "quantile", "frozen"] = Field(
        "aux",
        description="what keeps loads even; aux: the balance loss alone. The others add a number per expert to the"
        " scores for selection only; bias: it moves by a fixed step towards even load after each optimizer step"
        " (auxiliary-loss-free, arXiv 2408.15664), quantile: to where each expert would have its share of the step's"
        " tokens; both leave balance_coef at 0 unless it is given. frozen: it stays as it was loaded",
    )
    bias_update_rate: float = Field(1e-3, gt=0, description="balance=bias: step u of the update")
    quantile_rate: float = Field(
        0.1, gt=0, le=1, description="balance=quantile: how far of its way the bias moves in a step; 1 follows noise"
    )
    num_groups: int = Field(1, ge=1, description="experts stand in this many groups of neighbours")
    topk_groups: int = Field(1, ge=1, description="a token may use this many groups")
    group_top: int = Field(2, ge=1, description="a group's score is the sum of this many best (DeepSeek-V2: 1, V3: 2)")
    capacity_factor: float | None = Field(
        None,
        gt=0,
        description="in training an expert keeps at most ceil(capacity_factor * T * k / E) of the pairs of this rank's"
        " micro-batch; null: dropless, as evaluation and generation always are. Below 1.25 the two differ noticeably",
    )
    min_capacity: int = Field(1, ge=1, description="capacity is at least this (DeepSpeed: 4)")
    drop_policy: DropPolicy = Field(
        "position",
        description="who is kept; position: earlier tokens; choice: first choices, then earlier tokens (GShard); probs:"
        " higher scores (V-MoE); random: drawn anew each time (by position without a random generator)",
    )
    renormalise_kept: bool = Field(False, description="renormalise again over the pairs that capacity kept (GShard)")
    balance_coef: float = Field(0.01, ge=0, description="weight of the balance loss, which is 1 at perfect balance")
    balance_scope: Literal["micro_batch", "sequence", "global"] = Field(
        "sequence",
        description="tokens whose load must be even; sequence: independent of ranks and accumulation; global: the"
        " micro-batches of all ranks together",
    )
    z_coef: float = Field(0.0, ge=0, description="weight of mean logsumexp(logits)^2; 1e-3 is usual (ST-MoE)")
    importance_coef: float = Field(
        0.0,
        ge=0,
        description="weight of CV^2 over experts of the summed weights (Shazeer), or of the summed softmax with"
        " noise=fixed (V-MoE)",
    )
    load_coef: float = Field(0.0, ge=0, description="weight of CV^2 of the smooth load; needs noise learned or fixed")
    init_std: float = Field(0.02, ge=0, description="standard deviation of the initial weight")

    @model_validator(mode="before")
    @classmethod
    def _no_loss_besides_a_bias(cls, values: Any) -> Any:
        usual = cls.model_fields["balance"].default  # a preset's own coefficient goes with its own way of balancing
        if isinstance(values, Mapping) and values.get("balance") in {"bias", "quantile"} - {usual}:
            return {"balance_coef": 0.0, **values}
        return values

    @property
    def weights_add_up(self) -> bool:
        """Whether the weights of a token add up to ``scale`` before capacity drops any."""
        return self.renormalise or (self.order == "topk_then_score" and self.score == "softmax")

    def num_params(self, dim: int, num_experts: int) -> int:
        """The (E, D) projection, twice with learned noise. The selection bias is a buffer."""
        return dim * num_experts * (2 if self.noise == "learned" else 1)

    def experts_per_token(self, num_experts: int) -> float:
        """k; what capacity drops is not subtracted."""
        return float(min(self.k, num_experts))

    def reduces_in_forward(self) -> bool:
        """The global scope sums loads over ranks before the loss."""
        return self.balance_scope == "global"

    def check(self, num_experts: int) -> list[str]:
        """See :meth:`GateConfig.check`. An option whose parent option is off is reported too: it would do nothing."""
        no_gradient = "makes every weight 1, so that the task does not train the gate"
        chosen_softmax = self.order == "topk_then_score" and self.score == "softmax"
        groups, used = self.num_groups, self.topk_groups
        divides = num_experts % groups == 0
        reachable = used * num_experts // groups
        second, smooth = self.noise == "second_choice", self.noise in ("learned", "fixed")
        shifted = self.balance != "aux" or groups > 1
        load, kept = self.load_coef > 0, self.renormalise_kept
        rules = [
            (
                "k",
                self.k > num_experts,
                f"{self.k} experts per token, but there are only {num_experts}"
                + ("; with k=1 set renormalise to false as well" if num_experts == 1 and self.renormalise else ""),
            ),
            ("renormalise", self.renormalise and self.k == 1, f"with k=1 it {no_gradient}; set it to false"),
            ("order", chosen_softmax and self.k == 1, f"a softmax over one choice {no_gradient}; use score_then_topk"),
            ("num_groups", not divides, f"{groups} groups do not divide {num_experts} experts evenly"),
            ("topk_groups", used > groups, f"{used} of only {groups} groups (num_groups)"),
            (
                "topk_groups",
                divides and used <= groups and reachable < self.k <= num_experts,
                f"{used} of {groups} groups hold {reachable} experts, fewer than k={self.k}",
            ),
            ("noise", second and self.k == 1, "second_choice needs k of 2 or more"),
            ("noise", second and shifted, "second_choice goes with neither a selection bias (balance) nor groups"),
            ("load_coef", load and not smooth, "the load loss needs noise learned or fixed"),
            ("load_coef", load and shifted, "the load loss goes with neither a selection bias (balance) nor groups"),
            ("load_coef", load and self.k == num_experts, "with k = E every load is the same"),
            ("balance", self.balance == "quantile" and self.k >= num_experts, "with k = E there is nothing to balance"),
            ("renormalise_kept", kept and not self.weights_add_up, "needs renormalise (or a softmax over the chosen)"),
        ]
        problems = [f"{field}: {message}" for field, wrong, message in rules if wrong]
        capacity = self.capacity_factor is not None
        for field, parent_is_on, parent in (
            ("noise_std", self.noise == "fixed", "noise=fixed"),
            ("bias_update_rate", self.balance == "bias", "balance=bias"),
            ("quantile_rate", self.balance == "quantile", "balance=quantile"),
            ("group_top", groups > 1, "num_groups above 1"),
            ("min_capacity", capacity, "capacity_factor"),
            ("drop_policy", capacity, "capacity_factor"),
            ("renormalise_kept", capacity, "capacity_factor"),
        ):
            if not parent_is_on and getattr(self, field) != TopKConfig.model_fields[field].default:
                problems.append(f"{field}: has no effect without {parent}")
        return problems


@register_gate("topk")
class TopKGate(Gate):
    """A linear gate, ``weight`` (E, D) without bias, and a top-k selection. See the module's table of variants.

    Causality is PER_TOKEN when dropless. With capacity it is that of training: PREFIX when earlier tokens are served
    first (of the whole micro-batch: the sequences of a batch compete too), BATCH for the other policies;
    :meth:`causal_surrogate` is then the same gate without capacity.
    """

    config_type = TopKConfig
    config: TopKConfig
    selection_bias: Tensor | None

    def __init__(self, config: TopKConfig, dim: int, num_experts: int) -> None:
        super().__init__(config, dim, num_experts)
        self.weight = nn.Parameter(torch.empty(num_experts, dim))
        self.noise_weight = nn.Parameter(torch.empty(num_experts, dim)) if config.noise == "learned" else None
        has_bias = config.balance != "aux"
        self.register_buffer("selection_bias", torch.zeros(num_experts, dtype=torch.float32) if has_bias else None)
        self._declare()
        self.reset_parameters()

    def _declare(self) -> None:
        config = self.config
        self.interchangeable_experts = config.num_groups == 1
        if config.capacity_factor is None:
            self.causality = Causality.PER_TOKEN
        else:
            in_order = config.drop_policy == "position" or (config.drop_policy == "choice" and config.k == 1)
            self.causality = Causality.PREFIX if in_order else Causality.BATCH
        whole = config.weights_add_up and config.scale == 1 and config.capacity_factor is None
        bounded = (config.weights_add_up or config.score == "softmax") and config.scale <= 1
        self.weight_sum = "one" if whole else "at_most_one" if bounded else "free"

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Normal weight; the noise width starts at softplus(0) for all tokens; the selection bias at 0."""
        # In fp32 where the generator lives: the same weights on every device and in every dtype.
        device = self.weight.device if generator is None else generator.device
        drawn = torch.empty(self.weight.shape, dtype=torch.float32, device=device)
        with torch.no_grad():
            self.weight.copy_(drawn.normal_(0.0, self.config.init_std, generator=generator))
            if self.noise_weight is not None:
                self.noise_weight.zero_()
            if self.selection_bias is not None:
                self.selection_bias.zero_()

    @property
    def max_k(self) -> int:
        return self.config.k

    def route(self, inp: GateInput) -> GateOutput:
        """See :meth:`Gate.route`; ValueError if the plan to replay was not made by this gate's options."""
        config, x_TD, rng = self.config, inp.x_TD, inp.noise
        if config.jitter and rng is not None:
            x_TD = x_TD * (1 + config.jitter * (2 * _draw(torch.rand, x_TD, rng) - 1))
        logits_TE = F.linear(x_TD, self.weight.to(x_TD.dtype))
        check_finite(logits_TE, config.name)
        std = self._noise_std(x_TD) if rng is not None else None
        noisy_TE = logits_TE if std is None or rng is None else logits_TE + std * _draw(torch.randn, logits_TE, rng)
        if noisy_TE is not logits_TE:
            check_finite(noisy_TE, config.name)

        expert_TK = self._select(noisy_TE, rng) if inp.replay is None else self._replayed_selection(inp.replay)
        probs_TE = None
        if (inp.with_losses and config.balance_coef) or (config.score == "softmax" and not config.weights_add_up):
            probs_TE = log_score(logits_TE, config.score).softmax(-1)
        weight_TK = self._weights(noisy_TE, probs_TE if std is None else None, expert_TK)
        offered = RoutingPlan.from_topk(expert_TK, weight_TK, self.num_experts)
        plan = self._drop(offered, inp, noisy_TE)

        aux: dict[str, Tensor] = {}
        metrics: dict[str, Tensor] = {}
        if inp.with_losses:
            if probs_TE is not None and config.balance_coef:
                aux["balance"] = self._balance(probs_TE, offered, inp.segment_T, inp.reduce_load)
            aux |= self._other_losses(logits_TE, noisy_TE, std, offered)
            metrics = plan_metrics(plan)
            if self.selection_bias is not None:
                metrics["bias_range"] = self.selection_bias.amax() - self.selection_bias.amin()
        return GateOutput(plan, aux, metrics, logits_TE, signals=self._signals(logits_TE, inp))

    @torch.no_grad()
    def _signals(self, logits_TE: Tensor, inp: GateInput) -> dict[str, Tensor]:
        """balance=quantile: where this micro-batch wants the bias, weighed by its tokens."""
        config, bias_E = self.config, self.selection_bias
        if config.balance != "quantile" or inp.mode is not Mode.TRAIN or bias_E is None:
            return {}
        tokens = float(logits_TE.shape[0])
        if not tokens:
            return {"bias": torch.zeros_like(bias_E), "tokens": torch.tensor(0.0)}
        choice_TE = self._compared(logits_TE)
        wanted_E = balance.quantile_bias(choice_TE, bias_E.to(choice_TE.dtype), config.k)
        return {"bias": wanted_E.float() * tokens, "tokens": torch.tensor(tokens)}

    def _noise_std(self, x_TD: Tensor) -> Tensor | float | None:
        """Standard deviation of the Gaussian noise on the logits, (T, E) or one number; None without such noise."""
        if self.noise_weight is not None:
            return F.softplus(F.linear(x_TD, self.noise_weight.to(x_TD.dtype)))
        return self.config.noise_std / self.num_experts if self.config.noise == "fixed" else None

    @torch.no_grad()
    def _select(self, logits_TE: Tensor, rng: torch.Generator | None) -> Tensor:
        """(T, K) chosen experts, best first."""
        config, bias_E = self.config, self.selection_bias
        plain = bias_E is None and config.num_groups == 1
        # Every score grows with its logit: without bias or groups the logits choose the same experts, and at once.
        choice_TE = logits_TE if plain else self._compared(logits_TE)
        if bias_E is not None:
            choice_TE = choice_TE + bias_E.to(choice_TE.dtype)
        if config.num_groups > 1:
            choice_TE = limit_groups(choice_TE, config.num_groups, config.topk_groups, config.group_top)
        if config.noise != "second_choice" or rng is None:
            return top_k(choice_TE, config.k)
        # log of a score + Gumbel noise: drawing the other choices without replacement, in proportion to the scores.
        first_T1 = top_k(choice_TE, 1)
        gumbel_TE = -_draw(torch.rand, choice_TE, rng).clamp_min(torch.finfo(choice_TE.dtype).tiny).log().neg().log()
        others_TE = (log_score(logits_TE, config.score) + gumbel_TE).scatter(1, first_T1, -torch.inf)
        return torch.cat([first_T1, top_k(others_TE, config.k - 1)], 1)

    def _compared(self, logits_TE: Tensor) -> Tensor:
        """(T, E) what a selection bias is added to: logits or scores, by ``order``; for quantiles logarithms of scores.

        A softmax's differences are too unlike for one number per expert: its quantiles would follow the noise.
        """
        if self.config.order == "topk_then_score":
            return logits_TE
        if self.config.balance == "quantile":
            return log_score(logits_TE, self.config.score)
        return score(logits_TE, self.config.score)

    def _replayed_selection(self, replay: RoutingPlan) -> Tensor:
        """(T, K) experts that ``replay`` chose, those that capacity dropped included."""
        chosen, k = replay.before_drop or replay, self.config.k
        if chosen.num_pairs != replay.num_tokens * k:
            raise ValueError(
                f"gate {self.config.name!r}: the plan to replay has {chosen.num_pairs} pairs of {replay.num_tokens}"
                f" tokens, not k={k} of each"
            )
        return chosen.expert_N.view(-1, k)

    def _weights(self, logits_TE: Tensor, softmax_TE: Tensor | None, expert_TK: Tensor) -> Tensor:
        """(T, K) combine weights of the chosen pairs, differentiable; ``softmax_TE`` of the logits if it is at hand."""
        config = self.config
        if config.weights_add_up:  # s_i / sum of chosen s, without ever forming an s that could underflow
            weight_TK = log_score(logits_TE.gather(1, expert_TK), config.score).softmax(-1)
        elif config.score == "softmax":
            weight_TK = (logits_TE.softmax(-1) if softmax_TE is None else softmax_TE).gather(1, expert_TK)
        else:
            weight_TK = score(logits_TE.gather(1, expert_TK), config.score)
        return weight_TK if config.scale == 1 else weight_TK * config.scale

    def _drop(self, offered: RoutingPlan, inp: GateInput, logits_TE: Tensor) -> RoutingPlan:
        """Capacity, in training only; a replay drops what was dropped before."""
        config = self.config
        if config.capacity_factor is None or inp.mode is not Mode.TRAIN:
            return offered
        if inp.replay is not None:
            plan = offered if inp.replay.kept_M is None else keep_pairs(offered, inp.replay.kept_M)
        else:
            capacity = expert_capacity(
                offered.num_tokens, config.k, self.num_experts, config.capacity_factor, config.min_capacity
            )
            policy: DropPolicy = config.drop_policy
            if policy == "random" and inp.rng is None:
                policy = "position"
            score_N = None
            if policy == "probs":
                score_N = score(logits_TE.detach(), config.score)[offered.token_N(), offered.expert_N]
            plan = apply_capacity(offered, capacity, policy, score_N, inp.rng)
        if not config.renormalise_kept:
            return plan
        if config.score == "softmax":  # the kept may weigh nothing beside the dropped
            return plan.with_weight(config.scale * plan.softmax_rows(plan.pick(logits_TE)))
        return normalise_rows(plan, config.scale)

    def _balance(
        self,
        probs_TE: Tensor,
        offered: RoutingPlan,
        segment_T: Tensor | None,
        reduce_load: Callable[[Tensor], Tensor] | None,
    ) -> Tensor:
        """The balance loss over the configured scope: offered load against probabilities without noise."""
        scope = self.config.balance_scope
        if scope == "sequence" and segment_T is not None:
            return balance.sequence_balance_loss(probs_TE, offered.expert_N, offered.token_N(), segment_T)
        load_E = offered.load_E
        if scope == "global" and reduce_load is not None:
            load_E = reduce_load(load_E)
        return balance.balance_loss(probs_TE, load_E)

    def _other_losses(
        self, logits_TE: Tensor, noisy_TE: Tensor, std: Tensor | float | None, offered: RoutingPlan
    ) -> dict[str, Tensor]:
        """z, importance and load losses, those whose coefficient is not 0."""
        config = self.config
        aux: dict[str, Tensor] = {}
        if config.z_coef:
            aux["z"] = balance.z_loss(logits_TE)
        if config.importance_coef:
            if config.noise == "fixed":
                total_E = logits_TE.softmax(-1).sum(0)
            else:
                total_E = balance.importance(offered.expert_N, offered.weight_N, self.num_experts)
            aux["importance"] = balance.cv_squared(total_E)
        if config.load_coef and std is not None:
            shazeer = config.noise == "learned"
            load_E = balance.smooth_load(logits_TE, noisy_TE, std, config.k, exclude_self=shazeer)
            aux["load"] = balance.cv_squared(load_E)
        return aux

    @torch.no_grad()
    def end_step(self, load_E: Tensor, signals: Mapping[str, Tensor]) -> None:
        """Move the selection bias (``balance`` is bias or quantile). See :meth:`Gate.end_step`."""
        config = self.config
        if self.selection_bias is None:
            return
        if config.balance == "bias":
            load_E = load_E.to(self.selection_bias.device)
            rate = config.bias_update_rate
            self.selection_bias.copy_(balance.sign_bias_update(self.selection_bias, load_E, rate))
        elif config.balance == "quantile" and signals and float(signals["tokens"]):
            self.selection_bias.lerp_(
                (signals["bias"] / signals["tokens"]).to(self.selection_bias), config.quantile_rate
            )

    def causal_surrogate(self) -> TopKGate:
        """This gate without capacity, on the same parameters; itself when it is dropless."""
        if self.config.capacity_factor is None:
            return self
        off = ("capacity_factor", "min_capacity", "drop_policy", "renormalise_kept")
        defaults = {field: TopKConfig.model_fields[field].default for field in off}  # not those of a preset
        surrogate = copy.copy(self)  # shares parameters and buffers
        surrogate.config = self.config.model_copy(update=defaults)
        surrogate._declare()
        return surrogate


def _draw(sample: Callable[..., Tensor], like: Tensor, rng: torch.Generator) -> Tensor:
    """Random numbers of the shape and dtype of ``like``, drawn where the generator lives."""
    return sample(like.shape, generator=rng, device=rng.device, dtype=like.dtype).to(like.device)
