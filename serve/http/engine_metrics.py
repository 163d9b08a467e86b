"""The engine's own counters and gauges, as Prometheus reads them. Names follow vLLM's stems."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, cast

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric, SummaryMetricFamily
from prometheus_client.registry import Collector

from serve.client import EngineHealth, EngineStats, ModelInfo
from serve.protocol.experts import cache_usage, layer_indices, load_imbalance

PREFIX = "moeyard:"
# A series per expert and layer is useful for a small model and ruinous for a large one.
MAX_EXPERT_SERIES = 512


Models = Sequence[tuple[ModelInfo, EngineStats]]


class EngineCollector(Collector):
    """The engine's counters and gauges as of the latest scrape, of each served model."""

    def __init__(self) -> None:
        self._models: Models = ()
        self._health = EngineHealth("starting")

    def update(self, models: Models, health: EngineHealth) -> None:
        self._models, self._health = models, health

    def collect(self) -> Iterator[Metric]:
        age_s = self._health.heartbeat_age_s
        gauge, counter = partial(self._each, GaugeMetricFamily), partial(self._each, CounterMetricFamily)
        yield gauge("num_requests_running", "Requests being computed.", lambda s: s.num_running)
        yield gauge("num_requests_waiting", "Requests waiting.", lambda s: s.num_waiting)
        yield gauge(
            "num_waiting_prompt_tokens", "Prompt tokens of waiting requests.", lambda s: s.waiting_prompt_tokens
        )
        yield gauge("kv_cache_usage_perc", "Share of the key-value cache that running requests hold.", cache_usage)
        yield gauge(
            "read_gb_per_s", "Weights and cache that forward passes lately read per second.", lambda s: s.read_gb_per_s
        )
        yield gauge("engine_heartbeat_age_seconds", "Time since the engine passed its loop.", lambda _: age_s)
        yield gauge("engine_uptime_seconds", "Time since the engine started.", lambda s: s.uptime_s)
        yield counter("prompt_tokens", "Prompt tokens computed.", lambda s: s.prompt_tokens)
        yield counter("prompt_tokens_cached", "Prompt tokens that were not computed again.", lambda s: s.cache.hits)
        yield counter("generation_tokens", "Tokens generated.", lambda s: s.generation_tokens)
        yield counter("prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", lambda s: s.cache.queries)
        yield counter("prefix_cache_hits", "Prompt tokens found in the prefix cache.", lambda s: s.cache.hits)
        yield counter(
            "num_preemptions",
            "Sequences that gave their blocks back and were computed again.",
            lambda s: s.preemptions,
        )
        yield counter("read_bytes", "Weights and cache that forward passes read.", lambda s: s.read_bytes)
        yield self._passes()
        yield self._blocks()
        yield self._by_label("request_success", "Sequences by how they ended.", "finished_reason", lambda s: s.finished)
        yield self._by_label("admission_rejections", "Requests refused.", "reason", lambda s: s.rejected)
        yield from self._experts()
        versions = GaugeMetricFamily(f"{PREFIX}weights", "Served weights.", labels=["model_name", "version"])
        for info, _ in self._models:
            versions.add_metric([info.model_id, info.weights_version], 1)
        yield versions

    def _each(self, family: Any, stem: str, text: str, value: Callable[[EngineStats], float]) -> Metric:
        metric = family(PREFIX + stem, text, labels=["model_name"])
        for info, stats in self._models:
            metric.add_metric([info.model_id], value(stats))
        return cast(Metric, metric)

    def _passes(self) -> Metric:
        # vLLM has a histogram of this name; its sum and count are what rates and means are made of.
        passes = SummaryMetricFamily(
            f"{PREFIX}iteration_tokens_total", "Positions computed per forward pass.", labels=["model_name"]
        )
        for info, stats in self._models:
            passes.add_metric([info.model_id], count_value=stats.steps, sum_value=stats.step_tokens)
        return passes

    def _blocks(self) -> Metric:
        blocks = GaugeMetricFamily(f"{PREFIX}kv_cache_blocks", "Blocks by state.", labels=["model_name", "state"])
        for info, stats in self._models:
            cache = stats.cache
            for state, count in (("free", cache.free), ("cached", cache.cached), ("used", cache.used)):
                blocks.add_metric([info.model_id, state], count)
        return blocks

    def _by_label(self, stem: str, text: str, label: str, counts: Callable[[EngineStats], Mapping[str, int]]) -> Metric:
        counter = CounterMetricFamily(PREFIX + stem, text, labels=["model_name", label])
        for info, stats in self._models:
            for reason, count in sorted(counts(stats).items()):
                counter.add_metric([info.model_id, reason], count)
        return counter

    def _experts(self) -> Iterator[Metric]:
        imbalance = GaugeMetricFamily(
            f"{PREFIX}expert_load_imbalance", "Maximum over mean tokens per expert.", labels=["model_name", "layer"]
        )
        tokens = CounterMetricFamily(
            f"{PREFIX}expert_tokens", "Tokens that each expert took.", labels=["model_name", "layer", "expert"]
        )
        for info, stats in self._models:
            load_LE = stats.expert_load
            shown = sum(map(len, load_LE)) <= MAX_EXPERT_SERIES
            for layer, load_E in zip(layer_indices(info, len(load_LE)), load_LE, strict=True):
                imbalance.add_metric([info.model_id, str(layer)], load_imbalance(load_E))
                for expert, count in enumerate(load_E if shown else ()):
                    tokens.add_metric([info.model_id, str(layer), str(expert)], count)
        yield imbalance
        if tokens.samples:
            yield tokens
