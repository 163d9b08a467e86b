"""Prometheus metrics. Names follow vLLM's stems, so that dashboards port by changing the prefix.

Each application has its own registry: two servers in one process do not mix, and tests start from zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest

from serve.client import EngineHealth, EngineStats, ModelInfo
from serve.http.engine_metrics import PREFIX, EngineCollector
from serve.protocol.errors import ApiError

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
# Why an admitted request ended before its answer was complete.
AbortReason: TypeAlias = Literal["disconnect", "timeout", "abort", "engine", "error"]

LATENCY_BUCKETS_S = (0.001, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
TOKEN_BUCKETS = (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536)


class ServerMetrics:
    """Latencies that the HTTP layer measures, beside the engine's own counters."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._engine = EngineCollector()
        self.registry.register(self._engine)
        self.time_to_first_token = self._latency("time_to_first_token", "Time to first token.")
        self.inter_token = self._latency("inter_token_latency", "Time per token after the first.")
        self.e2e = self._latency("e2e_request_latency", "Time from arrival to the last token.")
        self.queue = self._latency("request_queue_time", "Time that a sequence waited.")
        self.prefill = self._latency("request_prefill_time", "Time in the prompt's forward pass.")
        self.decode = self._latency("request_decode_time", "Time in generation.")
        self.prompt_tokens = self._tokens("request_prompt_tokens", "Prompt tokens per request.")
        self.generation_tokens = self._tokens("request_generation_tokens", "Generated tokens per request.")
        self._aborted = Counter(
            f"{PREFIX}requests_aborted",
            "Requests that ended before their answer was complete.",
            ["model_name", "reason"],
            registry=self.registry,
        )

    def _latency(self, stem: str, text: str) -> Histogram:
        return Histogram(
            f"{PREFIX}{stem}_seconds", text, ["model_name"], buckets=LATENCY_BUCKETS_S, registry=self.registry
        )

    def _tokens(self, stem: str, text: str) -> Histogram:
        return Histogram(f"{PREFIX}{stem}", text, ["model_name"], buckets=TOKEN_BUCKETS, registry=self.registry)

    def aborted(self, model_name: str, reason: AbortReason) -> None:
        self._aborted.labels(model_name, reason).inc()

    def render(self, models: Sequence[tuple[ModelInfo, EngineStats]], health: EngineHealth) -> bytes:
        """The exposition text for one scrape."""
        self._engine.update(models, health)
        return generate_latest(self.registry)


def abort_reason(error: ApiError) -> AbortReason:
    """Which of the few reasons an error counts as."""
    match error.code:
        case "timeout":
            return "timeout"
        case "aborted":
            return "abort"
        case "engine_dead" | "unavailable":
            return "engine"
        case _:
            return "error"
