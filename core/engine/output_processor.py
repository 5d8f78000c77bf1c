"""From tokens to what callers receive: text, stop strings, the n continuations of a request; and request metrics."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from quire.core.engine.detokenizer import Detokenizer
from quire.core.engine.exporter_group import ExporterGroup
from quire.core.engine.logprobs import make_logprobs
from quire.core.engine.request_state import ChildRequest, RequestState, StreamMode
from quire.core.engine.tokenizer import Tokenizer
from quire.core.errors import (
    DeadlineUnmeetableError,
    InvalidRequestError,
    QueueFullError,
    QuireError,
    RequestFailedError,
)
from quire.core.messages import (
    CompletionOutput,
    EngineCoreOutput,
    EngineCoreOutputs,
    EngineCoreRequest,
    ErrorKind,
    FinishReason,
    Logprob,
    RequestMetrics,
    RequestOutput,
)

__all__ = ["FailedRequest", "OutputProcessor", "ProcessedOutputs"]

_log = logging.getLogger("quire.engine")


@dataclass(frozen=True, slots=True)
class FailedRequest:
    """A request that ends with an error."""

    error: str
    error_kind: ErrorKind
    output: RequestOutput
    """What there was of it, with the finish reason ``error``."""

    @property
    def request_id(self) -> str:
        """The caller's id."""
        return self.output.request_id

    def to_exception(self) -> QuireError:
        """The error that the caller of the request gets."""
        cls: type[QuireError] = {
            "invalid": InvalidRequestError,
            "queue_full": QueueFullError,
            "deadline_unmeetable": DeadlineUnmeetableError,
            "failed": RequestFailedError,
        }[self.error_kind]
        return cls(self.error)


@dataclass(slots=True)
class ProcessedOutputs:
    """What came of one batch of outputs."""

    request_outputs: list[RequestOutput] = field(default_factory=list)
    requests_to_abort: list[int] = field(default_factory=list)
    """Core requests to end that the engine core still runs: a stop string was found, or a sibling failed."""
    failed_requests: list[FailedRequest] = field(default_factory=list)
    """Requests that the engine core refused or could not finish; they are removed."""


