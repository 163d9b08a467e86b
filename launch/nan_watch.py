"""After NaN or infinity: which layer and gate went bad first."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from gates import Gate, GateNumericsError
from parallel.dense_fsdp import own_part


def first_bad_module(model: nn.Module, forward: Callable[[], object]) -> str | None:
    """Run ``forward`` once more without gradients and name the first module whose output is not finite.

    Returns:
        A sentence naming the parameter or module, or None when everything is finite this time.
    """
    for name, param in model.named_parameters():
        if not bool(torch.isfinite(param).all()):
            return f"parameter {name} holds NaN or infinity"
    found: list[str] = []

    def watch(name: str, module: nn.Module) -> Callable[[nn.Module, object, object], None]:
        kind = (
            f"gate {name} ({module.config.name})" if isinstance(module, Gate) else f"{name} ({type(module).__name__})"
        )

        def hook(_module: nn.Module, _inputs: object, output: object) -> None:
            if not found and not all(bool(torch.isfinite(t).all()) for t in _float_tensors(output)):
                found.append(f"the output of {kind} is the first that is not finite")

        return hook

    handles = [module.register_forward_hook(watch(name, module)) for name, module in model.named_modules() if name]
    try:
        with torch.no_grad():
            forward()
    except GateNumericsError as error:
        found.append(str(error))
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


def first_bad_gradient(model: nn.Module) -> str | None:
    """Name the parameter nearest the loss whose gradient is not finite: where backward went bad first.

    Looks at what this rank has of the gradients; no other rank needs to look.
    """
    for name, param in reversed(list(model.named_parameters())):
        if param.grad is not None and not bool(torch.isfinite(own_part(param.grad)).all()):
            return f"the gradient of {name} is the first (from the loss backwards) that is not finite"
    return None


def _float_tensors(value: object) -> list[Tensor]:
    """Floating tensors in a module's output, looking one level into tuples and result values."""
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    if isinstance(value, (tuple, list)):
        return [t for item in value for t in _float_tensors(item)]
    fields = getattr(value, "__dataclass_fields__", None)
    if fields:
        members = [getattr(value, name) for name in fields]
        return [m for m in members if isinstance(m, Tensor) and m.is_floating_point()]
    return []
