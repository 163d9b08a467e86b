"""The optimizer and its schedule: AdamW groups, warm-up and decay. Pure functions of the config and the step."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from launch.config import OptimConfig


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW (arXiv:1711.05101) with weight decay on matrices only.

    Norm weights, biases and other vectors get no decay. A stacked expert tensor counts as matrices. The state is made
    here rather than in the first step, so that a checkpoint has the same keys at every step.
    """
    params = [p for p in model.parameters() if p.requires_grad]
    # Slices of sharded parameters have groups of their own: no fused operation takes them together with whole ones.
    groups = [
        {
            "params": [p for p in params if (p.dim() >= 2) is decays and isinstance(p, DTensor) is sliced],
            "weight_decay": config.weight_decay if decays else 0.0,
        }
        for sliced in (False, True)
        for decays in (True, False)
    ]
    optimizer = torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=config.lr, betas=config.betas, eps=config.eps, fused=True
    )
    for param in params:
        optimizer.state[param] = {
            "step": torch.zeros((), dtype=torch.float32, device=param.device),
            "exp_avg": torch.zeros_like(param),
            "exp_avg_sq": torch.zeros_like(param),
        }
    return optimizer


def learning_rate(step: int, steps: int, config: OptimConfig) -> float:
    """Learning rate of optimizer step ``step`` (0-based) of ``steps``.

    Linear warm-up over ``warmup_steps``; then constant, cosine (arXiv:1608.03983) or WSD (arXiv:2404.06395): constant
    until a linear decay over the last ``decay_fraction`` of the steps. Both decays end at ``final_lr_fraction``.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / (config.warmup_steps + 1)
    floor = config.final_lr_fraction
    if config.schedule == "cosine":
        done = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
        return config.lr * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))
    if config.schedule == "wsd":
        decay_steps = max(1, round(config.decay_fraction * steps))
        left = min(1.0, (steps - step) / decay_steps)
        return config.lr * (floor + (1 - floor) * left)
    return config.lr


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Use ``lr`` for every parameter group from the next step on."""
    for group in optimizer.param_groups:
        group["lr"] = lr
