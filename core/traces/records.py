"""The lines of a recording: JSON objects, one a line, compressed with zstd.

A recording is the log of an engine core: its lines are in the order in which things happened to the scheduler, so that
a replay in this order repeats every decision. Times are nanoseconds of ``time.monotonic_ns``; ``clock`` holds what the
scheduler and the guard of the policy read of it for the line, in order. Fields that have their default are left out.
"""

from __future__ import annotations

from typing import Any

import msgspec

__all__ = [
    "SCHEMA_VERSION",
    "AbortRecord",
    "ArrivalRecord",
    "DoneRecord",
    "EndRecord",
    "FailRecord",
    "HeaderRecord",
    "PolicyRecord",
    "Record",
    "StepRecord",
]

SCHEMA_VERSION = 1
"""Goes up when a reader of the version before would misunderstand a line. New optional fields do not raise it."""


class HeaderRecord(msgspec.Struct, tag="header", tag_field="event", omit_defaults=True):
    """The first line: which engine was recorded."""

    schema: int
    quire: str
    """Version of Quire."""
    started: str
    """UTC, ISO 8601."""
    origin_ns: int
    """``time.monotonic_ns`` at that moment."""
    model: str
    device: str
    dtype: str
    engine: dict[str, Any]
    """The limits that decide a plan: ``max_num_seqs``, ``max_num_batched_tokens``, ``chunked_prefill``, ``max_queued``,
    ``max_model_len``, ``block_size``, ``num_blocks``, ``watermark``, ``prefix_caching``, ``windows`` (one a group),
    ``speculation`` and ``max_in_flight_steps``."""
    policy: dict[str, Any]
    """``name``, ``target`` and ``options``; beside it those of the executor, which says how steps ran."""
    executor: str = ""


class ArrivalRecord(msgspec.Struct, tag="arrival", tag_field="event", omit_defaults=True):
    """A request reached the engine core."""

    id: int
    arrival_ns: int
    """When the API process had it."""
    seen_ns: int
    """When the engine core had it."""
    prompt_len: int
    max_tokens: int | None = None
    min_tokens: int = 0
    priority: int = 0
    parent: int | None = None
    """The first of the ``n`` continuations of one prompt."""
    hashes: list[int] = []
    """One of each full block of the prompt, which covers all before it; equal prefixes have equal hashes within one
    recording, whose key is not kept. Empty without prefix caching."""
    scheduling: dict[str, Any] = {}
    """What its caller told the policy, by the names of ``SchedulingParams``: its group, its deadline, its tags."""
    refused: str = ""
    """Why it was not queued."""
    prompt: list[int] = []
    """The prompt's tokens, only with ``--record-prompts``."""
    adapter: str = ""
    """The name of its adapter, if it has one."""
    clock: list[int] = []


class AbortRecord(msgspec.Struct, tag="abort", tag_field="event", omit_defaults=True):
    """A request was aborted: its client left, or it met a stop string."""

    id: int
    clock: list[int] = []


class StepRecord(msgspec.Struct, tag="step", tag_field="event", omit_defaults=True):
    """A step was scheduled; or, with ``step`` -1, the policy was asked and nothing could run."""

    step: int
    clock: list[int] = []
    ids: list[int] | None = None
    """Requests in the order of the step; None: those of the step before."""
    tokens: list[int] | None = None
    """Tokens that each computes; None: one each."""
    new: list[tuple[int, int]] = []
    """Requests that were admitted with it, and how many tokens of each were cached."""
    num_decodes: int = 0
    context: int = 0
    """Tokens of KV that its decodes read, together."""
    prefill_pairs: int = 0
    """Pairs of query and key of its other requests, together."""
    drafts: list[int] | None = None
    """Draft tokens that each verifies; None: nowhere any."""
    num_tokens_to_propose: int = 0


class DoneRecord(msgspec.Struct, tag="done", tag_field="event", omit_defaults=True):
    """The output of a step was applied. Times as in ``quire.core.stats.StepStats``, microseconds."""

    step: int
    start_us: float
    schedule_us: float
    launch_us: float
    device_us: float
    wait_us: float
    end_us: float
    update_us: float
    clock: list[int] = []
    sampled: list[int] | None = None
    """Tokens that each request gained; None: one for each that reached its last token."""
    verified: list[int] | None = None
    ran_draft_backfill: bool = False
    held_us: float = 0.0


class FailRecord(msgspec.Struct, tag="fail", tag_field="event", omit_defaults=True):
    """A step failed on the worker, or did not fit into memory and was taken back (``retracted``)."""

    step: int
    retracted: bool = False
    clock: list[int] = []


class PolicyRecord(msgspec.Struct, tag="policy", tag_field="event", omit_defaults=True):
    """Another scheduling policy took over."""

    name: str
    target: str
    options: dict[str, str] = {}
    clock: list[int] = []


class EndRecord(msgspec.Struct, tag="end", tag_field="event", omit_defaults=True):
    """A request left the engine."""

    id: int
    reason: str
    """``stop``, ``length``, ``abort`` or ``error``."""
    output_len: int
    cached: int = 0
    """Prompt tokens that were cached when it was first scheduled."""
    preemptions: int = 0
    hashes: list[int] = []
    """Those of its full blocks behind the ones of ``ArrivalRecord.hashes``."""


Record = HeaderRecord | ArrivalRecord | AbortRecord | StepRecord | DoneRecord | FailRecord | PolicyRecord | EndRecord
"""Any line."""
