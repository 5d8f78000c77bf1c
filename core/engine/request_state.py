"""What the API process knows of a request that is not over: its text, its tokens, and when they came."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from quire.core.adapters import AdapterRef
from quire.core.engine.detokenizer import Detokenizer
from quire.core.messages import EngineCoreRequest, FinishReason, Logprob, RequestMetrics
from quire.core.sampling_params import SamplingParams
from quire.core.stats import RequestStats

__all__ = ["ChildRequest", "RequestState", "StreamMode"]

StreamMode = Literal["delta", "cumulative", "final"]


@dataclass(slots=True)
class ChildRequest:
    """One of the n continuations."""

    index: int
    detokenizer: Detokenizer | None
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[dict[int, Logprob]] | None = None
    cumulative_logprob: float | None = None
    is_done: bool = False
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    last_token_at: float | None = None
    first_token_at: float | None = None
    queue_s: float = 0.0
    num_preemptions: int = 0

    def record_gaps(self, num_tokens: int, now: float) -> list[float]:
        """Note that ``count`` tokens came; the seconds between them and those before."""
        before, self.last_token_at = self.last_token_at, now
        if before is None:
            self.first_token_at = now
            return [0.0] * (num_tokens - 1)
        return [(now - before) / num_tokens] * num_tokens


@dataclass(slots=True)
class RequestState:
    """One caller's request."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    params: SamplingParams
    """Of its first continuation, as the engine core has them."""
    stream_mode: StreamMode
    metrics: RequestMetrics
    children: dict[int, ChildRequest]
    """By the number of the core request."""
    core_requests: Sequence[EngineCoreRequest] = ()
    """What was sent to the engine core, for another one in its place."""
    shown_token_ids: frozenset[int] = frozenset()
    """Special tokens that ``skip_special_tokens`` does not leave out of the text."""
    is_delivered: bool = False
    """Whether the caller has got any of it."""
    was_restarted: bool = False
    """Whether it runs again, on another engine core than the first."""
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    num_cached_tokens: int = 0
    """Of the prompt, as the first of its continuations found it."""

    @property
    def adapter(self) -> AdapterRef | None:
        """What changes the model for it; None: nothing does."""
        return self.core_requests[0].adapter if self.core_requests else None

    def record_first_token(self, child: ChildRequest, now: float) -> None:
        """Note when the first of its continuations to do so began."""
        if not self.metrics.first_token_ts:
            self.metrics.first_token_ts = self.metrics.last_token_ts = now
            self.metrics.scheduled_ts = min(self.metrics.queued_ts + child.queue_s, now)

    def record_end(self, child: ChildRequest, now: float) -> None:
        """Note that one of its continuations ended."""
        metrics = self.metrics
        metrics.num_generation_tokens += len(child.token_ids)
        metrics.last_token_ts = max(metrics.last_token_ts, child.last_token_at or 0.0)
        if all(each.is_done for each in self.children.values()):
            metrics.finished_ts = now

    def make_stats(self, child: ChildRequest, finish_reason: str, now: float) -> RequestStats:
        """The figures of one continuation that has ended."""
        first, num_tokens = child.first_token_at, len(child.token_ids)
        ttft_s = None if first is None else first - self.metrics.queued_ts
        decode_s = None if first is None or child.last_token_at is None else child.last_token_at - first
        return RequestStats(
            finish_reason=finish_reason,
            num_prompt_tokens=len(self.prompt_token_ids),
            num_cached_tokens=self.num_cached_tokens,
            num_generation_tokens=num_tokens,
            e2e_s=now - self.metrics.queued_ts,
            queue_s=child.queue_s,
            ttft_s=ttft_s,
            mean_tpot_s=None if decode_s is None or num_tokens < 2 else decode_s / (num_tokens - 1),
            prefill_s=None if ttft_s is None else max(ttft_s - child.queue_s, 0.0),
            decode_s=decode_s,
            num_preemptions=child.num_preemptions,
            max_tokens=self.params.max_tokens,
            n=len(self.children),
            max_num_generation_tokens=self._find_longest(),
            adapter=None if self.adapter is None else self.adapter.name,
        )

    def _find_longest(self) -> int | None:
        """Tokens of the longest continuation; None while one of them has not ended."""
        children = self.children.values()
        return max(len(child.token_ids) for child in children) if all(child.is_done for child in children) else None
