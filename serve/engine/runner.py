"""The model behind an engine: slices of many sequences in, scores of their next tokens out, experts counted.

Shape suffixes: L MoE layers, E experts, V vocabulary, T positions of the pass, B slices that end their known tokens,
D width.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from gates import Mode, RoutingPlan
from moe.ops.batch_invariant import BatchInvariant
from moe.ops.native import NativeOps
from moe.ops.paged_attention import Piece
from moe.transformer import ForwardContext, Transformer
from serve.client import TokenRouting
from serve.engine.paged_cache import PagedKV
from serve.engine.scheduler import Slice

# Scores of so many positions at once; a prompt's are needed only when somebody asks for its log-probabilities.
_SCORED_ROWS = 64


@dataclass(frozen=True)
class PassResult:
    """What one forward pass gave.

    Attributes:
        logits_BV: (B, V) fp32 on the CPU, one row for each slice that ends its known tokens, in order.
        hidden_TD: (T, D) residual stream of all positions.
        plans: each MoE layer's routing of all positions.
        load_LE: (L, E) tokens that each expert took.
        read_bytes: weights, and cached keys and values, that the pass had to read at least once.
    """

    logits_BV: Tensor
    hidden_TD: Tensor = field(repr=False)
    plans: tuple[RoutingPlan, ...] = field(repr=False)
    load_LE: Tensor = field(repr=False)
    read_bytes: int = 0


class ModelRunner:
    """Runs one model over one paged cache, from one thread.

    Args:
        model: in evaluation mode from here on.
        num_blocks, block_size: of the cache.
        batch_invariant: see :mod:`moe.ops.batch_invariant`; a token's scores do not depend on the rest of the pass.
        ops: native ops, which attend for single queries; see :mod:`serve.engine.products`.
    """

    def __init__(
        self,
        model: Transformer,
        num_blocks: int,
        block_size: int = 16,
        *,
        batch_invariant: bool = False,
        ops: NativeOps | None = None,
    ) -> None:
        self.batch_invariant, self._ops = batch_invariant, ops
        self.num_blocks, self.block_size = num_blocks, block_size
        self.use_model(model)

    def use_model(self, model: Transformer) -> None:
        """Compute with this model from now on; nothing that was cached is of use to it."""
        self.model = model.eval()
        weight = model.embed.weight
        self._device, self.dtype = weight.device, weight.dtype
        self.kv = PagedKV(
            model.config,
            self.num_blocks,
            self.block_size,
            dtype=weight.dtype,
            device=weight.device,
            ops=self._ops,
        )
        banks = [layer.experts for _, layer in model.moe_layers()]
        self._expert_bytes_L = torch.tensor([_bytes_of(bank) // model.config.moe.num_experts for bank in banks])
        # Of an embedding that is not the head, a token reads one row.
        looked_up = 0 if model.head is None else _bytes_of(model.embed)
        self._other_bytes = _bytes_of(model) - sum(map(_bytes_of, banks)) - looked_up

    def use_threads(self, threads: int | None) -> None:
        """Sets torch's compute threads for the calling thread and those that start later; None changes nothing."""
        if threads is not None:
            torch.set_num_threads(threads)

    @torch.inference_mode()
    def run(self, slices: Sequence[Slice]) -> PassResult:
        """One forward pass; keys and values of the slices are in the cache afterwards."""
        ids: list[int] = []
        pieces: list[Piece] = []
        last: list[int] = []
        for part in slices:
            ids += part.sequence.tokens[part.start : part.stop]
            pieces.append(Piece(part.sequence.blocks, part.start, part.stop - part.start))
            if part.ends_known:
                last.append(len(ids) - 1)
        with self._products():
            batch = self.kv.batch(pieces, alone=self.batch_invariant)
            x_1TD, routing = self.model.hidden_states(
                torch.tensor([ids], device=self._device), context=ForwardContext(mode=Mode.PREFILL), cache=batch
            )
            rows_BD = x_1TD[0, torch.tensor(last, dtype=torch.int64, device=self._device)]
            logits_BV = self.model.scores(rows_BD).float().cpu()
        plans = tuple(layer.output.plan for layer in routing)
        load_LE = torch.stack([plan.load_E for plan in plans]) if plans else torch.zeros(0, 0, dtype=torch.int64)
        positions = sum(piece.past + piece.new for piece in pieces)
        return PassResult(logits_BV, x_1TD[0], plans, load_LE, self._read_bytes(load_LE, positions))

    def _products(self) -> contextlib.AbstractContextManager[object]:
        return BatchInvariant() if self.batch_invariant else contextlib.nullcontext()

    def _read_bytes(self, load_LE: Tensor, positions: int) -> int:
        hit_L = (load_LE > 0).sum(-1).cpu()
        return self._other_bytes + int((hit_L * self._expert_bytes_L).sum()) + positions * self.kv.position_bytes

    @torch.inference_mode()
    def logprobs_of(self, hidden_TD: Tensor, targets: Sequence[int]) -> list[Tensor]:
        """(V,) log-probabilities at each position that ``targets`` says the true next token of."""
        rows: list[Tensor] = []
        with self._products():
            for start in range(0, len(targets), _SCORED_ROWS):
                part_TD = hidden_TD[start : start + min(_SCORED_ROWS, len(targets) - start)]
                rows.extend(torch.log_softmax(self.model.scores(part_TD).float().cpu(), -1))
        return rows

    @torch.inference_mode()
    def embedding_sum(self, hidden_TD: Tensor) -> Tensor:
        """(D,) sum over positions of the normalised hidden states, in fp32 on the CPU."""
        return self.model.norm(hidden_TD.float()).sum(0).cpu()


def routing_of(plans: Sequence[RoutingPlan], row: int) -> TokenRouting:
    """The experts of one position of a pass."""
    experts, weights = [], []
    for plan in plans:
        start, stop = plan.row_ptr_T1[row].item(), plan.row_ptr_T1[row + 1].item()
        experts.append(tuple(plan.expert_N[start:stop].tolist()))
        weights.append(tuple(plan.weight_N[start:stop].tolist()))
    return TokenRouting(tuple(experts), tuple(weights))


def _bytes_of(module: nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())
