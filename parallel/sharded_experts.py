"""The experts of one MoE layer on one rank: owned ones as parameters, others as short-lived copies.

All tensors of an expert lie in one flat chunk, so that an expert travels as one piece of memory. Owned chunks are one
parameter, in one gradient and one optimizer state. Copies live in a buffer whose memory exists only while they do.

Shape suffixes: e experts here, X numbers of one expert's chunk, N rows sorted by expert, D width.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from moe.experts import ExpertBank, Experts, swiglu_experts
from moe.ops.grouped_mm import ExpertOp

OWNED_CHUNKS = "chunks_eX"
"""Name of the parameter that holds a rank's own experts."""


@dataclass(frozen=True)
class ChunkPart:
    """One tensor of an expert: its stacked parameter's name, its shape, and where it begins in the chunk."""

    name: str
    shape: tuple[int, ...]
    begin: int

    @property
    def end(self) -> int:
        size = 1
        for side in self.shape:
            size *= side
        return self.begin + size

    def of(self, chunks_eX: Tensor) -> Tensor:
        """(e, X) chunks -> (e, *shape) view of this tensor in each."""
        return chunks_eX[:, self.begin : self.end].view(-1, *self.shape)


def chunk_layout(experts: Experts) -> tuple[ChunkPart, ...]:
    """How the stacked parameters of ``experts`` lie in chunks, in the order of their definition."""
    parts: list[ChunkPart] = []
    for name, param in experts.named_parameters(recurse=False):
        parts.append(ChunkPart(name, tuple(param.shape[1:]), parts[-1].end if parts else 0))
    return tuple(parts)


