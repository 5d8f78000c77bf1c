"""What LoRA adapters are asked for, by adapter."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from quire.sdk import AdapterActivity, RequestStats

__all__ = ["AdapterMetrics"]

_MAX_NAMES = 64
"""Adapters with counters of their own. Names come from callers, and each is a time series for ever."""
_MAX_LISTED = 16
_OTHERS = "other"
_COUNTERS = {
    "lora_requests": "Finished requests of a LoRA adapter",
    "lora_prompt_tokens": "Prompt tokens of finished requests of a LoRA adapter",
    "lora_generation_tokens": "Tokens generated for finished requests of a LoRA adapter",
}


class AdapterMetrics:
    """Counts finished requests and their tokens by adapter, those beyond the first 64 together as ``other``; and shows
    which adapters have requests, as vLLM does."""

    def __init__(self) -> None:
        self._counts: dict[str, list[int]] = {}  # in the order of ``_COUNTERS``
        self._activity: Sequence[AdapterActivity] = ()
        self._max_loras = 0
        self._recorded_at = 0.0

    def record_adapters(self, adapters: Sequence[AdapterActivity], max_loras: int) -> None:
        """Keep which adapters have requests."""
        self._activity, self._max_loras, self._recorded_at = adapters, max_loras, time.time()

    def record_request(self, stats: RequestStats) -> None:
        """Count a finished request."""
        if stats.adapter is None:
            return
        name = stats.adapter if stats.adapter in self._counts or len(self._counts) < _MAX_NAMES else _OTHERS
        counts = self._counts.setdefault(name, [0] * len(_COUNTERS))
        for index, value in enumerate((1, stats.num_prompt_tokens, stats.num_generation_tokens)):
            counts[index] += value

    def collect(self, prefix: str, labels: Mapping[str, str]) -> Iterator[Metric]:
        """The families; none where there are no adapters."""
        if not self._max_loras:
            return
        names = {
            "running_lora_adapters": [each.name for each in self._activity if each.num_running],
            "waiting_lora_adapters": [each.name for each in self._activity if each.num_waiting],
        }
        info = GaugeMetricFamily(
            prefix + "lora_requests_info",
            "Adapters that have requests, as labels; the value is when that was so",
            labels=[*labels, *names, "max_lora"],
        )
        listed = [",".join(of_kind[:_MAX_LISTED]) for of_kind in names.values()]
        info.add_metric([*labels.values(), *listed, str(self._max_loras)], self._recorded_at)
        yield info
        for index, (name, text) in enumerate(_COUNTERS.items()):
            family = CounterMetricFamily(prefix + name, text, labels=[*labels, "lora_adapter"])
            for adapter, counts in self._counts.items():
                family.add_metric([*labels.values(), adapter], counts[index])
            yield family