class OutputProcessor:
    """Holds the state of every unfinished request of this process."""

    def __init__(self, tokenizer: Tokenizer, exporters: ExporterGroup) -> None:
        self._tokenizer = tokenizer
        self._exporters = exporters
        self._request_states: dict[str, RequestState] = {}
        # By number: an output that comes late cannot meet a later request to which the caller gave the same id.
        self._state_of_core_request: dict[int, RequestState] = {}

    def __len__(self) -> int:
        return len(self._request_states)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._request_states

    def add_request(
        self,
        request_id: str,
        prompt: str | None,
        requests: Sequence[EngineCoreRequest],
        mode: StreamMode,
        shown_token_ids: frozenset[int] = frozenset(),
    ) -> None:
        """Expect outputs for these core requests. ``shown_token_ids`` are special tokens that ``skip_special_tokens``
        does not leave out of their text."""
        queued_ts = requests[0].arrival_ns / 1e9  # from which the engine core counts as well
        metrics = RequestMetrics(time.time() - (time.monotonic() - queued_ts), queued_ts)
        ids, params = requests[0].prompt_token_ids, requests[0].params
        children = {
            r.request_id: ChildRequest(i, self._make_detokenizer(r, ids, shown_token_ids))
            for i, r in enumerate(requests)
        }
        state = RequestState(
            request_id, prompt, ids, params, mode, metrics, children, requests, shown_token_ids=shown_token_ids
        )
        self._request_states[request_id] = state
        self._state_of_core_request.update(dict.fromkeys(children, state))

    def remove_request(self, request_id: str, finish_reason: FinishReason = "abort") -> list[int]:
        """Drop the state of a request; returns its core requests that have not ended."""
        state = self._request_states.pop(request_id, None)
        if state is None:
            return []
        for core_id in state.children:
            self._state_of_core_request.pop(core_id, None)
        unfinished = [core_id for core_id, child in state.children.items() if not child.is_done]
        for core_id in unfinished:
            state.children[core_id].is_done = True
            self._record_finished(state, state.children[core_id], finish_reason, time.monotonic())
        return unfinished

    def remove_lost_requests(self) -> list[str]:
        """The engine core is gone: drop the requests that cannot run again, as ended with an error. Returns their ids.

        Those are the ones of which callers have got something, and the ones that have run again once before: it may
        be them by which engines hang or die.
        """
        states = self._request_states.items()
        lost = [request_id for request_id, state in states if state.is_delivered or state.was_restarted]
        for request_id in lost:
            self.remove_request(request_id, "error")
        return lost

    def restart_requests(self) -> list[list[EngineCoreRequest]]:
        """For another engine core: the core requests that have not ended, by request, as they were first sent. Whatever
        came of them is forgotten; a request with a seed, and one without, gets the same tokens again."""
        restarted = []
        for state in self._request_states.values():
            state.was_restarted = True
            unfinished = [r for r in state.core_requests if not state.children[r.request_id].is_done]
            for request in unfinished:
                before = state.children[request.request_id]
                detokenizer = self._make_detokenizer(request, state.prompt_token_ids, state.shown_token_ids)
                # Its first token was counted, and came when it came.
                again = ChildRequest(
                    before.index,
                    detokenizer,
                    first_token_at=before.first_token_at,
                    last_token_at=before.last_token_at,
                    queue_s=before.queue_s,
                )
                state.children[request.request_id] = again
            restarted.append(unfinished)
        return restarted

    def process_outputs(self, outputs: EngineCoreOutputs) -> ProcessedOutputs:
        """Process one step's outputs. Those of requests that were removed are passed over."""
        processed = ProcessedOutputs()
        now = time.monotonic()
        gaps: list[float] = []
        for output in outputs.outputs:
            state = self._state_of_core_request.get(output.request_id)
            if state is not None and not state.children[output.request_id].is_done:
                try:
                    self._process_output(state, state.children[output.request_id], output, processed, now)
                except Exception as error:
                    self._fail_request(state, error, processed)
        for core_id, tokens in outputs.iter_new_tokens():
            state = self._state_of_core_request.get(core_id)
            if state is None:
                continue
            child = state.children[core_id]
            if not child.is_done:
                try:
                    stopped_early = self._append_tokens(child, tokens, None)
                    gaps += child.record_gaps(len(tokens), now)
                    if stopped_early:
                        processed.requests_to_abort.append(core_id)
                        self._record_finished(state, child, "stop", now)
                    self._emit_request_output(state, child, tokens, None, processed)
                except Exception as error:
                    self._fail_request(state, error, processed)
        if gaps:
            self._exporters.record_tokens(0, len(gaps), None, gaps)
        return processed

    def _make_detokenizer(
        self, request: EngineCoreRequest, prompt_token_ids: list[int], shown_token_ids: frozenset[int]
    ) -> Detokenizer | None:
        params = request.params
        if not params.detokenize:
            return None
        return Detokenizer(self._tokenizer, prompt_token_ids, params, shown_token_ids)

    def _fail_request(self, state: RequestState, error: Exception, processed: ProcessedOutputs) -> None:
        """The outputs of one request cannot be processed: it ends, and the others go on."""
        _log.error("the outputs of request %s cannot be processed", state.request_id, exc_info=error)
        processed.requests_to_abort.extend(self.remove_request(state.request_id))
        message = "its outputs could not be processed; the server's log says why"
        processed.failed_requests.append(FailedRequest(message, "failed", self._make_failed_output(state)))

    def _process_output(
        self,
        state: RequestState,
        child: ChildRequest,
        output: EngineCoreOutput,
        processed: ProcessedOutputs,
        now: float,
    ) -> None:
        """Process an output that holds more than tokens: a first token, an end, log-probabilities."""
        if output.finish_reason == "error":
            child.is_done = True
            self._record_finished(state, child, "error", now)
            processed.requests_to_abort.extend(self.remove_request(state.request_id))
            error = output.error or "the engine could not finish this request"
            failed = FailedRequest(error, output.error_kind, self._make_failed_output(state))
            processed.failed_requests.append(failed)
            return
        token_ids = output.new_token_ids
        child.stop_reason = output.stop_reason
        if child.index == 0:  # its siblings find in the cache what it has computed, which says nothing of the prompt
            state.num_cached_tokens = max(state.num_cached_tokens, output.num_cached_tokens)
        child.queue_s = max(child.queue_s, output.queue_ns / 1e9)
        child.num_preemptions = max(child.num_preemptions, output.num_preemptions)
        if output.prompt_logprobs is not None:
            state.prompt_logprobs = [None, *make_logprobs(output.prompt_logprobs, self._token_texts(state))]
        if self._append_tokens(child, token_ids, output.finish_reason):
            processed.requests_to_abort.append(output.request_id)
        logprobs = None
        if output.logprobs:
            positions = output.logprobs[: len(token_ids)]
            are_best = not state.params.logprob_token_ids
            logprobs = make_logprobs(positions, self._token_texts(state), are_best=are_best)
            child.logprobs = [] if child.logprobs is None else child.logprobs
            child.logprobs += logprobs
            child.cumulative_logprob = (child.cumulative_logprob or 0.0) + sum(p.logprobs[0] for p in positions)
        if token_ids:
            self._record_tokens(state, child, len(token_ids), now)
        if child.is_done:
            self._record_finished(state, child, child.finish_reason or "stop", now)
        self._emit_request_output(state, child, token_ids, logprobs, processed)

    def _token_texts(self, state: RequestState) -> Mapping[int, str] | None:
        return self._tokenizer.token_texts if state.params.detokenize else None

    def _append_tokens(self, child: ChildRequest, token_ids: list[int], finish_reason: FinishReason | None) -> bool:
        """Add tokens, which the engine core ended with ``finish_reason``; True if a stop string ended them first. Those
        behind a stop string (accepted drafts) are removed from ``token_ids``: nothing that follows counts them."""
        child.finish_reason = finish_reason
        stop_string = None
        if child.detokenizer is not None:
            stop_string = child.detokenizer.append_tokens(token_ids, finish_reason == "stop")
            if stop_string is not None:
                del token_ids[child.detokenizer.num_tokens - len(child.token_ids) :]
            elif finish_reason is not None:
                stop_string = child.detokenizer.flush()
            if stop_string is not None:
                child.finish_reason, child.stop_reason = "stop", stop_string
        child.token_ids += token_ids
        child.is_done = child.finish_reason is not None
        return stop_string is not None and finish_reason is None

    def _emit_request_output(
        self,
        state: RequestState,
        child: ChildRequest,
        token_ids: list[int],
        logprobs: list[dict[int, Logprob]] | None,
        processed: ProcessedOutputs,
    ) -> None:
        """Add what the caller receives of these tokens, if anything; a request that is over is removed."""
        finished = child.is_done and all(c.is_done for c in state.children.values())
        if state.stream_mode == "delta":
            text = child.detokenizer.take_delta(child.is_done) if child.detokenizer else ""
            if not (text or token_ids or child.is_done):
                return
            outputs = [self._make_completion_output(child, text, token_ids, logprobs)]
        elif state.stream_mode == "cumulative" or finished:
            outputs = [self._make_cumulative_output(c) for c in state.children.values()]
        else:
            return
        state.is_delivered = True
        processed.request_outputs.append(_make_request_output(state, outputs, finished))
        if finished:
            self.remove_request(state.request_id)

    def _make_failed_output(self, state: RequestState) -> RequestOutput:
        for child in state.children.values():
            child.finish_reason = child.finish_reason or "error"
        return _make_request_output(state, [self._make_cumulative_output(c) for c in state.children.values()], True)

    def _make_cumulative_output(self, child: ChildRequest) -> CompletionOutput:
        text = child.detokenizer.visible_text(child.is_done) if child.detokenizer else ""
        logprobs = None if child.logprobs is None else list(child.logprobs)
        return self._make_completion_output(child, text, list(child.token_ids), logprobs)

    def _make_completion_output(
        self, child: ChildRequest, text: str, token_ids: list[int], logprobs: list[dict[int, Logprob]] | None
    ) -> CompletionOutput:
        return CompletionOutput(
            index=child.index,
            text=text,
            token_ids=token_ids,
            cumulative_logprob=child.cumulative_logprob,
            logprobs=logprobs,
            finish_reason=child.finish_reason,
            stop_reason=child.stop_reason,
        )

    def _record_tokens(self, state: RequestState, child: ChildRequest, num_tokens: int, now: float) -> None:
        is_first = child.first_token_at is None
        if is_first:
            state.record_first_token(child, now)
        gaps = child.record_gaps(num_tokens, now)
        num_prompt_tokens = len(state.prompt_token_ids) if is_first and child.index == 0 else 0
        ttft_s = now - state.metrics.queued_ts if is_first else None
        self._exporters.record_tokens(num_prompt_tokens, num_tokens, ttft_s, gaps)

    def _record_finished(self, state: RequestState, child: ChildRequest, finish_reason: str, now: float) -> None:
        state.record_end(child, now)
        self._exporters.record_request(state.make_stats(child, finish_reason, now))


def _make_request_output(state: RequestState, outputs: list[CompletionOutput], finished: bool) -> RequestOutput:
    return RequestOutput(
        request_id=state.request_id,
        prompt=state.prompt,
        prompt_token_ids=state.prompt_token_ids,
        outputs=outputs,
        finished=finished,
        prompt_logprobs=state.prompt_logprobs,
        num_cached_tokens=state.num_cached_tokens,
        metrics=state.metrics,
    )
