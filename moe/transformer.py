"""A decoder-only transformer whose feed-forward layers are mixtures of experts.

Pre-norm blocks: ``x += attn(norm(x)); x += ffn(norm(x))``. The residual stream is never narrower than fp32; inside a
branch everything is in the compute dtype, with weights cast from their masters; logits are fp32.

Shape suffixes: B sequences, T positions (as a suffix of its own: the B * T tokens of the batch), D width, V
vocabulary, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gates import Gate, GateConfig, GateNumericsError, GateOutput, Mode, RoutingPlan, parse_gate_config
from moe.attention import Attend, Attention, AttentionCache, RMSNorm
from moe.config import ModelConfig
from moe.experts import ExpertBank, SwiGLU
from moe.initial_weights import fill_normal, stream, stream_seed
from moe.layer import MoELayer, RoutingContext, weighted_aux
from moe.ops.packed_linear import Linear
from moe.ops.rotary import Rotary, rotary_angles


@dataclass(frozen=True)
class ForwardContext:
    """What a forward pass is for.

    Attributes:
        step: optimizer step, 0-based.
        mode: see :class:`gates.Mode`.
        rng: source of gate noise; one number is drawn from it per forward pass, from which each layer's own stream is
            derived. None: no noise.
        valid_BT: (B, T) bool, False for padding, which stands at the end of its row. None: all valid.
        reduce_load: sums an integer load over all data-parallel ranks; for global-batch losses.
        compute_dtype: dtype of activations and matmuls; None takes that of the parameters.
        row: which sequence of the step's global batch is the first one here.
    """

    step: int = 0
    mode: Mode = Mode.EVAL
    rng: torch.Generator | None = None
    valid_BT: Tensor | None = None
    reduce_load: Callable[[Tensor], Tensor] | None = None
    compute_dtype: torch.dtype | None = None
    row: int = 0


@dataclass(frozen=True)
class LayerRouting:
    """What one MoE layer's gate returned; ``layer`` is the index of its block."""

    layer: int
    output: GateOutput


@dataclass(frozen=True)
class ModelOutput:
    """What the model returns.

    Attributes:
        logits_BTV: (B, T, V) fp32 scores of the next token (fp64 in an fp64 model); T = 1 with ``last_only``.
        routing: one entry per MoE layer, in order.
        gate_config: weighs the auxiliary losses.
    """

    logits_BTV: Tensor
    routing: tuple[LayerRouting, ...]
    gate_config: GateConfig = field(repr=False)

    def aux_loss(self) -> Tensor:
        """0-d mean over the MoE layers of the sum of coefficient times auxiliary loss."""
        coefs, name = self.gate_config.aux_coefs(), self.gate_config.name
        total = sum((weighted_aux(r.output.aux, coefs, name) for r in self.routing), 0.0)
        if isinstance(total, Tensor):
            return total / len(self.routing)
        return self.logits_BTV.new_zeros(())


