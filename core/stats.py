"""Statistics of the engine, of its steps and of requests, and the names of metrics."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

__all__ = ["ENGINE_STATS", "TRACED_STEPS", "QuarantinedPlugin", "RequestStats", "StepFailure", "StepStats"]

TRACED_STEPS = 4096
"""How many of the last steps are kept."""

ENGINE_STATS: dict[str, str] = {
    "num_requests_running": "Requests in the running batch",
    "num_requests_waiting": "Requests in the queue",
    "kv_cache_usage_perc": "Share of the KV blocks in use, 0 to 1",
    "kv_blocks": "Blocks of the KV cache in each group, the padding block included",
    "kv_block_size": "Tokens in a block",
    "kv_cache_size_tokens": "Tokens that the KV cache holds",
    "num_preemptions_total": "Requests preempted because blocks ran out",
    "prefix_cache_queries_total": "Tokens looked up in the prefix cache",
    "prefix_cache_hits_total": "Tokens found in the prefix cache",
    "prompt_tokens_total": "Prompt tokens computed or found cached",
    "generation_tokens_total": "Tokens generated",
    "steps_total": "Engine steps",
    "spec_decode_num_drafts_total": "Drafts verified, of one token or more",
    "spec_decode_num_draft_tokens_total": "Drafted tokens verified",
    "spec_decode_num_accepted_tokens_total": "Drafted tokens accepted",
    "spec_decode_draft_acceptance_rate": "Share of the drafted tokens that were accepted",
    "spec_decode_efficiency": "Tokens that a request gained in a step that verified a draft",
    "spec_decode_num_speculative_tokens": "Most tokens drafted for a request, now",
    "structured_output_compilations_total": "Schemas and grammars compiled in the engine core",
    "structured_output_compile_seconds_total": "Time that took, outside of steps",
    "structured_output_cache_hits_total": "Requests whose schema or grammar was compiled already",
    "structured_output_refused_total": "Requests refused because their schema or grammar could not be compiled",
    "structured_output_masks_total": "Masks of tokens filled",
    "structured_output_mask_seconds_total": "Time that took, beside the model",
    "lora_adapters_in_slots": "LoRA adapters on the device",
    "lora_adapters_in_host_memory": "LoRA adapters in host memory",
    "lora_requests_waiting_for_load": "Requests that wait for their adapter to be read",
    "lora_requests_waiting_for_slot": "Requests that wait for a slot for their adapter",
    "lora_loads_total": "Adapters copied into a slot",
    "lora_evictions_total": "Adapters that lost their slot",
    "lora_host_evictions_total": "Adapters dropped from host memory to make room",
    "out_of_memory_total": "Steps that did not fit into device memory and were retried smaller",
    "step_failures_total": "Steps that failed, and ended their requests with an error",
    "kernels_compiled_total": "Kernels compiled under traffic, each a stall",
    "engine_restarts_total": "Engine processes started in place of one that hung or died",
    "plugin_quarantines_total": "Plugins quarantined after a fault",
}
"""Name -> help, as the engine core reports them, those of ``spec_decode`` only where drafts are made, and those of
``lora`` where there are adapters. Names ending in ``_total`` are monotonic counters, others gauges."""


class QuarantinedPlugin(msgspec.Struct, array_like=True, frozen=True):
    """A plugin that is not called any more."""

    kind: str
    name: str
    reason: str
    """``raised``, ``invalid_result``, ``too_slow``, ``no_progress`` or ``hung``."""


class StepFailure(msgspec.Struct, array_like=True, frozen=True):
    """A step that failed, and the plugin in which."""

    kind: str
    """Empty if it was in none; ``request`` if a request brought it about, which says nothing of the others."""
    name: str
    """Of a request: ``constraints`` or ``adapter``."""


class StepStats(msgspec.Struct, array_like=True):
    """One engine step: its shape, and where its time went. Times in microseconds, from one monotonic clock."""

    step: int
    num_reqs: int
    num_decodes: int
    num_tokens: int
    start_us: float
    """When the scheduler began with it."""
    schedule_us: float
    """Scheduling it."""
    launch_us: float
    """From its schedule to the last kernel queued; on a CPU, to handing the step over. Without ``held_us``."""
    device_us: float
    """On the device: between the step's first and last kernel, or on a CPU the time it took."""
    wait_us: float
    """The host waited for the step's tokens. Near zero where the host is slower than the device."""
    end_us: float
    """When the host had its tokens."""
    update_us: float
    """Updating requests, blocks and outputs with the tokens."""
    num_drafts: int = 0
    """Draft tokens verified."""
    num_accepted: int = 0
    """Of those, accepted: tokens gained beyond one for each request."""
    held_us: float = 0.0
    """Within launching a step with grammars, between its model and its sampling: reading the step before, and masks."""
    masks_us: float = 0.0
    """Of that, making the masks."""


@dataclass(frozen=True, slots=True)
class RequestStats:
    """A finished request, as the API process saw it. Times in seconds."""

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
    prefill_s: float | None = None
    """From its first step to its first token; None if it ended before that."""
    decode_s: float | None = None
    """From its first token to its last; None if it ended before its first."""
    num_preemptions: int = 0
    """How often it was preempted before its last token."""
    max_tokens: int | None = None
    """The most tokens that it could get: the parameter of that name, cut to what the context holds."""
    n: int = 1
    """The parameter of that name: how many continuations the caller asked for, each of which has such statistics."""
    max_num_generation_tokens: int | None = None
    """Tokens of the longest of the ``n`` continuations, told with the last of them to end; None with the others."""
    adapter: str | None = None
    """The name of its LoRA adapter; None: the model alone answered."""
