"""From tokens to what callers receive: text, stop strings, the n continuations of a request, request figures."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from quire.core.contracts.metrics import MetricsExporter
from quire.core.engine.detokenizer import Detokenizer
from quire.core.engine.request_state import ChildRequest, RequestState, StreamMode
from quire.core.engine.tokenizer import Tokenizer
from quire.core.messages import (
    CompletionOutput,
    EngineCoreOutput,
    EngineCoreOutputs,
    EngineCoreRequest,
    FinishReason,
    RequestOutput,
    TokenLogprob,
)
from quire.core.sampling_params import SamplingParams
from quire.core.stats import RequestStats, StepStats

__all__ = ["Exporters", "OutputProcessor", "Processed"]

_log = logging.getLogger("quire.metrics")


@dataclass(slots=True)
class Processed:
    """What came of one batch of outputs."""

    outputs: list[RequestOutput] = field(default_factory=list)
    aborts: list[str] = field(default_factory=list)
    """Core requests to end that the engine core still runs: a stop string was found, or a sibling failed."""
    errors: list[tuple[str, str]] = field(default_factory=list)
    """(request, reason) of requests that the engine core refused or could not finish; they are forgotten."""


class OutputProcessor:
    """Holds the state of every request under way in this process."""

    def __init__(self, tokenizer: Tokenizer, exporters: Exporters) -> None:
        self._tokenizer = tokenizer
        self._exporters = exporters
        self._states: dict[str, RequestState] = {}
        self._owner: dict[str, RequestState] = {}

    def __len__(self) -> int:
        return len(self._states)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._states

    def add(
        self,
        request_id: str,
        prompt: str | None,
        requests: Sequence[EngineCoreRequest],
        params: SamplingParams,
        mode: StreamMode,
    ) -> None:
        """Expect outputs for these core requests."""
        ids = requests[0].prompt_token_ids
        children = {
            r.request_id: ChildRequest(i, Detokenizer(self._tokenizer, ids, params) if params.detokenize else None)
            for i, r in enumerate(requests)
        }
        state = RequestState(request_id, prompt, ids, params, mode, time.monotonic(), children)
        self._states[request_id] = state
        self._owner.update(dict.fromkeys(children, state))

    def remove(self, request_id: str) -> list[str]:
        """Forget a request; returns its core requests that have not ended."""
        state = self._states.pop(request_id, None)
        if state is None:
            return []
        for core_id in state.children:
            self._owner.pop(core_id, None)
        alive = [core_id for core_id, child in state.children.items() if not child.done]
        for core_id in alive:
            self._record_end(state, state.children[core_id], "abort", time.monotonic())
        return alive

    def process(self, outputs: EngineCoreOutputs) -> Processed:
        """Take in one step's outputs. Those of forgotten requests are passed over."""
        made = Processed()
        now = time.monotonic()
        gaps: list[float] = []
        for output in outputs.outputs:
            state = self._owner.get(output.request_id)
            if state is not None and not state.children[output.request_id].done:
                self._take(state, state.children[output.request_id], output, made, now)
        for request_id, tokens in outputs.iter_new_tokens():
            state = self._owner.get(request_id)
            if state is None:
                continue
            child = state.children[request_id]
            if not child.done:
                gaps += child.record_gaps(len(tokens), now)
                if self._extend(child, tokens, None):
                    made.aborts.append(request_id)
                    self._record_end(state, child, "stop", now)
                self._tell(state, child, tokens, None, made)
        if gaps:
            self._exporters.record_tokens(0, len(gaps), None, gaps)
        return made

    def _take(
        self, state: RequestState, child: ChildRequest, output: EngineCoreOutput, made: Processed, now: float
    ) -> None:
        """What is more than tokens: the first of them, an end, log-probabilities."""
        if output.finish_reason == "error":
            child.done = True
            self._record_end(state, child, "error", now)
            made.aborts.extend(self.remove(state.request_id))
            made.errors.append((state.request_id, output.error or "the engine could not finish this request"))
            return
        tokens = output.new_token_ids
        child.stop_reason = output.stop_reason
        child.num_cached = max(child.num_cached, output.num_cached_tokens)
        child.queue_s = max(child.queue_s, output.queue_ns / 1e9)
        if output.prompt_logprobs is not None:
            state.prompt_logprobs = [None, *output.prompt_logprobs]
        if output.logprobs:
            if child.logprobs is None:
                child.logprobs = []
            child.logprobs.extend(output.logprobs)
            child.cumulative = (child.cumulative or 0.0) + sum(p.logprobs[0] for p in output.logprobs)
        if self._extend(child, tokens, output.finish_reason):
            made.aborts.append(output.request_id)
        if tokens:
            self._record_tokens(state, child, len(tokens), now)
        if child.done:
            self._record_end(state, child, child.finish_reason or "stop", now)
        self._tell(state, child, tokens, output.logprobs, made)

    def _extend(self, child: ChildRequest, tokens: list[int], reason: FinishReason | None) -> bool:
        """Add tokens that the engine core ended with ``reason``; True if a stop string ended them before it did."""
        child.token_ids += tokens
        child.finish_reason = reason
        stop = None
        if child.detokenizer is not None:
            stop = child.detokenizer.push(tokens, reason == "stop")
            if stop is not None:
                child.finish_reason, child.stop_reason = "stop", stop
            elif reason is not None:
                child.detokenizer.flush()
        child.done = child.finish_reason is not None
        return stop is not None and reason is None

    def _tell(
        self,
        state: RequestState,
        child: ChildRequest,
        tokens: list[int],
        logprobs: list[TokenLogprob] | None,
        made: Processed,
    ) -> None:
        """What the caller receives of this, if anything; a request that is over is forgotten."""
        finished = child.done and all(c.done for c in state.children.values())
        if state.mode == "delta":
            text = child.detokenizer.delta(child.done) if child.detokenizer else ""
            if not (text or tokens or child.done):
                return
            outputs = [self._completion(child, text, tokens, logprobs)]
        elif state.mode == "cumulative" or finished:
            outputs = [self._whole(c) for c in state.children.values()]
        else:
            return
        made.outputs.append(
            RequestOutput(
                request_id=state.request_id,
                prompt=state.prompt,
                prompt_token_ids=state.prompt_token_ids,
                outputs=outputs,
                finished=finished,
                prompt_logprobs=state.prompt_logprobs,
                num_cached_tokens=max(c.num_cached for c in state.children.values()),
            )
        )
        if finished:
            self.remove(state.request_id)

    def _whole(self, child: ChildRequest) -> CompletionOutput:
        text = child.detokenizer.text if child.detokenizer else ""
        logprobs = None if child.logprobs is None else list(child.logprobs)
        return self._completion(child, text, list(child.token_ids), logprobs)

    def _completion(
        self, child: ChildRequest, text: str, token_ids: list[int], logprobs: list[TokenLogprob] | None
    ) -> CompletionOutput:
        return CompletionOutput(
            index=child.index,
            text=text,
            token_ids=token_ids,
            cumulative_logprob=child.cumulative,
            logprobs=logprobs,
            finish_reason=child.finish_reason,
            stop_reason=child.stop_reason,
        )

    def _record_tokens(self, state: RequestState, child: ChildRequest, count: int, now: float) -> None:
        first = child.first_token_at is None
        gaps = child.record_gaps(count, now)
        prompt = len(state.prompt_token_ids) if first and child.index == 0 else 0
        self._exporters.record_tokens(prompt, count, now - state.arrived_at if first else None, gaps)

    def _record_end(self, state: RequestState, child: ChildRequest, reason: str, now: float) -> None:
        self._exporters.record_request(state.make_stats(child, reason, now))


