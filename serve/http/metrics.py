"""Prometheus metrics. Names follow vLLM's stems, so that dashboards port by changing the prefix.

Each application has its own registry: two servers in one process do not mix, and tests start from zero.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping

from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from serve.client import EngineHealth, EngineStats, ModelInfo, TokenChunk

PREFIX = "moeyard:"
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
# A series per expert and layer is useful for a small model and ruinous for a large one.
MAX_EXPERT_SERIES = 512

LATENCY_BUCKETS_S = (0.001, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
TOKEN_BUCKETS = (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536)


class ServerMetrics:
    """Latencies that the HTTP layer measures, beside the engine's own counters."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._engine = _EngineCollector()
        self.registry.register(self._engine)
        self.time_to_first_token = self._latency("time_to_first_token", "Time to first token.")
        self.inter_token = self._latency("inter_token_latency", "Time per token after the first.")
        self.e2e = self._latency("e2e_request_latency", "Time from arrival to the last token.")
        self.queue = self._latency("request_queue_time", "Time that a sequence waited.")
        self.prefill = self._latency("request_prefill_time", "Time in the prompt's forward pass.")
        self.decode = self._latency("request_decode_time", "Time in generation.")
        self.prompt_tokens = self._tokens("request_prompt_tokens", "Prompt tokens per request.")
        self.generation_tokens = self._tokens("request_generation_tokens", "Generated tokens per request.")

    def _latency(self, stem: str, text: str) -> Histogram:
        return Histogram(
            f"{PREFIX}{stem}_seconds", text, ["model_name"], buckets=LATENCY_BUCKETS_S, registry=self.registry
        )

    def _tokens(self, stem: str, text: str) -> Histogram:
        return Histogram(f"{PREFIX}{stem}", text, ["model_name"], buckets=TOKEN_BUCKETS, registry=self.registry)

    def timer(self, model_name: str) -> RequestTimer:
        return RequestTimer(self, model_name)

    def render(self, models: tuple[ModelInfo, ...], stats: EngineStats, health: EngineHealth) -> bytes:
        """The exposition text for one scrape."""
        self._engine.update(models, stats, health)
        return generate_latest(self.registry)


class RequestTimer:
    """Follows the chunks of one request; knows the time since it was made."""

    def __init__(self, metrics: ServerMetrics, model_name: str) -> None:
        self._metrics, self._model = metrics, model_name
        self._started = time.perf_counter()
        self._last_token: dict[int, float] = {}
        self._last_chunk: TokenChunk | None = None

    def chunk(self, chunk: TokenChunk) -> None:
        now = time.perf_counter()
        self._last_chunk = chunk
        if chunk.token_ids:
            if not self._last_token:
                self._metrics.time_to_first_token.labels(self._model).observe(now - self._started)
            elif chunk.index in self._last_token:
                wait = (now - self._last_token[chunk.index]) / len(chunk.token_ids)
                self._metrics.inter_token.labels(self._model).observe(wait)
            self._last_token[chunk.index] = now
        if chunk.timings is not None:
            self._metrics.queue.labels(self._model).observe(chunk.timings.queue_s)
            self._metrics.prefill.labels(self._model).observe(chunk.timings.prefill_s)
            self._metrics.decode.labels(self._model).observe(chunk.timings.decode_s)

    def finished(self) -> None:
        """The request came to its end; aborted and failed ones are only in the engine's counters."""
        self._metrics.e2e.labels(self._model).observe(time.perf_counter() - self._started)
        if self._last_chunk is not None:
            usage = self._last_chunk.usage
            self._metrics.prompt_tokens.labels(self._model).observe(usage.prompt_tokens)
            self._metrics.generation_tokens.labels(self._model).observe(usage.completion_tokens)


def load_imbalance(load_E: tuple[int, ...]) -> float:
    """Maximum over mean load of one layer's experts; 1 is perfect balance, and no load at all counts as that."""
    total = sum(load_E)
    return max(load_E) * len(load_E) / total if total else 1.0


class _EngineCollector(Collector):
    """The engine's counters and gauges as of the latest scrape."""

    def __init__(self) -> None:
        self._models: tuple[ModelInfo, ...] = ()
        self._stats = EngineStats()
        self._health = EngineHealth("starting")

    def update(self, models: tuple[ModelInfo, ...], stats: EngineStats, health: EngineHealth) -> None:
        self._models, self._stats, self._health = models, stats, health

    def collect(self) -> Iterator[Metric]:
        stats = self._stats
        model = self._models[0].model_id if self._models else ""
        for stem, text, value in (
            ("num_requests_running", "Requests being computed.", stats.num_running),
            ("num_requests_waiting", "Requests waiting.", stats.num_waiting),
            ("num_waiting_prompt_tokens", "Prompt tokens of waiting requests.", stats.waiting_prompt_tokens),
            ("engine_heartbeat_age_seconds", "Time since the engine passed its loop.", self._health.heartbeat_age_s),
            ("engine_uptime_seconds", "Time since the engine started.", stats.uptime_s),
        ):
            gauge = GaugeMetricFamily(PREFIX + stem, text, labels=["model_name"])
            gauge.add_metric([model], value)
            yield gauge
        for stem, text, value in (
            ("prompt_tokens", "Prompt tokens computed.", stats.prompt_tokens),
            ("generation_tokens", "Tokens generated.", stats.generation_tokens),
        ):
            counter = CounterMetricFamily(PREFIX + stem, text, labels=["model_name"])
            counter.add_metric([model], value)
            yield counter
        yield _by_label("request_success", "Sequences by how they ended.", "finished_reason", model, stats.finished)
        yield _by_label("admission_rejections", "Requests refused.", "reason", model, stats.rejected)
        yield from self._experts(model)
        versions = GaugeMetricFamily(f"{PREFIX}weights", "Served weights.", labels=["model_name", "version"])
        for info in self._models:
            versions.add_metric([info.model_id, info.weights_version], 1)
        yield versions

    def _experts(self, model: str) -> Iterator[Metric]:
        load_LE = self._stats.expert_load
        layers = self._models[0].moe_layers if self._models else ()
        names = (
            [str(layer) for layer in layers] if len(layers) == len(load_LE) else [str(i) for i in range(len(load_LE))]
        )
        imbalance = GaugeMetricFamily(
            f"{PREFIX}expert_load_imbalance", "Maximum over mean tokens per expert.", labels=["model_name", "layer"]
        )
        for name, load_E in zip(names, load_LE, strict=True):
            imbalance.add_metric([model, name], load_imbalance(load_E))
        yield imbalance
        if 0 < sum(map(len, load_LE)) <= MAX_EXPERT_SERIES:
            tokens = CounterMetricFamily(
                f"{PREFIX}expert_tokens", "Tokens that each expert took.", labels=["model_name", "layer", "expert"]
            )
            for name, load_E in zip(names, load_LE, strict=True):
                for expert, count in enumerate(load_E):
                    tokens.add_metric([model, name, str(expert)], count)
            yield tokens


def _by_label(stem: str, text: str, label: str, model: str, counts: Mapping[str, int]) -> Metric:
    counter = CounterMetricFamily(PREFIX + stem, text, labels=["model_name", label])
    for reason, count in sorted(counts.items()):
        counter.add_metric([model, reason], count)
    return counter
