"""How an engine runs: sizes and limits, each decided once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moe.errors import UserError


@dataclass(frozen=True)
class EngineSettings:
    """Values that :func:`serve.engine.load.load_engine` works with.

    Attributes:
        max_sequences: sequences computed at once.
        max_step_tokens: positions of one forward pass; bounds how long a prompt's piece delays everybody.
        max_queue: requests that may wait besides those that are computed; more are refused.
        max_queue_tokens: prompt tokens that may wait.
        block_size: positions of a key-value block.
        kv_cache_gib: memory for keys and values; None takes what four full contexts, or all running sequences at a
            quarter of the context, need, whichever is more.
        prefix_cache: keep computed prompts for requests that begin alike.
        batch_invariant: compute every token the same way whatever is beside it: the same seed, the same text.
        native: compute with the C++ ops of csrc; None: where they are built or can be, on the CPU in fp32 or bf16.
        threads: compute threads; None keeps torch's choice.
        dtype: of weights and activations; "auto" keeps the files'.
        device: where the model runs.

    Raises:
        UserError: a value out of range, with the values that are allowed.
    """

    max_sequences: int = 32
    max_step_tokens: int = 512
    max_queue: int = 64
    max_queue_tokens: int = 262_144
    block_size: int = 16
    kv_cache_gib: float | None = None
    prefix_cache: bool = True
    batch_invariant: bool = False
    native: bool | None = None
    threads: int | None = None
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    device: str = "cpu"

    def __post_init__(self) -> None:
        at_least = {"max_sequences": 1, "max_queue": 0, "max_queue_tokens": 1, "block_size": 1}
        at_least["max_step_tokens"] = self.max_sequences
        if self.threads is not None:
            at_least["threads"] = 1
        for name, least in at_least.items():
            if getattr(self, name) < least:
                reason = " (max_sequences: one token each)" if name == "max_step_tokens" else ""
                raise UserError(f"{name} must be at least {least}{reason}, got {getattr(self, name)}")
        if self.kv_cache_gib is not None and not self.kv_cache_gib > 0:
            raise UserError(f"kv_cache_gib must be more than 0, got {self.kv_cache_gib:g}")
        if self.dtype not in ("auto", "fp32", "bf16"):
            raise UserError(f"dtype must be auto, fp32 or bf16, got {self.dtype!r}")
