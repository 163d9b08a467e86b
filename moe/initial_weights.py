"""Initial weights, each tensor from its own random stream.

The stream of a tensor is seeded by (seed, name), that of an expert's matrix by (seed, name, expert). So weights depend
neither on the order of construction nor on which rank holds which expert, and are the same on every device.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def stream(seed: int, *key: str | int) -> torch.Generator:
    """A CPU generator that belongs to ``key`` under ``seed``: the same everywhere, unlike Python's ``hash``."""
    return torch.Generator().manual_seed(stream_seed(seed, *key))


def stream_seed(seed: int, *key: str | int) -> int:
    """A 63-bit seed made of ``seed`` and ``key``."""
    digest = hashlib.sha256("/".join(str(part) for part in (seed, *key)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


@torch.no_grad()
def fill_normal(weight: Tensor, std: float, seed: int, name: str) -> None:
    """Overwrite ``weight`` with N(0, std^2) from the stream of ``name``; drawn in fp32 on the CPU, whatever it is."""
    weight.copy_(torch.empty(weight.shape, dtype=torch.float32).normal_(0.0, std, generator=stream(seed, name)))
