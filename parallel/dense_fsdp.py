"""Fully sharded data parallelism of the non-expert parameters, by torch's FSDP2 (ZeRO-3, arXiv:1910.02054).

Each rank keeps a slice of every parameter, of its gradient and of its optimizer state. A block's parameters are
gathered before its forward and its backward and freed after; its gradients are summed straight into the slices.
Experts are left alone: they have a way of their own (:mod:`parallel.engine`).

Every forward pass gathers, so all ranks must run equally many of them, with tokens or without.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from moe.errors import ConfigError
from moe.experts import Experts
from moe.transformer import Block
from parallel.topology import Topology


class ShardedDense:
    """Owns the sharded parameters of a model and their gradients.

    Used as :class:`parallel.dense.GradientReducer` is: per step :meth:`zero`, then for each micro-batch :meth:`expect`
    and ``loss.backward()``, then :meth:`finish`.

    Args:
        model: weights in place and the same on every rank. Its parameters become ``DTensor`` slices, in place: an
            optimizer must be built afterwards. What is not in a :class:`moe.transformer.Block` is one unit.
        ignored: parameters that stay as they are.

    Raises:
        ValueError: there are experts that no :class:`parallel.engine.ExpertEngine` has spread over ranks.
        ConfigError: a parameter has no dimension to slice; names it.
    """

    def __init__(self, model: nn.Module, topology: Topology, ignored: Collection[nn.Parameter] = ()) -> None:
        for name, module in model.named_modules():
            if isinstance(module, Experts):
                # A slice of a stack of experts is not what checkpoints know of them.
                raise ValueError(f"{name}: experts are on every rank, spread them with an ExpertEngine first")
        ignored = set(ignored)
        scalars = [name for name, param in model.named_parameters() if param.dim() == 0 and param not in ignored]
        if scalars:
            raise ConfigError(
                [
                    f"parallel.dense: fsdp cannot slice {name}, which has no dimension; make its shape (1,)"
                    for name in scalars
                ]
            )
        self.topology = topology
        mesh = init_device_mesh(topology.device.type, (topology.world_size,))
        # Logits are views; the warning is for those who change outputs in place, which nothing here does.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
        for module in (*[part for part in model.modules() if isinstance(part, Block)], model):
            unit = fully_shard(module, mesh=mesh, ignored_params=ignored)
            # The one divisor rule: gradients are summed and divided by nothing. FSDP2 would divide by the world size;
            # its factor 1 is a multiplication inside the collective, which gloo has not, unless sums are asked for.
            unit.set_gradient_divide_factor(1.0)
            unit.set_force_sum_reduction_for_comms(True)
        self._root: FSDPModule = unit
        # A parameter that no token of this rank used has a gradient all the same: zeros, and maybe others' sums.
        self._root.set_reduce_scatter_unused_params(True)
        self.params = [param for param in model.parameters() if param.requires_grad and param not in ignored]

    def zero(self) -> None:
        """Begin a step: forget all gradients."""
        for param in self.params:
            param.grad = None

    def expect(self, last: bool) -> None:
        """Announce a backward pass. Only the ``last`` one of the step sums gradients; until then each rank keeps its
        own, whole."""
        self._root.set_requires_gradient_sync(last)

    def finish(self) -> None:
        """Nothing is left to wait for: the last backward pass has returned with the sums."""

    def grad_norm(self) -> Tensor:
        """0-d fp64 L2 norm of all gradients, each element counted once; the same on every rank."""
        square = torch.zeros((), dtype=torch.float64, device=self.topology.device)
        for grad in self._grads():
            square += torch.linalg.vector_norm(grad, dtype=torch.float64) ** 2
        return self.topology.sum_(square).sqrt()

    def clip_(self, norm: Tensor, max_norm: float) -> None:
        """Scale all gradients so that their norm, given as ``norm``, is at most ``max_norm``; 0 means no limit."""
        if max_norm > 0 and float(norm) > max_norm:
            for grad in self._grads():
                grad.mul_(max_norm / float(norm))

    def reshard(self) -> None:
        """Free what a forward pass without a backward pass has left gathered, for the next one to find."""
        self._root.reshard()

    def _grads(self) -> list[Tensor]:
        """This rank's slices."""
        return [own_part(cast(Tensor, param.grad)) for param in self.params]


def own_part(tensor: Tensor) -> Tensor:
    """The slice of a sharded tensor that is on this rank, as a view; any other tensor as it is."""
    if not isinstance(tensor, DTensor):
        return tensor
    local: Tensor = tensor.to_local()
    return local
