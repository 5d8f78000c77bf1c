"""The line of throughput in the server's log, every ten seconds while there is traffic."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping

__all__ = ["ThroughputLog", "log_throughput"]

_log = logging.getLogger("quire.stats")
_INTERVAL_S = 10.0


async def log_throughput(get_stats: Callable[[], Mapping[str, float]], interval_s: float = _INTERVAL_S) -> None:
    """Log a line each ``interval_s``, until it is cancelled. ``get_stats`` gives the latest figures of the engine, by
    the names of ``quire.core.stats.ENGINE_STATS``: steps do nothing for it."""
    throughput = ThroughputLog(get_stats(), time.monotonic())
    while True:
        await asyncio.sleep(interval_s)
        if (line := throughput.make_line(get_stats(), time.monotonic())) is not None:
            _log.info("%s", line)


class ThroughputLog:
    """Makes the lines, in the words of vLLM's, from the counters of the engine at two times."""

    def __init__(self, stats: Mapping[str, float], now: float) -> None:
        self._last = dict(stats)
        self._last_time = now
        self._hit_rate = 0.0
        self._was_idle = True

    def make_line(self, stats: Mapping[str, float], now: float) -> str | None:
        """What happened since the last call. None while there is no traffic, but for the first time after some."""
        gained = {name: self._subtract_last(stats, name) for name in stats if name.endswith("_total")}
        seconds = now - self._last_time
        self._last, self._last_time = dict(stats), now
        prompt, generated = gained.get("prompt_tokens_total", 0.0), gained.get("generation_tokens_total", 0.0)
        running, waiting = stats.get("num_requests_running", 0.0), stats.get("num_requests_waiting", 0.0)
        if looked_up := gained.get("prefix_cache_queries_total", 0.0):
            self._hit_rate = gained.get("prefix_cache_hits_total", 0.0) / looked_up
        is_idle = not (prompt or generated or running or waiting)
        if is_idle and self._was_idle:
            return None
        self._was_idle = is_idle
        line = (
            f"Avg prompt throughput: {prompt / seconds:.1f} tokens/s, "
            f"Avg generation throughput: {generated / seconds:.1f} tokens/s, "
            f"Running: {running:.0f} reqs, Waiting: {waiting:.0f} reqs, "
            f"GPU KV cache usage: {stats.get('kv_cache_usage_perc', 0.0):.1%}, "
            f"Prefix cache hit rate: {self._hit_rate:.1%}"
        )
        return line + _describe_drafts(gained)

    def _subtract_last(self, stats: Mapping[str, float], name: str) -> float:
        before = self._last.get(name, 0.0)
        return stats[name] - before if stats[name] >= before else stats[name]  # of another engine, which began at 0


def _describe_drafts(gained: Mapping[str, float]) -> str:
    drafts = gained.get("spec_decode_num_drafts_total", 0.0)
    drafted = gained.get("spec_decode_num_draft_tokens_total", 0.0)
    if not drafts or not drafted:
        return ""
    accepted = gained.get("spec_decode_num_accepted_tokens_total", 0.0)
    return f", Mean acceptance length: {1 + accepted / drafts:.2f}, Avg draft acceptance rate: {accepted / drafted:.1%}"
