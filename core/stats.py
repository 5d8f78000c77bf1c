"""Figures about steps and requests, and their names."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["ENGINE_STATS", "RequestStats"]

ENGINE_STATS: dict[str, str] = {
    "num_requests_running": "Requests in the running batch",
    "num_requests_waiting": "Requests in the queue",
    "kv_cache_usage_perc": "Share of the KV blocks in use, 0 to 1",
    "num_preemptions_total": "Requests preempted because blocks ran out",
    "prefix_cache_queries_total": "Tokens looked up in the prefix cache",
    "prefix_cache_hits_total": "Tokens found in the prefix cache",
    "prompt_tokens_total": "Prompt tokens computed or found cached",
    "generation_tokens_total": "Tokens generated",
    "steps_total": "Engine steps",
    "policy_quarantines_total": "Batching policies replaced after misbehaving",
    "plugin_quarantines_total": "Other plugins switched off after misbehaving",
}
"""Name -> help, as the engine core reports them. Names ending in ``_total`` are monotonic counters, others gauges."""


@dataclass(frozen=True, slots=True)
class RequestStats:
    """A finished request, as its front saw it. Times in seconds."""

    finish_reason: str
    num_prompt_tokens: int
    num_cached_tokens: int
    num_generation_tokens: int
    e2e_s: float
    queue_s: float
    ttft_s: float | None
    """None if it ended before its first token."""
    mean_tpot_s: float | None
    """Mean time per token after the first; None with fewer than two."""
