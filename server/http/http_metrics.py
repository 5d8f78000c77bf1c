"""What ``/metrics`` says of the HTTP server itself: its requests, as vLLM's server counts them, and its process, as
every Prometheus client does."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry
    from prometheus_client.core import Metric

__all__ = ["HttpMetrics"]

_UNCOUNTED_HANDLERS = frozenset({"/metrics", "/metrics/{name:path}", "/health", "/load", "/ping", "/version"})
"""Those of probes, as in vLLM."""
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_NO_HANDLER = "none"
_SECONDS = (0.1, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
"""The first three are vLLM's."""


class HttpMetrics:
    """Counts by the path of a route as it is declared, by method and by class of status: labels of which there are few,
    whatever clients send."""

    def __init__(self) -> None:
        self._num_requests: Counter[tuple[str, str, str]] = Counter()
        self._durations: dict[tuple[str, str], _Durations] = {}
        self._registry: CollectorRegistry | None = None

    def record_request(self, handler: str | None, method: str, status: int, seconds: float) -> None:
        """A request has been answered to its end. ``handler``: the path of its route; None where there is none."""
        handler = handler or _NO_HANDLER
        if handler in _UNCOUNTED_HANDLERS:
            return
        method = method if method in _METHODS else "other"
        self._num_requests[handler, method, f"{status // 100}xx"] += 1
        durations = self._durations.get((handler, method))
        if durations is None:
            durations = self._durations[handler, method] = _Durations()
        durations.add(seconds)

    def render(self) -> bytes:
        """In Prometheus's text format."""
        from prometheus_client import CollectorRegistry, ProcessCollector
        from prometheus_client.exposition import generate_latest

        if self._registry is None:
            self._registry = CollectorRegistry()
            ProcessCollector(registry=self._registry)
            self._registry.register(self)
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """Both figures of requests."""
        from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily

        requests = CounterMetricFamily(
            "http_requests", "Total number of requests by method, status and handler.",
            labels=("handler", "method", "status"),
        )  # fmt: skip
        for labels, count in sorted(self._num_requests.items()):
            requests.add_metric(labels, count)
        durations = HistogramMetricFamily(
            "http_request_duration_seconds", "Time from a request to the end of its answer, by handler and method.",
            labels=("handler", "method"),
        )  # fmt: skip
        for names, each in sorted(self._durations.items()):
            durations.add_metric(names, each.list_buckets(), each.total)
        yield requests
        yield durations


class _Durations:
    """A histogram of seconds."""

    def __init__(self) -> None:
        self.total = 0.0
        self._counts = [0] * (len(_SECONDS) + 1)

    def add(self, seconds: float) -> None:
        self.total += seconds
        self._counts[bisect_left(_SECONDS, seconds)] += 1

    def list_buckets(self) -> list[tuple[str, float]]:
        """Bounds and how many are at or below them."""
        buckets, count = [], 0
        for bound, added in zip((*map(str, _SECONDS), "+Inf"), self._counts, strict=True):
            count += added
            buckets.append((bound, float(count)))
        return buckets
