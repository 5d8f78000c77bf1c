"""Everything that crosses a boundary, in the order in which a request meets it.

API process -> EngineCoreRequest -> engine core -> SchedulerOutput -> worker -> ModelRunnerOutput -> engine core
-> EngineCoreOutputs -> API process -> RequestOutput. Messages between processes are msgspec structs; those between
the scheduler and the worker hold columns of numpy arrays, because they are made in every step.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from quire.core.adapters import AdapterActivity, AdapterRef
from quire.core.parsing.message import AssistantMessage
from quire.core.sampling_params import SamplingParams
from quire.core.scheduling_params import SchedulingParams
from quire.core.stats import QuarantinedPlugin, StepFailure, StepStats

__all__ = [
    "BlockCopy",
    "BlockDiff",
    "CompletionOutput",
    "EngineCoreOutput",
    "EngineCoreOutputs",
    "EngineCoreRequest",
    "ErrorKind",
    "FinishReason",
    "HostDraft",
    "Logprob",
    "LogprobRows",
    "ModelRunnerOutput",
    "NewRequest",
    "RequestMetrics",
    "RequestOutput",
    "SchedulerOutput",
    "TokenLogprob",
    "TokenMasks",
]

FinishReason = Literal["stop", "length", "abort", "error"]
ErrorKind = Literal["invalid", "queue_full", "deadline_unmeetable", "failed"]
"""Why a request ended with an error: it cannot be served as asked, the queue refuses it, the policy finds that its
answer would come too late, or the engine failed."""


# ---- API process -> engine core ----------------------------------------------------------------------------------


class EngineCoreRequest(msgspec.Struct, array_like=True):
    """One sequence to continue. ``n > 1`` arrives as ``n`` of these, the later ones with ``parent_id`` set."""

    request_id: int
    """A number that the API process gives it and never uses again, whatever ids callers choose."""
    prompt_token_ids: list[int]
    params: SamplingParams
    arrival_ns: int
    """``time.monotonic_ns``, which all processes of a machine share and no correction of its wall clock moves."""
    eos_token_ids: list[int] = []
    """Tokens that end the request unless ``ignore_eos``."""
    priority: int = 0
    """Lower is sooner, as in vLLM."""
    cache_salt: str | None = None
    """Requests share cached prefixes only within one salt."""
    parent_id: int | None = None
    """The request whose prompt KV this one may fork (the first of the ``n > 1``)."""
    external_request_id: str = ""
    """The caller's id, one for all of the ``n > 1``: for policies and messages, never to find a request by."""
    scheduling: SchedulingParams | None = None
    """What the caller tells the batching policy; None: nothing."""
    adapter: AdapterRef | None = None
    """The adapter that changes the model for it; None: none does."""


# ---- engine core -> worker ---------------------------------------------------------------------------------------


@dataclass(slots=True)
class NewRequest:
    """A request that enters the worker's table: at its first grant, or again after a preemption."""

    row: int
    request_id: int
    token_ids: list[int]
    """Every token so far: the prompt, then what was generated before a preemption."""
    prompt_len: int
    num_computed_tokens: int
    """Tokens whose KV is already in the cache (prefix hit or fork)."""
    params: SamplingParams
    seed: int
    """Resolved seed, never None."""
    stop_token_ids: frozenset[int] = frozenset()
    """EOS (unless ignored) and the caller's stop tokens: what ``min_tokens`` forbids."""
    adapter_slot: int = -1
    """Where the worker keeps the request's adapter, for as long as it has the row; -1: none."""


@dataclass(slots=True)
class BlockDiff:
    """Entries ``start ..`` of one row's block table in one group become ``block_ids``."""

    group: int
    row: int
    start: int
    block_ids: list[int]


class BlockCopy(NamedTuple):
    """A block of the KV cache that is copied before the step runs."""

    group: int
    source: int
    destination: int


@dataclass(slots=True)
class HostDraft:
    """Tokens that may follow the first ``base_len`` tokens of a row. Tokens at the first of those positions may have
    been sampled since: where they differ, the worker drops the draft."""

    row: int
    base_len: int
    token_ids: list[int]