def next_token_loss(logits_BTV: Tensor, targets_BT: Tensor, valid_BT: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Cross-entropy summed over valid positions.

    Args:
        logits_BTV: (B, T, V) scores.
        targets_BT: (B, T) int64, the token that follows each position.
        valid_BT: (B, T) bool; positions that count. None: all.

    Returns:
        0-d sum in nats, and the 0-d int64 number of positions that it counts.
    """
    if valid_BT is None:
        count = torch.tensor(targets_BT.numel(), device=targets_BT.device)
    else:
        targets_BT, count = targets_BT.masked_fill(~valid_BT, -100), valid_BT.sum()
    nats = F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten(), ignore_index=-100, reduction="sum")
    return nats, count


class Block(nn.Module):
    """One pre-norm block: attention, then experts (``moe``) or one dense network (``ffn``)."""

    def __init__(
        self, config: ModelConfig, gate: GateConfig, index: int, expert_device: torch.device | str | None = None
    ) -> None:
        super().__init__()
        self.index = index
        self.attn_norm = RMSNorm(config.dim, config.norm_eps)
        self.attn = Attention(config)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)
        self.moe: MoELayer | None = None
        self.ffn: SwiGLU | None = None
        if index in config.moe_layer_indices():
            self.moe = MoELayer(
                config.dim,
                config.moe.hidden_dim,
                config.moe.num_experts,
                gate,
                num_shared_experts=config.moe.num_shared_experts,
                expert_op=config.moe.expert_op,
                expert_device=expert_device,
            )
        else:
            self.ffn = SwiGLU(config.dim, config.dense_width(gate))

    def attention_part(self, x_BTD: Tensor, rotary: Rotary, attend: Attend | None, dtype: torch.dtype) -> Tensor:
        """The residual stream after attention."""
        y_BTD: Tensor = self.attn(self.attn_norm(x_BTD, dtype), rotary, attend)
        return x_BTD + y_BTD

    def ffn_part(self, x_BTD: Tensor, branch_BTD: Tensor, context: RoutingContext) -> tuple[Tensor, GateOutput | None]:
        """The residual stream after the feed-forward of ``branch_BTD``, and the routing if this block has experts."""
        if self.moe is not None:
            y_BTD, routing = self.moe(branch_BTD, context)
            return x_BTD + y_BTD, routing
        assert self.ffn is not None
        return x_BTD + self.ffn(branch_BTD), None

    def forward(
        self,
        x_BTD: Tensor,
        rotary: Rotary,
        attend: Attend | None,
        context: RoutingContext,
        dtype: torch.dtype,
        before_gate: Callable[[Tensor], RoutingContext] | None = None,
    ) -> tuple[Tensor, GateOutput | None]:
        """The residual stream after this block, and the routing if it has experts.

        Args:
            before_gate: given the tokens (B, T, D) that a gate is about to route, says with what context instead of
                ``context``.
        """
        x_BTD = self.attention_part(x_BTD, rotary, attend, dtype)
        branch_BTD = self.ffn_norm(x_BTD, dtype)
        if before_gate is not None and self.moe is not None:
            context = before_gate(branch_BTD)
        return self.ffn_part(x_BTD, branch_BTD, context)


class _RecomputedBlock:
    """One forward pass of a block that keeps only its input and its routing, and runs again in backward.

    Running a gate twice is not enough: ties, noise or changed rounding could choose other experts the second time, and
    gradients would then belong to another function. So the choice is made once, without gradient, and both runs
    replay it; they perform the same operations, which activation checkpointing requires. Nothing else runs twice:
    the gate's noise comes from a fresh generator of the same seed, and reduced loads are remembered, because a
    collective inside backward would have to be met by every rank at the same moment.
    """

    def __init__(
        self, block: Block, rotary: Rotary, dtype: torch.dtype, context: RoutingContext, noise_seed: int | None
    ) -> None:
        self._block, self._rotary, self._dtype, self._context = block, rotary, dtype, context
        self._noise_seed = noise_seed
        self._plan: RoutingPlan | None = None
        self._reduced: list[Tensor] = []

    def __call__(self, x_BTD: Tensor) -> tuple[Tensor, GateOutput | None]:
        x_BTD, output = checkpoint(
            self._run, x_BTD, self._context.prev_logits_TE, use_reentrant=False, preserve_rng_state=False
        )
        return x_BTD, output

    def _run(self, x_BTD: Tensor, prev_logits_TE: Tensor | None) -> tuple[Tensor, GateOutput | None]:
        context = replace(self._context, prev_logits_TE=prev_logits_TE)
        # By calling the block, not its parts: whoever has sharded its parameters gathers them in hooks of that call.
        result: tuple[Tensor, GateOutput | None] = self._block(
            x_BTD, self._rotary, None, context, self._dtype, partial(self._replayed, context)
        )
        return result

    def _replayed(self, context: RoutingContext, branch_BTD: Tensor) -> RoutingContext:
        """``context`` with the choice of the first run, which is made here."""
        moe = self._block.moe
        assert moe is not None
        first_run = self._plan is None
        if self._plan is None:
            self._plan = moe.choose(branch_BTD, replace(context, rng=self._rng(branch_BTD), reduce_load=None))
        if context.reduce_load is not None:
            context = replace(context, reduce_load=self._remember if first_run else self._recall(iter(self._reduced)))
        return replace(context, replay=self._plan, rng=self._rng(branch_BTD))

    def _rng(self, x_BTD: Tensor) -> torch.Generator | None:
        return layer_generator(self._noise_seed, self._block.index, x_BTD.device)

    def _remember(self, load_E: Tensor) -> Tensor:
        assert self._context.reduce_load is not None
        self._reduced.append(self._context.reduce_load(load_E))
        return self._reduced[-1]

    @staticmethod
    def _recall(reduced: Iterator[Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda _load_E: next(reduced)


def layer_generator(noise_seed: int | None, layer: int, device: torch.device) -> torch.Generator | None:
    """The noise of block ``layer`` in one forward pass; the same however often it is asked for, in whatever order."""
    if noise_seed is None:
        return None
    return torch.Generator(device).manual_seed(stream_seed(noise_seed, "gate noise", layer))


class Transformer(nn.Module):
    """The language model.

    Args:
        config: its shape; ``vocab_size`` must be set.
        gate: routing strategy of every MoE layer: a name, ``{"name": ..., options}`` or a gate config.
        expert_device: where routed experts are made; "meta" leaves them to ``parallel``. None: with the rest.

    Attributes:
        linear: how the output head is computed; see :func:`moe.ops.packed_linear.use_linear`.

    Raises:
        ValueError: a combination of options that cannot be built, all problems at once.
    """

    def __init__(
        self,
        config: ModelConfig,
        gate: str | Mapping[str, Any] | GateConfig = "topk",
        *,
        expert_device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.config, self.gate_config = config, parse_gate_config(gate)
        problems = config.check()
        if config.vocab_size is None:
            problems.append("vocab_size: must be set to build a model")
        problems += [f"gate.{problem}" for problem in self.gate_config.check(config.moe.num_experts)]
        if problems or config.vocab_size is None:
            raise ValueError("; ".join(problems))
        self.embed = nn.Embedding(config.vocab_size, config.dim)
        self.blocks = nn.ModuleList(Block(config, self.gate_config, i, expert_device) for i in range(config.num_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.head = None if config.tie_embeddings else nn.Linear(config.dim, config.vocab_size, bias=False)
        self.linear: Linear = F.linear

    def moe_layers(self) -> list[tuple[int, MoELayer]]:
        """(block index, layer) of every MoE layer, in order."""
        return [(i, block.moe) for i, block in enumerate(self._blocks()) if block.moe is not None]

    def gates(self) -> list[tuple[int, Gate]]:
        """(block index, gate) of every MoE layer, in order."""
        return [(i, layer.gate) for i, layer in self.moe_layers()]

    def _blocks(self) -> list[Block]:
        return [block for block in self.blocks if isinstance(block, Block)]

    def init_weights(self, seed: int) -> None:
        """Set all weights as GPT-2 does: N(0, init_std), projections into the residual stream over sqrt(2 L).

        The embedding has a standard deviation of its own if the config gives one.

        Each tensor has its own random stream (see :mod:`moe.initial_weights`); norms become one; each gate
        initialises itself from a stream of its own.
        """
        std = self.config.init_std
        residual_std = std / math.sqrt(2 * self.config.num_layers)
        embedding_std = self.config.embedding_init_std or std
        expert_banks = {name: module for name, module in self.named_modules() if isinstance(module, ExpertBank)}
        for name, param in self.named_parameters():
            if ".moe.gate." in name:
                continue
            if name.endswith("norm.weight"):
                nn.init.ones_(param)
                continue
            module, _, leaf = name.rpartition(".")
            if module in expert_banks:
                for expert, stacked, view in expert_banks[module].expert_views(leaf, param.detach()):
                    own_std = residual_std if stacked == "w_down_EFD" else std
                    fill_normal(view, own_std, seed, f"{module}.{stacked}.{expert}")
                continue
            into_residual = name.endswith(("wo.weight", "w_down.weight"))
            fill_normal(
                param, embedding_std if name == "embed.weight" else residual_std if into_residual else std, seed, name
            )
        for i, gate in self.gates():
            gate.reset_parameters(stream(seed, f"blocks.{i}.moe.gate"))

    def forward(
        self,
        ids_BT: Tensor,
        *,
        context: ForwardContext | None = None,
        cache: AttentionCache | None = None,
        last_only: bool = False,
    ) -> ModelOutput:
        """Score the next token at every position.

        Args:
            ids_BT: (B, T) int64 token ids.
            context: see :class:`ForwardContext`; None: mode TRAIN in training, else EVAL (with a cache PREFILL, or
                DECODE for a single position).
            cache: keys and values of earlier positions, which ``ids_BT`` continues; extended in place.
            last_only: compute logits of the last position alone.

        Raises:
            ValueError: the sequence is longer than ``max_seq_len``, or ``ids_BT`` is not two-dimensional.
            gates.GateNumericsError: scores of a gate are NaN or infinite; the text names the block.
        """
        context = context or ForwardContext(mode=self._default_mode(ids_BT.shape[-1], cache is not None))
        x_BTD, routing = self.hidden_states(ids_BT, context=context, cache=cache)
        if last_only:
            x_BTD = x_BTD[:, -1:]
        return ModelOutput(self.scores(x_BTD, context.compute_dtype), routing, self.gate_config)

    def hidden_states(
        self, ids_BT: Tensor, *, context: ForwardContext, cache: AttentionCache | None = None
    ) -> tuple[Tensor, tuple[LayerRouting, ...]]:
        """(B, T, D) residual stream after the last block, before the final norm, and each MoE layer's routing.

        Arguments and errors are those of :meth:`forward`. With a cache that says so by its ``positions``, a row may
        hold pieces of several sequences one after another.
        """
        if ids_BT.dim() != 2:
            raise ValueError(f"ids_BT must be (B, T), got shape {tuple(ids_BT.shape)}")
        length = ids_BT.shape[1]
        dtype = context.compute_dtype or self.embed.weight.dtype
        if cache is None:
            position_BT = torch.arange(length, device=ids_BT.device).unsqueeze(0)
            if length > self.config.max_seq_len:
                raise ValueError(f"{length} positions are more than max_seq_len {self.config.max_seq_len}")
        else:
            position_BT = cache.positions(length)
        rotary = rotary_angles(position_BT, self.config.width_per_head, self.config.rope_theta)
        routing_context = _routing_context(ids_BT, position_BT, context)
        noise_seed = None if context.rng is None else _draw_seed(context.rng)
        recompute = self.config.recompute == "block" and torch.is_grad_enabled() and cache is None

        x_BTD = F.embedding(ids_BT, self.embed.weight).to(torch.promote_types(dtype, torch.float32))
        routing: list[LayerRouting] = []
        for i, block in enumerate(self._blocks()):
            try:
                if recompute:
                    x_BTD, output = _RecomputedBlock(block, rotary, dtype, routing_context, noise_seed)(x_BTD)
                else:
                    attend = None if cache is None else partial(cache.attend, i)
                    if noise_seed is not None:
                        rng = layer_generator(noise_seed, i, x_BTD.device)
                        routing_context = replace(routing_context, rng=rng)
                    x_BTD, output = block(x_BTD, rotary, attend, routing_context, dtype)
            except GateNumericsError as error:
                raise GateNumericsError(f"block {i}: {error}") from error
            if output is not None:
                routing.append(LayerRouting(i, output))
                routing_context = replace(routing_context, layer=len(routing), prev_logits_TE=output.logits_TE)
        if cache is not None:
            cache.advance(length)
        return x_BTD, tuple(routing)

    def scores(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """(..., D) residual stream after the last block -> (..., V) scores of the next token, in fp32 at least.

        Args:
            dtype: compute dtype; None takes that of the parameters.
        """
        dtype = dtype or self.embed.weight.dtype
        head = self.embed.weight if self.head is None else self.head.weight
        logits = self.linear(self.norm(x, dtype), head.to(dtype))
        return logits.to(torch.promote_types(dtype, torch.float32))

    def _default_mode(self, length: int, cached: bool) -> Mode:
        if cached:
            return Mode.DECODE if length == 1 else Mode.PREFILL
        return Mode.TRAIN if self.training else Mode.EVAL


def _routing_context(ids_BT: Tensor, position_BT: Tensor, context: ForwardContext) -> RoutingContext:
    """What the gates of every layer have in common, the batch flattened to B * T tokens."""
    batch, length = ids_BT.shape
    segment_T = torch.arange(batch, device=ids_BT.device).repeat_interleave(length)
    return RoutingContext(
        ids_T=ids_BT.reshape(-1),
        valid_T=None if context.valid_BT is None else context.valid_BT.reshape(-1),
        segment_T=segment_T,
        position_T=position_BT.expand(batch, length).reshape(-1),
        reduce_load=context.reduce_load,
        row=context.row,
        step=context.step,
        mode=context.mode,
        causal=True,
    )


def _draw_seed(rng: torch.Generator) -> int:
    # Drawn, not read from initial_seed(): two passes with one generator must not see the same noise.
    return int(torch.randint(2**63 - 1, (), generator=rng, device=rng.device))
