"""Data-parallel gradients: bucketed all-reduce under backward, and the one gradient norm.

One divisor rule: every rank weighs its loss terms by (its tokens / tokens of the whole step), so gradients are
summed over ranks and divided by nothing. Uneven micro-batches, accumulation and any world size then agree.

Why not torch's DistributedDataParallel: it rebuilds its buckets after the first backward, so the first step after a
resume adds floats in another order than the same step of the uninterrupted run. Here the buckets depend on the model
alone, and gradients are views into them: no copy, one norm per bucket.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import sha256

import torch
import torch.distributed as dist
from torch import Tensor, nn

from parallel.sharded_experts import OWNED_CHUNKS, ShardedExperts
from parallel.topology import Topology


@dataclass
class _Bucket:
    flat: Tensor  # gradients of `params`, end to end
    params: list[nn.Parameter]
    missing: int = 0  # parameters whose gradient has not arrived in this backward
    work: dist.Work | None = None


class GradientReducer:
    """Owns the gradients of replicated parameters and sums them over ranks while backward still runs.

    Use per optimizer step: :meth:`zero`, then for each micro-batch :meth:`expect` and ``loss.backward()``, then
    :meth:`finish`. Buckets are reduced in one fixed order on every rank, whatever order gradients arrive in.
    """

    def __init__(self, params: Iterable[nn.Parameter], topology: Topology, bucket_bytes: int) -> None:
        self.topology = topology
        self.bytes_reduced = 0
        self._reduce_on_arrival = False
        self._next_bucket = 0
        self._buckets: list[_Bucket] = []
        # Backward reaches the last layers first, so buckets fill from the end of the model.
        pending: list[nn.Parameter] = []
        for param in reversed([p for p in params if p.requires_grad]):
            full = pending and (
                sum(p.numel() * p.element_size() for p in pending) + param.numel() * param.element_size() > bucket_bytes
                or param.dtype != pending[0].dtype
            )
            if full:
                self._add_bucket(pending)
                pending = []
            pending.append(param)
        if pending:
            self._add_bucket(pending)

    def _add_bucket(self, params: list[nn.Parameter]) -> None:
        flat = torch.zeros(sum(p.numel() for p in params), dtype=params[0].dtype, device=params[0].device)
        bucket, offset, index = _Bucket(flat, params), 0, len(self._buckets)
        for param in params:
            param.grad = flat[offset : offset + param.numel()].view_as(param)
            offset += param.numel()
            param.register_post_accumulate_grad_hook(lambda _param, index=index: self._arrived(index))
        self._buckets.append(bucket)

    def zero(self) -> None:
        """Begin a step: forget all gradients; they stay views into the buckets.

        From here on :meth:`finish` reduces every bucket, even if this rank never gets to a backward pass.
        """
        self._next_bucket = 0
        self._reduce_on_arrival = False
        for bucket in self._buckets:
            bucket.flat.zero_()

    def expect(self, last: bool) -> None:
        """Announce a backward pass; buckets are reduced during the ``last`` one of the step."""
        self._reduce_on_arrival = last and self.topology.world_size > 1
        for bucket in self._buckets:
            bucket.missing = len(bucket.params)

    def _arrived(self, index: int) -> None:
        self._buckets[index].missing -= 1
        if self._reduce_on_arrival:
            while self._next_bucket < len(self._buckets) and self._buckets[self._next_bucket].missing == 0:
                self._launch()

    def _launch(self) -> None:
        bucket = self._buckets[self._next_bucket]
        bucket.work = dist.all_reduce(bucket.flat, async_op=True)
        self.bytes_reduced += bucket.flat.numel() * bucket.flat.element_size()
        self._next_bucket += 1

    def finish(self) -> None:
        """Wait until every gradient is the sum over ranks. Must be called on every rank, every step."""
        if self.topology.world_size == 1:
            return
        # Parameters that no token used never fired a hook; their zeros take part all the same.
        while self._next_bucket < len(self._buckets):
            self._launch()
        for bucket in self._buckets:
            if bucket.work is not None:
                bucket.work.wait()
                bucket.work = None

    def grad_norm(self) -> Tensor:
        """0-d L2 norm of all gradients; the same on every rank once :meth:`finish` has returned."""
        norms = [torch.linalg.vector_norm(bucket.flat) for bucket in self._buckets]
        total: Tensor = torch.linalg.vector_norm(torch.stack([norm.double() for norm in norms]))
        return total

    def clip_(self, norm: Tensor, max_norm: float) -> None:
        """Scale all gradients so that their norm, given as ``norm``, is at most ``max_norm``; 0 means no limit."""
        if max_norm > 0 and float(norm) > max_norm:
            for bucket in self._buckets:
                bucket.flat.mul_(max_norm / float(norm))


def check_in_sync(module: nn.Module, topology: Topology) -> None:
    """Raise RuntimeError when ranks hold different parameters or buffers (compared by a hash of their bits).

    Experts that are spread over ranks are left out: no two ranks hold the same. Dense parameters must still be whole.
    """
    sharded = {f"{name}.{OWNED_CHUNKS}" for name, part in module.named_modules() if isinstance(part, ShardedExperts)}
    digest = sha256()
    for name, tensor in module.state_dict().items():
        if name in sharded:
            continue
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    everyone = topology.gather_objects(digest.hexdigest())
    for rank, other in enumerate(everyone):
        if other != everyone[0]:
            raise RuntimeError(f"rank {rank} holds other initial parameters than rank 0")