@dataclass(slots=True)
class SchedulerOutput:
    """One step, as differences to the step before.

    The worker applies, in this order: ``freed_rows``, ``new_requests``, ``block_diffs``, ``block_copies``; then runs
    ``num_scheduled_tokens[i]`` tokens of row ``rows[i]`` from its first uncomputed position. Grants of one token to
    requests that decode come first (``num_decodes`` of them), then those with drafts.

    Steps that were launched before the scheduler knew that one before them failed still hold the failed step's rows:
    what they write for these goes to block 0, until a new request takes the row. A new request replaces whatever its
    row held, also where the step that freed the row was lost; a row may be named as freed once more.
    """

    step: int
    rows: NDArray[np.int32]  # (num_reqs,)
    num_scheduled_tokens: NDArray[np.int32]  # (num_reqs,)
    sampling_mask: NDArray[np.bool_]  # (num_reqs,) the grant reaches the request's last token, so a new one is sampled
    num_decodes: int
    total_num_scheduled_tokens: int
    max_seq_len: int
    """Upper bound of the context length of any request in the step, its new tokens included."""
    max_seq_lens: NDArray[np.int32]  # (num_reqs,) upper bound of each request's context length; exact without drafts
    new_requests: list[NewRequest] = field(default_factory=list)
    block_diffs: list[BlockDiff] = field(default_factory=list)
    block_copies: list[BlockCopy] = field(default_factory=list)
    freed_rows: list[int] = field(default_factory=list)
    num_draft_tokens: NDArray[np.int32] | None = (
        None  # (num_reqs,) how many of the granted tokens are drafts; None: nowhere any
    )
    host_drafts: list[HostDraft] = field(default_factory=list)
    """Applied after ``block_copies``: what a proposer on the host expects to follow."""
    num_tokens_to_propose: int = 0
    """Tokens that a proposer on the device drafts after the step for each request that sampled."""
    return_drafts: bool = False
    """Whether the host wants to know what a proposer on the device drafted after the step."""
    run_draft_prefill: bool = True
    """Whether a proposer is to read the prompts of the step, and what it has passed over before."""


@dataclass(slots=True)
class TokenMasks:
    """Which tokens may be sampled at some logits rows of a step; at all others every token may."""

    request_indices: NDArray[np.int32]  # (n,) index into the step's requests, ascending
    draft_offsets: NDArray[np.int32]  # (n,) drafts of the request before the logits row, ascending: 0 without drafts
    bits: NDArray[
        np.int32
    ]  # (n, ceil(vocab / 32)), C-contiguous: token t is allowed if bit t % 32 of word t // 32 is 1


# ---- worker -> engine core ---------------------------------------------------------------------------------------


@dataclass(slots=True)
class LogprobRows:
    """Log-probabilities at some positions; column 0 is the chosen token, then the best in order."""

    token_ids: NDArray[np.int32]  # (positions, 1 + k)
    logprobs: NDArray[np.float32]  # (positions, 1 + k)
    ranks: NDArray[np.int32]  # (positions,) rank of the chosen token, 1 is best


@dataclass(slots=True)
class ModelRunnerOutput:
    """What a step sampled, aligned with ``SchedulerOutput.rows``."""

    step: int
    sampled_token_ids: NDArray[np.int32]  # (num_reqs, 1 + k) accepted tokens, left-aligned
    num_sampled_tokens: NDArray[np.int32]  # (num_reqs,) how many of them are real; 0 where none was sampled
    num_verified_drafts: NDArray[np.int32] | None = None  # (num_reqs,) drafts that were verified; None: nowhere any
    logprobs: dict[int, LogprobRows] = field(default_factory=dict)
    """By index into the step, only for requests that asked."""
    prompt_logprobs: dict[int, LogprobRows] = field(default_factory=dict)
    """Positions of the granted chunk whose next token is a prompt token; column 0 is that token."""
    device_us: float = 0.0
    """Time on the device, microseconds; see ``StepStats``."""
    quarantined: list[QuarantinedPlugin] = field(default_factory=list)
    """Plugins of the worker that were quarantined during the step."""
    num_compiled_kernels: int = 0
    """Kernels that had to be compiled to launch the step: none, once the engine is ready."""
    draft_token_ids: NDArray[np.int32] | None = None  # (num_reqs, k) drafts for the next step, -1 behind the last
    ran_draft_backfill: bool = False
    """A proposer read what it had passed over, which ``device_us`` holds too."""
    row_faults: dict[int, int] = field(default_factory=dict)
    """By index into the step: why no token could be sampled (``quire.core.sample.row_faults``). Another token stands in
    its place above, and the request cannot go on."""


# ---- engine core -> API process ----------------------------------------------------------------------------------


class TokenLogprob(msgspec.Struct, array_like=True, gc=False):
    """One position: parallel lists, the chosen token first."""

    token_ids: list[int]
    logprobs: list[float]
    rank: int


class EngineCoreOutput(msgspec.Struct, array_like=True, omit_defaults=True, gc=False):
    """What one request gained in one step, where that is more than tokens; see ``EngineCoreOutputs``."""

    request_id: int
    new_token_ids: list[int]
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    """The stop token that ended it, if it was not EOS."""
    logprobs: list[TokenLogprob] | None = None
    prompt_logprobs: list[TokenLogprob] | None = None
    num_cached_tokens: int = 0
    error: str | None = None
    """The reason, where ``finish_reason`` is ``error``."""
    error_kind: ErrorKind = "failed"
    """Which error the caller gets for it."""
    queue_ns: int = 0
    """Time from arrival to first grant; sent with the first token."""
    num_preemptions: int = 0
    """How often the request was preempted so far; the first token after a preemption is sent as such an object."""


