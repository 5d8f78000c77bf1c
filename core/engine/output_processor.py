"""From tokens to what callers receive: text, stop strings, the n continuations of a request, request figures."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from quire.core.engine.detokenizer import Detokenizer
from quire.core.engine.exporters import Exporters
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
from quire.core.stats import RequestStats

__all__ = ["OutputProcessor", "Processed", "StreamMode"]

StreamMode = Literal["delta", "cumulative", "final"]


@dataclass(slots=True)
class Processed:
    """What came of one batch of outputs."""

    outputs: list[RequestOutput] = field(default_factory=list)
    aborts: list[str] = field(default_factory=list)
    """Core requests to end that the engine core still runs: a stop string was found, or a sibling failed."""
    errors: list[tuple[str, str]] = field(default_factory=list)
    """(request, reason) of requests that the engine core refused or could not finish; they are forgotten."""


@dataclass(slots=True)
class _Child:
    """One of the n continuations."""

    index: int
    detokenizer: Detokenizer | None
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] | None = None
    cumulative: float | None = None
    done: bool = False
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    last_token_at: float | None = None
    first_token_at: float | None = None
    queue_s: float = 0.0
    num_cached: int = 0

    def gaps(self, count: int, now: float) -> list[float]:
        """Note that ``count`` tokens came; the seconds between them and those before."""
        before, self.last_token_at = self.last_token_at, now
        if before is None:
            self.first_token_at = now
            return [0.0] * (count - 1)
        return [(now - before) / count] * count


@dataclass(slots=True)
class _State:
    """One caller's request."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    params: SamplingParams
    mode: StreamMode
    arrived_at: float
    children: dict[str, _Child]
    prompt_logprobs: list[TokenLogprob | None] | None = None


class OutputProcessor:
    """Holds the state of every request under way in this process."""

    def __init__(self, tokenizer: Tokenizer, exporters: Exporters) -> None:
        self._tokenizer = tokenizer
        self._exporters = exporters
        self._states: dict[str, _State] = {}
        self._owner: dict[str, _State] = {}

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
            r.request_id: _Child(i, Detokenizer(self._tokenizer, ids, params) if params.detokenize else None)
            for i, r in enumerate(requests)
        }
        state = _State(request_id, prompt, ids, params, mode, time.monotonic(), children)
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
                gaps += child.gaps(len(tokens), now)
                if self._extend(child, tokens, None):
                    made.aborts.append(request_id)
                    self._record_end(state, child, "stop", now)
                self._tell(state, child, tokens, None, made)
        if gaps:
            self._exporters.record_tokens(0, len(gaps), None, gaps)
        return made

    def _take(self, state: _State, child: _Child, output: EngineCoreOutput, made: Processed, now: float) -> None:
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

    def _extend(self, child: _Child, tokens: list[int], reason: FinishReason | None) -> bool:
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
        state: _State,
        child: _Child,
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

    def _whole(self, child: _Child) -> CompletionOutput:
        text = child.detokenizer.text if child.detokenizer else ""
        logprobs = None if child.logprobs is None else list(child.logprobs)
        return self._completion(child, text, list(child.token_ids), logprobs)

    def _completion(
        self, child: _Child, text: str, token_ids: list[int], logprobs: list[TokenLogprob] | None
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

    def _record_tokens(self, state: _State, child: _Child, count: int, now: float) -> None:
        first = child.first_token_at is None
        gaps = child.gaps(count, now)
        prompt = len(state.prompt_token_ids) if first and child.index == 0 else 0
        self._exporters.record_tokens(prompt, count, now - state.arrived_at if first else None, gaps)

    def _record_end(self, state: _State, child: _Child, reason: str, now: float) -> None:
        first, count = child.first_token_at, len(child.token_ids)
        span = None if first is None or child.last_token_at is None else child.last_token_at - first
        self._exporters.record_request(
            RequestStats(
                finish_reason=reason,
                num_prompt_tokens=len(state.prompt_token_ids),
                num_cached_tokens=child.num_cached,
                num_generation_tokens=count,
                e2e_s=now - state.arrived_at,
                queue_s=child.queue_s,
                ttft_s=None if first is None else first - state.arrived_at,
                mean_tpot_s=None if span is None or count < 2 else span / (count - 1),
            )
        )
