"""Prometheus text at ``/metrics``: every figure under ``quire:``, and under ``vllm:`` for existing dashboards."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from quire.plugins.metrics.adapter_metrics import AdapterMetrics
from quire.sdk import (
    ENGINE_STATS,
    AdapterActivity,
    MetricsExporter,
    QuarantinedPlugin,
    RequestStats,
    StepFailure,
    StepStats,
)

__all__ = ["PrometheusExporter"]

_PREFIXES = ("quire:", "vllm:")
_TTFT = (0.001, 0.002, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10, 20, 40, 80)
_ITL = (0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2.5)
_E2E = (0.05, 0.1, 0.2, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960)
_QUEUE = (0.001, 0.005, 0.01, 0.05, 0.1, 0.2, 0.5, 1.0, 2.5, 5.0, 10, 20, 40, 80, 160, 320)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000, 200_000)
_STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16_384, 32_768)
_CONTINUATIONS = (1, 2, 5, 10, 20, 50, 100)
_PREEMPTIONS = (0, 1, 2, 3, 4, 5, 10, 20)
_STEP = (1e-5, 2e-5, 5e-5, 1e-4, 1.5e-4, 2e-4, 3e-4, 5e-4, 1e-3, 2e-3, 5e-3, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
_PHASES = {
    "schedule": "Planning a step",
    "launch": "Queueing a step's kernels",
    "device": "A step on the device",
    "wait": "The host waiting for a step's tokens",
    "update": "Taking in a step's tokens",
}
_OLD_NAMES = {"kv_cache_usage_perc": "gpu_cache_usage_perc"}
_BY_POSITION = {
    "spec_decode_drafted_at_": ("spec_decode_num_draft_tokens_per_pos", "Drafted tokens verified, by place"),
    "spec_decode_accepted_at_": ("spec_decode_num_accepted_tokens_per_pos", "Drafted tokens accepted, by place"),
}
"""The engine core counts each place by a name of its own."""
_FINISH_REASONS = ("stop", "length", "abort", "error")
_NOT_AS_REPORTED = ("prompt_tokens_total", "generation_tokens_total", "plugin_quarantines_total", "step_failures_total")
"""Counters of the engine core that are counted here instead: tokens as they reach callers, quarantines with labels."""


class PrometheusExporter(MetricsExporter):
    """Keeps plain numbers, and builds the text when it is scraped. Takes no options."""

    def __init__(self, labels: Mapping[str, str], options: Any = None) -> None:
        super().__init__(labels, options)
        self._engine_stats: dict[str, float] = dict.fromkeys(ENGINE_STATS, 0.0)
        self._prompt = self._generation = 0
        self._finished = dict.fromkeys(_FINISH_REASONS, 0)
        self._ttft = _Histogram(_TTFT)
        self._itl = _Histogram(_ITL)
        self._tpot = _Histogram(_ITL)
        self._e2e = _Histogram(_E2E)
        self._queue = _Histogram(_QUEUE)
        self._phases = {name: _Histogram(_STEP) for name in _PHASES}
        self._inference = _Histogram(_E2E)
        self._prefill = _Histogram(_TTFT)
        self._decode = _Histogram(_E2E)
        self._prompt_len = _Histogram(_TOKENS)
        self._computed_prompt_len = _Histogram(_TOKENS)
        self._generation_len = _Histogram(_TOKENS)
        self._longest_generation_len = _Histogram(_TOKENS)
        self._max_tokens = _Histogram(_TOKENS)
        self._n = _Histogram(_CONTINUATIONS)
        self._preemptions = _Histogram(_PREEMPTIONS)
        self._step_tokens = _Histogram(_STEP_TOKENS)
        self._quarantines: Counter[QuarantinedPlugin] = Counter()
        self._step_failures: Counter[StepFailure] = Counter()
        self._adapters = AdapterMetrics()
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def record_engine(self, stats: Mapping[str, float]) -> None:
        """Keep the latest figures of the engine core."""
        self._engine_stats.update(stats)

    def record_request(self, stats: RequestStats) -> None:
        """Count a finished request, and note its times."""
        self._adapters.record_request(stats)
        self._finished[stats.finish_reason] = self._finished.get(stats.finish_reason, 0) + 1
        self._e2e.add_value(stats.e2e_s)
        self._queue.add_value(stats.queue_s)
        self._prompt_len.add_value(stats.num_prompt_tokens)
        self._generation_len.add_value(stats.num_generation_tokens)
        if stats.mean_tpot_s is not None:
            self._tpot.add_value(stats.mean_tpot_s)
        self._preemptions.add_value(stats.num_preemptions)
        if stats.max_tokens is not None:
            self._max_tokens.add_value(stats.max_tokens)
        if stats.prefill_s is not None and stats.decode_s is not None:
            self._prefill.add_value(stats.prefill_s)
            self._decode.add_value(stats.decode_s)
            self._inference.add_value(stats.prefill_s + stats.decode_s)
            self._computed_prompt_len.add_value(stats.num_prompt_tokens - stats.num_cached_tokens)
        if stats.max_num_generation_tokens is not None:  # the last of the n has ended
            self._n.add_value(stats.n)
            self._longest_generation_len.add_value(stats.max_num_generation_tokens)

    def record_tokens(self, num_prompt: int, num_generated: int, ttft_s: float | None, itl_s: list[float]) -> None:
        """Count tokens, and note the gaps between them."""
        self._prompt += num_prompt
        self._generation += num_generated
        if ttft_s is not None:
            self._ttft.add_value(ttft_s)
        for gap in itl_s:
            self._itl.add_value(gap)

    def record_adapters(self, adapters: Sequence[AdapterActivity], max_loras: int) -> None:
        """Keep which adapters have requests."""
        self._adapters.record_adapters(adapters, max_loras)

    def record_quarantine(self, plugin: QuarantinedPlugin) -> None:
        """Count it by kind, name and reason."""
        self._quarantines[plugin] += 1

    def record_step_failure(self, failure: StepFailure) -> None:
        """Count it by the kind and name of the plugin."""
        self._step_failures[failure] += 1

    def record_step(self, stats: StepStats) -> None:
        """Note a step's size, and where its time went."""
        self._step_tokens.add_value(stats.num_tokens)
        for name, histogram in self._phases.items():
            histogram.add_value(getattr(stats, f"{name}_us") / 1e6)

    def render(self) -> tuple[str, bytes]:
        """The text, in the format that every Prometheus reads."""
        return CONTENT_TYPE_LATEST, generate_latest(self._registry)

    def describe(self) -> Iterable[Metric]:
        """Nothing to check for clashes: the registry is ours alone."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """Every figure, under each prefix."""
        for prefix in _PREFIXES:
            yield from self._collect_engine_metrics(prefix)
            yield from self._collect_request_metrics(prefix)
            yield from self._adapters.collect(prefix, self.labels)

    def _collect_engine_metrics(self, prefix: str) -> Iterator[Metric]:
        for name, value in self._engine_stats.items():
            text = ENGINE_STATS.get(name, name.replace("_", " "))
            if name in _NOT_AS_REPORTED or name.startswith(tuple(_BY_POSITION)):
                continue
            if name.endswith("_total"):
                yield self._make_counter(prefix + name.removesuffix("_total"), text, value)
            else:
                yield self._make_gauge(prefix + name, text, value)
                if name in _OLD_NAMES:
                    yield self._make_gauge(prefix + _OLD_NAMES[name], f"{text} (old name)", value)
        yield from self._collect_cache_rates(prefix)
        yield self._make_cache_config_info(prefix)
        yield from self._collect_by_position(prefix)
        yield self._make_quarantines(prefix)
        yield self._make_step_failures(prefix)
        yield self._make_gauge(prefix + "num_requests_swapped", "Always 0: preempted requests are recomputed", 0.0)

    def _collect_cache_rates(self, prefix: str) -> Iterator[Metric]:
        queries = self._engine_stats.get("prefix_cache_queries_total", 0.0)
        rate = self._engine_stats.get("prefix_cache_hits_total", 0.0) / queries if queries else 0.0
        for name, value, text in (
            ("gpu_prefix_cache_hit_rate", rate, "Share of looked-up tokens found in the prefix cache of the device"),
            # A dashboard with one panel for each tier must not show a cache that works as one that never hits.
            (
                "cpu_prefix_cache_hit_rate",
                rate,
                "Share of looked-up tokens found in any tier; the device is the only one",
            ),
            ("cpu_cache_usage_perc", 0.0, "Share of KV blocks in use on the host, where there are none: 0"),
        ):
            yield self._make_gauge(prefix + name, text, value)

    def _collect_by_position(self, prefix: str) -> Iterator[Metric]:
        for start, (name, text) in _BY_POSITION.items():
            family = CounterMetricFamily(prefix + name, text, labels=[*self.labels, "position"])
            for key, value in self._engine_stats.items():
                if key.startswith(start):
                    position = key.removeprefix(start).removesuffix("_total")
                    family.add_metric([*self.labels.values(), position], value)
            yield family

    def _make_quarantines(self, prefix: str) -> Metric:
        names = ("kind", "name", "reason")
        text = ENGINE_STATS["plugin_quarantines_total"]
        family = CounterMetricFamily(prefix + "plugin_quarantines", text, labels=[*self.labels, *names])
        for plugin, count in self._quarantines.items():
            family.add_metric([*self.labels.values(), plugin.kind, plugin.name, plugin.reason], count)
        return family

    def _make_step_failures(self, prefix: str) -> Metric:
        text = ENGINE_STATS["step_failures_total"]
        family = CounterMetricFamily(prefix + "step_failures", text, labels=[*self.labels, "kind", "name"])
        for failure, count in self._step_failures.items():
            family.add_metric([*self.labels.values(), failure.kind, failure.name], count)
        return family

    def _make_cache_config_info(self, prefix: str) -> Metric:
        sizes = {
            "block_size": "kv_block_size",
            "num_gpu_blocks": "kv_blocks",
            "kv_cache_size_tokens": "kv_cache_size_tokens",
        }
        family = GaugeMetricFamily(
            prefix + "cache_config_info", "Settings of the KV cache, as labels", labels=[*self.labels, *sizes]
        )
        family.add_metric([*self.labels.values(), *(f"{self._engine_stats[n]:.0f}" for n in sizes.values())], 1)
        return family

    def _collect_request_metrics(self, prefix: str) -> Iterator[Metric]:
        yield self._make_counter(prefix + "prompt_tokens", "Prompt tokens of requests that were answered", self._prompt)
        yield self._make_counter(prefix + "generation_tokens", "Tokens generated", self._generation)
        text = "Finished requests, by how they ended"
        success = CounterMetricFamily(prefix + "request_success", text, labels=[*self.labels, "finished_reason"])
        for reason, count in self._finished.items():
            success.add_metric([*self.labels.values(), reason], count)
        yield success
        for name, text, histogram in (
            ("time_to_first_token_seconds", "From arrival to the first token", self._ttft),
            ("inter_token_latency_seconds", "Between one token and the next", self._itl),
            ("time_per_output_token_seconds", "Between one token and the next (old name)", self._itl),
            ("request_time_per_output_token_seconds", "Mean time per token after the first, by request", self._tpot),
            ("e2e_request_latency_seconds", "From arrival to the last token", self._e2e),
            ("request_queue_time_seconds", "From arrival to the first step", self._queue),
            ("request_inference_time_seconds", "From the first step to the last token", self._inference),
            ("request_prefill_time_seconds", "From the first step to the first token", self._prefill),
            ("request_decode_time_seconds", "From the first token to the last", self._decode),
            ("request_prompt_tokens", "Prompt length of finished requests", self._prompt_len),
            ("request_prefill_kv_computed_tokens", "Prompt tokens that were not cached", self._computed_prompt_len),
            ("request_generation_tokens", "Answer length of finished requests", self._generation_len),
            ("request_max_num_generation_tokens", "Longest answer of the n of a request", self._longest_generation_len),
            ("request_params_n", "Parameter n, by request", self._n),
            ("request_params_max_tokens", "Parameter max_tokens, cut to the context", self._max_tokens),
            ("request_num_preemptions", "Preemptions, by request", self._preemptions),
            ("iteration_tokens_total", "Tokens computed in a step", self._step_tokens),
            *((f"step_{name}_seconds", text, self._phases[name]) for name, text in _PHASES.items()),
        ):
            family = HistogramMetricFamily(prefix + name, text, labels=list(self.labels))
            family.add_metric(list(self.labels.values()), histogram.make_buckets(), histogram.total)
            yield family

    def _make_gauge(self, name: str, text: str, value: float) -> Metric:
        family = GaugeMetricFamily(name, text, labels=list(self.labels))
        family.add_metric(list(self.labels.values()), value)
        return family

    def _make_counter(self, name: str, text: str, value: float) -> Metric:
        family = CounterMetricFamily(name, text, labels=list(self.labels))
        family.add_metric(list(self.labels.values()), value)
        return family


class _Histogram:
    """Counts by upper bound; adding costs one bisection."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def add_value(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self.total += value

    def make_buckets(self) -> list[tuple[str, float]]:
        """(upper bound, how many are not above it), as Prometheus wants them."""
        buckets, running = [], 0
        for bound, count in zip([*map(float, self._bounds), float("inf")], self._counts, strict=True):
            running += count
            buckets.append(("+Inf" if bound == float("inf") else repr(bound), float(running)))
        return buckets