class ShardedExperts(ExpertBank):
    """Takes the place of :class:`moe.Experts` in a layer whose experts are spread over ranks.

    Args:
        experts: the whole bank; its weights may be on the meta device.
        owned: experts that this rank owns, in the order of the parameter's rows.
        device: where the parameter shall be; None: where the bank is.

    Attributes:
        chunks_eX: (e, X) parameter, the owned experts.
        owned: which they are.
        copied: the experts that there are copies of at the moment, in the order of rows.
        on_needed: called before the weights are used; makes sure that they are here.
        on_gradients: called before gradients are added; makes sure that nobody else is adding to them. Backward does
            not need the copies any more.
        copy_grad_dtype: in which gradients of copies are kept until they travel. The dtype of activations, in which
            they come, loses nothing as long as those of one backward pass are kept; sums need the parameters'.
        compute_ns, computed_rows: what forward passes took and what they computed, for a profile.
    """

    def __init__(self, experts: Experts, owned: Sequence[int], device: torch.device | None = None) -> None:
        super().__init__()
        self.num_experts, self.dim, self.hidden_dim = experts.num_experts, experts.dim, experts.hidden_dim
        self.layout = chunk_layout(experts)
        self.owned: list[int] = list(owned)
        self.copied: list[int] = []
        self.on_needed: Callable[[], None] = lambda: None
        self.on_gradients: Callable[[], None] = lambda: None
        self.copy_grad_dtype: torch.dtype = experts.w_gate_EDF.dtype
        self.compute_ns = self.computed_rows = 0
        self._experts = (experts,)  # in a tuple: no submodule, or its parameters would be this module's
        source = experts.w_gate_EDF
        size = self.layout[-1].end
        self.chunks_eX = nn.Parameter(torch.empty(len(owned), size, dtype=source.dtype, device=device or source.device))
        if not source.is_meta:
            for part in self.layout:
                stacked = cast(Tensor, getattr(experts, part.name))
                part.of(self.chunks_eX.detach()).copy_(stacked.detach()[self.owned])
        self._copies_eX = self.chunks_eX.new_empty(0, size)
        self._copy_grads_eX: Tensor | None = None
        self._cast: tuple[int, Tensor] | None = None

    @property
    def chunk_numel(self) -> int:
        return self.layout[-1].end

    # --- what is here ---------------------------------------------------------------------------------------------

    @property
    def held(self) -> list[int]:
        """Experts that rows may come for, in the order in which they must stand."""
        return self.owned + self.copied

    def owned_chunks(self, dtype: torch.dtype) -> Tensor:
        """(e, X) owned experts in ``dtype`` without autograd history: the parameter itself, or a cast that is kept."""
        chunks_eX = self.chunks_eX.detach()
        if dtype == chunks_eX.dtype:
            return chunks_eX
        version = self.chunks_eX._version
        if self._cast is None or self._cast[0] != version or self._cast[1].dtype != dtype:
            self._cast = (version, chunks_eX.to(dtype))
        return self._cast[1]

    def make_room(self, experts: Sequence[int], dtype: torch.dtype) -> dict[int, Tensor]:
        """Take memory for copies of ``experts``; what it holds is for an spAG to say.

        Returns:
            By expert, owned ones included: the (X,) chunk of each, as :meth:`Communicator.gather` wants them.
        """
        shape = (len(experts), self.chunk_numel)
        if self.copied != list(experts) or self._copies_eX.dtype != dtype:
            self.copied = list(experts)
            self._copies_eX = self.chunks_eX.new_empty(shape, dtype=dtype)
        elif self._copies_eX.untyped_storage().nbytes() == 0:
            # The same memory layout again, for a backward pass whose graph already holds views of it.
            self._copies_eX.untyped_storage().resize_(self._copies_eX.numel() * self._copies_eX.element_size())
            if _fills_new_memory():
                self._copies_eX.data.fill_(float("nan"))
        chunks = dict(zip(self.owned, self.owned_chunks(dtype), strict=True))
        # .data has a version counter of its own: autograd must not take the arrival of a copy for a change in place.
        return chunks | self.copies()

    def copies(self) -> dict[int, Tensor]:
        """By expert: the (X,) chunk of each copy that is here."""
        return dict(zip(self.copied, self._copies_eX.data, strict=True))

    def release(self) -> None:
        """Give back the memory of the copies. Views that autograd keeps are valid again after :meth:`make_room`."""
        self._copies_eX.untyped_storage().resize_(0)

    def forget(self) -> None:
        """No copies any more, and nothing that may refer to them."""
        self.copied, self._cast = [], None
        self._copies_eX = self.chunks_eX.new_empty(0, self.chunk_numel)

    @property
    def copy_bytes(self) -> int:
        """Memory of the copies at the moment, their gradients included."""
        grads = 0 if self._copy_grads_eX is None else self._copy_grads_eX.nbytes
        return self._copies_eX.untyped_storage().nbytes() + grads

    # --- gradients ------------------------------------------------------------------------------------------------

    def zero_grad_chunks(self) -> None:
        """Owned experts have a gradient, and it is zero."""
        if self.chunks_eX.grad is None or self.chunks_eX.grad.shape != self.chunks_eX.shape:
            self.chunks_eX.grad = torch.zeros_like(self.chunks_eX)
        else:
            self.chunks_eX.grad.zero_()

    def take_grad_chunks(self) -> dict[int, Tensor]:
        """By expert: the (X,) gradient of each, as :meth:`Communicator.reduce` wants them.

        Those of owned experts are views of the parameter's gradient; those of copies belong to the caller from now on.
        Copies that no backward pass reached have zeros.
        """
        grads = dict(zip(self.owned, self._owned_grads(), strict=True))
        copies = self._copy_grads_eX
        if copies is None:
            copies = self._new_copy_grads()
        self._copy_grads_eX = None
        return grads | dict(zip(self.copied, copies, strict=True))

    def _add_grads(self, grads: Sequence[Tensor | None]) -> None:
        self.on_gradients()
        owned_grads_eX = self._owned_grads()
        own, copied = grads[: len(self.layout)], grads[len(self.layout) :]
        for part, grad in zip(self.layout, own, strict=True):
            if grad is not None:
                part.of(owned_grads_eX).add_(grad)
        if any(grad is not None for grad in copied):
            if self._copy_grads_eX is None:
                self._copy_grads_eX = self._new_copy_grads()
            for part, grad in zip(self.layout, copied, strict=True):
                if grad is not None:
                    part.of(self._copy_grads_eX).add_(grad)

    def _owned_grads(self) -> Tensor:
        if self.chunks_eX.grad is None:  # an optimizer's zero_grad() came after the step's begin
            self.zero_grad_chunks()
        assert self.chunks_eX.grad is not None
        return self.chunks_eX.grad

    def _new_copy_grads(self) -> Tensor:
        return self.chunks_eX.new_zeros(len(self.copied), self.chunk_numel, dtype=self.copy_grad_dtype)

    # --- compute --------------------------------------------------------------------------------------------------

    def forward(self, rows_ND: Tensor, load_e: Tensor) -> Tensor:
        """(N, D) rows sorted by :attr:`held`, ``load_e`` of them for each -> (N, D)."""
        self.on_needed()
        if load_e.shape != (len(self.held),):
            raise ValueError(f"load_e has shape {tuple(load_e.shape)}, {len(self.held)} experts are here")
        begin_ns = time.perf_counter_ns()
        weights = _weights(self.chunks_eX, self, rows_ND.dtype)
        op = self.op_choice(rows_ND.dtype, rows_ND.device)[0]
        split, parts = len(self.owned), len(self.layout)
        rows = int(load_e[:split].sum())
        outputs = []
        if self.owned:
            outputs.append(swiglu_experts(rows_ND[:rows], weights[:parts], load_e[:split], op))
        if self.copied:
            outputs.append(swiglu_experts(rows_ND[rows:], weights[parts:], load_e[split:], op))
        self.compute_ns += time.perf_counter_ns() - begin_ns
        self.computed_rows += rows_ND.shape[0]
        if not outputs:
            return rows_ND.clone()  # no expert here; the rows are none, but the graph must go through
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def op_choice(self, dtype: torch.dtype | None = None, device: torch.device | None = None) -> tuple[ExpertOp, str]:
        """See :meth:`moe.experts.ExpertBank.op_choice`."""
        return self._experts[0].op_choice(dtype or self.chunks_eX.dtype, device or self.chunks_eX.device)

    def expert_views(self, name: str, tensor: Tensor) -> Iterator[tuple[int | None, str, Tensor]]:
        """See :meth:`moe.experts.ExpertBank.expert_views`."""
        assert name == OWNED_CHUNKS, name
        for part in self.layout:
            if tensor.dim() == 0:
                yield None, part.name, tensor
                continue
            for expert, view in zip(self.owned, part.of(tensor), strict=True):
                yield expert, part.name, view

    def extra_repr(self) -> str:
        return f"owned={self.owned} of {self.num_experts}, chunk of {self.chunk_numel}"


def _fills_new_memory() -> bool:
    """Is torch in the mode in which it fills new memory with NaN, so that reading it before writing shows?"""
    fills: bool = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    return fills and torch.are_deterministic_algorithms_enabled()


class _Weights(torch.autograd.Function):
    """Stacked weights of owned experts and copies; their gradients go where they are collected, not to a leaf."""

    @staticmethod
    def forward(ctx: Any, chunks_eX: Tensor, module: ShardedExperts, dtype: torch.dtype) -> tuple[Tensor, ...]:
        ctx.module = module
        own = module.owned_chunks(dtype)
        return tuple(part.of(chunks).detach() for chunks in (own, module._copies_eX) for part in module.layout)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[None, None, None]:
        ctx.module._add_grads(grads)
        return None, None, None


_weights: Callable[[Tensor, ShardedExperts, torch.dtype], tuple[Tensor, ...]] = _Weights.apply