class Exporters:
    """The metrics exporters of one process, behind one call. One that raises is dropped, and logged."""

    def __init__(self, exporters: Sequence[MetricsExporter] = ()) -> None:
        self.active: list[MetricsExporter] = list(exporters)

    def record_engine(self, stats: Mapping[str, float]) -> None:
        """See ``MetricsExporter``."""
        self._each(lambda exporter: exporter.record_engine(stats))

    def record_request(self, stats: RequestStats) -> None:
        """See ``MetricsExporter``."""
        self._each(lambda exporter: exporter.record_request(stats))

    def record_tokens(self, num_prompt: int, num_generated: int, ttft_s: float | None, itl_s: list[float]) -> None:
        """See ``MetricsExporter``."""
        self._each(lambda exporter: exporter.record_tokens(num_prompt, num_generated, ttft_s, itl_s))

    def record_step(self, stats: StepStats) -> None:
        """See ``MetricsExporter``."""
        self._each(lambda exporter: exporter.record_step(stats))

    def close(self) -> None:
        """Close every exporter."""
        self._each(lambda exporter: exporter.close())

    def _each(self, call: Callable[[MetricsExporter], None]) -> None:
        for exporter in list(self.active):
            try:
                call(exporter)
            except Exception as error:
                self.active.remove(exporter)
                _log.error("metrics exporter %s dropped: %s", type(exporter).__name__, error, exc_info=error)
