"""The engine's own counters and gauges, as Prometheus reads them. Names follow vLLM's stems."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric, SummaryMetricFamily
from prometheus_client.registry import Collector

from serve.client import EngineHealth, EngineStats, ModelInfo
from serve.protocol.experts import cache_usage, layer_indices, load_imbalance

PREFIX = "moeyard:"
# A series per expert and layer is useful for a small model and ruinous for a large one.
MAX_EXPERT_SERIES = 512


class EngineCollector(Collector):
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
            ("kv_cache_usage_perc", "Share of the key-value cache that running requests hold.", cache_usage(stats)),
            ("read_gb_per_s", "Weights and cache that forward passes lately read per second.", stats.read_gb_per_s),
            ("engine_heartbeat_age_seconds", "Time since the engine passed its loop.", self._health.heartbeat_age_s),
            ("engine_uptime_seconds", "Time since the engine started.", stats.uptime_s),
        ):
            gauge = GaugeMetricFamily(PREFIX + stem, text, labels=["model_name"])
            gauge.add_metric([model], value)
            yield gauge
        for stem, text, value in (
            ("prompt_tokens", "Prompt tokens computed.", stats.prompt_tokens),
            ("prompt_tokens_cached", "Prompt tokens that were not computed again.", stats.cache.hits),
            ("generation_tokens", "Tokens generated.", stats.generation_tokens),
            ("prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", stats.cache.queries),
            ("prefix_cache_hits", "Prompt tokens found in the prefix cache.", stats.cache.hits),
            ("num_preemptions", "Sequences that gave their blocks back and were computed again.", stats.preemptions),
            ("read_bytes", "Weights and cache that forward passes read.", stats.read_bytes),
        ):
            counter = CounterMetricFamily(PREFIX + stem, text, labels=["model_name"])
            counter.add_metric([model], value)
            yield counter
        # vLLM has a histogram of this name; its sum and count are what rates and means are made of.
        passes = SummaryMetricFamily(
            f"{PREFIX}iteration_tokens_total", "Positions computed per forward pass.", labels=["model_name"]
        )
        passes.add_metric([model], count_value=stats.steps, sum_value=stats.step_tokens)
        yield passes
        yield self._blocks(model)
        yield _by_label("request_success", "Sequences by how they ended.", "finished_reason", model, stats.finished)
        yield _by_label("admission_rejections", "Requests refused.", "reason", model, stats.rejected)
        yield from self._experts(model)
        versions = GaugeMetricFamily(f"{PREFIX}weights", "Served weights.", labels=["model_name", "version"])
        for info in self._models:
            versions.add_metric([info.model_id, info.weights_version], 1)
        yield versions

    def _blocks(self, model: str) -> Metric:
        cache = self._stats.cache
        blocks = GaugeMetricFamily(f"{PREFIX}kv_cache_blocks", "Blocks by state.", labels=["model_name", "state"])
        for state, count in (("free", cache.free), ("cached", cache.cached), ("used", cache.used)):
            blocks.add_metric([model, state], count)
        return blocks

    def _experts(self, model: str) -> Iterator[Metric]:
        load_LE = self._stats.expert_load
        names = list(map(str, layer_indices(self._models[0] if self._models else None, len(load_LE))))
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