class EngineCoreOutputs(msgspec.Struct, array_like=True, omit_defaults=True):
    """Everything one step produced. Most requests gain tokens and nothing else: they are columns, not objects."""

    outputs: list[EngineCoreOutput] = []
    """Requests of which there is more to say: a first token, an end, log-probabilities."""
    request_ids: list[int] = []
    """The other requests, none of them twice or in ``outputs``."""
    new_token_ids: list[int] = []
    """Their tokens, one request's after another's."""
    num_new_tokens: list[int] = []
    """How many tokens each gained; empty: one each."""
    stats: dict[str, float] | None = None
    """Gauges and counters of the engine core, for ``/metrics`` and ``/load``."""
    quarantined: list[QuarantinedPlugin] = []
    """Every plugin of the engine core that is quarantined, oldest first; sent with ``stats``."""
    step_failures: list[StepFailure] = []
    """Steps that failed since the last message."""
    steps: list[StepStats] = []
    """The steps that were finished since the last message."""
    adapters: list[AdapterActivity] = []
    """Those that have requests; sent with ``stats``."""

    def iter_new_tokens(self) -> Iterator[tuple[int, list[int]]]:
        """The columns as (request, its tokens)."""
        if not self.num_new_tokens:
            yield from zip(self.request_ids, ([token] for token in self.new_token_ids), strict=True)
            return
        end = 0
        for request_id, count in zip(self.request_ids, self.num_new_tokens, strict=True):
            end += count
            yield request_id, self.new_token_ids[end - count : end]

    def expand_outputs(self) -> list[EngineCoreOutput]:
        """An object for every request, for code that looks at few of them."""
        return [*self.outputs, *(EngineCoreOutput(*pair) for pair in self.iter_new_tokens())]


# ---- API process -> caller ---------------------------------------------------------------------------------------


@dataclass(slots=True)
class Logprob:
    """A token that was chosen at some position, or could have been."""

    logprob: float
    """Of the model's raw distribution, before penalties and temperature."""
    rank: int | None = None
    """How likely the token is among all, 1 being the likeliest; None for a token of ``logprob_token_ids``, unless it
    was chosen."""
    decoded_token: str | None = None
    """What the token adds to a text, a space before it included; None with ``detokenize=False``."""


@dataclass(slots=True)
class CompletionOutput:
    """One of the ``n`` continuations. When streaming with deltas, ``text`` and ``token_ids`` hold the new part."""

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    """For each token, by id: the chosen token first, then the best in order."""
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    message: AssistantMessage | None = None
    """Of ``LLM.chat``: the text as content, reasoning and tool calls."""

    def finished(self) -> bool:
        """Whether it has ended."""
        return self.finish_reason is not None


@dataclass(slots=True)
class RequestMetrics:
    """When things happened to a request, with the names of vLLM's ``RequestMetrics`` and ``RequestStateStats``.

    Those in ``_ts`` are seconds of ``time.monotonic``, 0.0 until it happened; those in ``_time`` are ``time.time``,
    None until it happened. One object for all outputs of a request, written when its first token comes and when one of
    its ``n`` continuations ends.
    """

    arrival_time: float
    queued_ts: float
    """When it arrived."""
    scheduled_ts: float = 0.0
    """When a step computed the first of its tokens."""
    first_token_ts: float = 0.0
    last_token_ts: float = 0.0
    finished_ts: float = 0.0
    """When the last of its continuations ended."""
    num_generation_tokens: int = 0
    """Of the continuations that have ended."""

    @property
    def first_scheduled_time(self) -> float | None:
        """``scheduled_ts`` on the wall clock."""
        return self._to_wall_clock(self.scheduled_ts)

    @property
    def first_token_time(self) -> float | None:
        """``first_token_ts`` on the wall clock."""
        return self._to_wall_clock(self.first_token_ts)

    @property
    def last_token_time(self) -> float | None:
        """``last_token_ts`` on the wall clock."""
        return self._to_wall_clock(self.last_token_ts)

    @property
    def finished_time(self) -> float | None:
        """``finished_ts`` on the wall clock."""
        return self._to_wall_clock(self.finished_ts)

    @property
    def time_in_queue(self) -> float | None:
        """Seconds between its arrival and the first step that computed some of it."""
        return self.scheduled_ts - self.queued_ts if self.scheduled_ts else None

    @property
    def first_token_latency(self) -> float:
        """Seconds to its first token; 0.0 until then."""
        return self.first_token_ts - self.queued_ts if self.first_token_ts else 0.0

    def _to_wall_clock(self, timestamp: float) -> float | None:
        return self.arrival_time + (timestamp - self.queued_ts) if timestamp else None


@dataclass(slots=True)
class RequestOutput:
    """What a caller of ``LLM`` and ``AsyncLLM`` receives."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    """For each token of the prompt, by id: that token first, then the best in order. ``None`` for the first position,
    which nothing predicts."""
    num_cached_tokens: int = 0
    metrics: RequestMetrics | None = None
