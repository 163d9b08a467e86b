"""What an engine says about itself: its model, its health, its counters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

HealthStatus: TypeAlias = Literal["starting", "ready", "draining", "stopped", "dead"]


@dataclass(frozen=True, slots=True)
class SamplingDefaults:
    """What a model's ``generation_config.json`` says for requests that leave these out."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = None
    min_p: float = 0.0
    repetition_penalty: float = 1.0


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """A served model.

    Attributes:
        model_id: the name that requests use.
        created: Unix time of the model's files.
        context_length: most tokens of prompt and continuation together.
        vocab_size: valid token ids are below this.
        num_params, active_params: parameters in all, and those that one token uses.
        num_experts: experts of each MoE layer (E); moe_layers: block index of each MoE layer.
        embedding_dim: length of an embedding's vector.
        gate: name of the gate that routes while serving; batch_invariant: whether the same seed gives the same text
            whatever else is computed beside it.
        weights_version: changes whenever the weights do.
        chat_template: Jinja source, or None for a model without one.
        special_tokens: names to strings (``bos_token``, ``eos_token``, ...) for the chat template.
    """

    model_id: str
    created: int
    context_length: int
    vocab_size: int
    num_params: int = 0
    active_params: int = 0
    num_experts: int = 0
    moe_layers: tuple[int, ...] = ()
    embedding_dim: int = 0
    gate: str = ""
    batch_invariant: bool = False
    weights_version: str = "0"
    chat_template: str | None = None
    special_tokens: Mapping[str, str] = field(default_factory=dict)
    defaults: SamplingDefaults = SamplingDefaults()


@dataclass(frozen=True, slots=True)
class EngineHealth:
    """Liveness without asking the engine to do anything.

    ``heartbeat_age_s`` is the time since the engine last passed its loop; a busy engine keeps it small, a wedged one
    lets it grow. ``detail`` says why it is dead.
    """

    status: HealthStatus
    heartbeat_age_s: float = 0.0
    detail: str = ""

    def trouble(self, limit_s: float) -> str | None:
        """What is wrong, or None. A dead, stopped or wedged engine is ill; a starting or draining one is not.

        Args:
            limit_s: a loop that has not turned for longer is wedged.
        """
        if self.status in ("dead", "stopped"):
            return f"The engine is {self.status}." + (f" {self.detail}" if self.detail else "")
        if self.heartbeat_age_s > limit_s:
            return f"The engine has not passed its loop for {self.heartbeat_age_s:.0f} s."
        return None


@dataclass(frozen=True, slots=True)
class CacheStats:
    """Blocks of the key-value cache. ``free + cached + used == total`` whenever the engine is between steps.

    Attributes:
        block_size: positions in a block.
        total, free, cached, used: blocks in all; never used or forgotten; kept for a prompt that may come again, and
            free to take; held by running sequences.
        queries, hits: prompt tokens looked up in the prefix cache since start, and found.
    """

    block_size: int = 0
    total: int = 0
    free: int = 0
    cached: int = 0
    used: int = 0
    queries: int = 0
    hits: int = 0


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Counters since start and gauges of now.

    Attributes:
        num_running, num_waiting: requests being computed, and those that wait.
        waiting_prompt_tokens: prompt tokens of the latter.
        prompt_tokens, generation_tokens: computed and generated.
        finished: sequences by how they ended (stop, length), and requests that ended before (abort, error).
        rejected: requests refused, by reason.
        preemptions: sequences that gave their blocks back and were computed again.
        steps, step_tokens: forward passes, and positions that they computed.
        read_bytes: weights and cached keys and values that the passes had to read; read_gb_per_s: lately.
        cache: blocks and prefix hits.
        expert_load: (L, E): tokens that each expert of each MoE layer took, prompt and generated ones alike.
    """

    num_running: int = 0
    num_waiting: int = 0
    waiting_prompt_tokens: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    finished: Mapping[str, int] = field(default_factory=dict)
    rejected: Mapping[str, int] = field(default_factory=dict)
    preemptions: int = 0
    steps: int = 0
    step_tokens: int = 0
    read_bytes: int = 0
    read_gb_per_s: float = 0.0
    cache: CacheStats = CacheStats()
    expert_load: tuple[tuple[int, ...], ...] = ()
    uptime_s: float = 0.0


@dataclass(frozen=True, slots=True)
class ExpertRecord:
    """Expert loads between a start and a stop (or now).

    Attributes:
        recording: not stopped yet.
        seconds, steps, tokens: how long, over how many forward passes and positions.
        load: (L, E) tokens that each expert took meanwhile.
        peak_imbalance: (L,) largest maximum over mean of a single pass with at least as many choices as experts.
    """

    recording: bool = False
    seconds: float = 0.0
    steps: int = 0
    tokens: int = 0
    load: tuple[tuple[int, ...], ...] = ()
    peak_imbalance: tuple[float, ...] = ()
