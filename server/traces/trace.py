"""A trace: requests by arrival, with lengths and prefixes and no text."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from quire.core.errors import ConfigError

__all__ = ["MAX_REQUESTS", "MAX_TOKENS", "NO_TIMES", "Trace", "TraceRequest"]

MAX_TOKENS = 10_000_000
"""Of a prompt, and of an answer."""

MAX_REQUESTS = 10_000_000
_MAX_SECONDS = 1e9  # nanoseconds of it fit into 64 bits

NO_TIMES = "it has no times: give them with --arrivals, as in poisson:rate=8"
"""The note of a trace that does not say when requests came, until it is given times."""


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """One request: when it came, what it asked for, and how long its answer was."""

    arrival_s: float
    """Seconds after the trace began."""
    prompt_len: int
    output_len: int
    """Tokens of the answer, at least one."""
    max_tokens: int | None = None
    """The limit that the request named; None: none, or not known."""
    block_hashes: tuple[int, ...] = ()
    """One of each full block of ``Trace.hash_block_size`` tokens of prompt and answer, which covers all before it."""
    priority: int = 0
    scheduling: Mapping[str, Any] = field(default_factory=dict)
    """What policies may use, by the names of ``SchedulingParams``: group, deadline, targets, predicted length, tags."""
    prompt_id: int | None = None
    """The same for all continuations of one prompt (``n`` > 1), of which the first computes it; None: it is alone."""


@dataclass(frozen=True, slots=True)
class Trace:
    """Requests in order of arrival."""

    name: str
    requests: Sequence[TraceRequest]
    hash_block_size: int = 0
    """Tokens that a hash stands for; 0: the trace knows of no shared prefixes."""
    notes: Sequence[str] = ()
    """What a reader of figures should know of it: rows left out, lengths that were estimated."""

    has_times: bool = True
    """Whether its source says when requests came."""

    def __len__(self) -> int:
        return len(self.requests)

    @property
    def duration_s(self) -> float:
        """From the first arrival to the last."""
        return self.requests[-1].arrival_s - self.requests[0].arrival_s if self.requests else 0.0

    @property
    def rate(self) -> float:
        """Requests a second."""
        return len(self.requests) / self.duration_s if self.duration_s else float("inf")

    def check_bounds(self) -> None:
        """Raises ``ConfigError`` if a request has numbers that no server could have seen."""
        if self.hash_block_size < 0:
            raise ConfigError(f"{self.name}: its blocks have {self.hash_block_size} tokens; record it again")
        for number, request in enumerate(self.requests, 1):
            if (fault := _find_fault(request)) is not None:
                limits = f"traces hold 1 to {MAX_TOKENS:,} tokens a text, and {_MAX_SECONDS:g} s"
                raise ConfigError(f"{self.name}: request {number} {fault}; {limits}: mend or remove it")

    def describe(self) -> str:
        """One line: how many requests, over how long, of what lengths."""
        prompts = sorted(request.prompt_len for request in self.requests)
        outputs = sorted(request.output_len for request in self.requests)
        middle = len(prompts) // 2
        times = f"in {self.duration_s:,.0f} s ({self.rate:.2f} a second)" if self.duration_s else "at once"
        count = "1 request" if len(self) == 1 else f"{len(self):,} requests"
        return f"{self.name}: {count} {times}, median {prompts[middle]:,} tokens in, {outputs[middle]:,} out"

    def cut_window(self, start_s: float, end_s: float) -> Trace:
        """The requests that arrive in ``[start_s, end_s)``; the new trace begins at ``start_s``."""
        kept = [
            dataclasses.replace(request, arrival_s=request.arrival_s - start_s)
            for request in self.requests
            if start_s <= request.arrival_s < end_s
        ]
        return self._with_requests(kept, f"no request arrives between {start_s:g} and {end_s:g} s")

    def limit_requests(self, count: int) -> Trace:
        """The first ``count`` requests."""
        return self._with_requests(list(self.requests[:count]), f"{count} requests are none")

    def scale_time(self, factor: float) -> Trace:
        """The same requests ``factor`` times as fast one after the other."""
        if not 0 < factor < float("inf"):
            raise ConfigError(f"a trace can be sped up by a factor above 0, got {factor:g}")
        return self.replace_arrivals([request.arrival_s / factor for request in self.requests])

    def scale_lengths(self, factor: float) -> Trace:
        """Prompts, answers and limits ``factor`` times as long, at least one token. Shared prefixes stay shared."""
        if not 0 < factor < float("inf"):
            raise ConfigError(f"lengths can be multiplied by a factor above 0, got {factor:g}")
        longest = max((max(request.prompt_len, request.output_len) for request in self.requests), default=0)
        if longest * factor > MAX_TOKENS:
            raise ConfigError(f"{factor:g} times {longest:,} tokens exceed {MAX_TOKENS:,}: name a smaller factor")

        def scaled(length: int) -> int:
            return max(round(length * factor), 1)

        requests = [
            dataclasses.replace(
                request,
                prompt_len=scaled(request.prompt_len),
                output_len=scaled(request.output_len),
                max_tokens=None if request.max_tokens is None else scaled(request.max_tokens),
            )
            for request in self.requests
        ]
        block_size = scaled(self.hash_block_size) if self.hash_block_size else 0
        return dataclasses.replace(self, requests=requests, hash_block_size=block_size)

    def replace_arrivals(self, arrivals_s: Sequence[float]) -> Trace:
        """The same requests, in the same order, at these times."""
        pairs = zip(self.requests, arrivals_s, strict=True)
        requests = [dataclasses.replace(request, arrival_s=float(arrival)) for request, arrival in pairs]
        notes = [note for note in self.notes if note != NO_TIMES]
        return dataclasses.replace(self, requests=requests, notes=notes, has_times=True)

    def _with_requests(self, requests: list[TraceRequest], if_empty: str) -> Trace:
        if not requests:
            raise ConfigError(f"{self.name}: {if_empty}; the trace has {len(self)} over {self.duration_s:,.0f} s")
        return dataclasses.replace(self, requests=requests)


def _find_fault(request: TraceRequest) -> str | None:
    if not 0 <= request.arrival_s <= _MAX_SECONDS:
        return f"arrives after {request.arrival_s:g} s"
    if not 1 <= request.prompt_len <= MAX_TOKENS:
        return f"has a prompt of {request.prompt_len:,} tokens"
    if not 1 <= request.output_len <= MAX_TOKENS:
        return f"has an answer of {request.output_len:,} tokens"
    if request.max_tokens is not None and request.max_tokens < 1:
        return f"is limited to {request.max_tokens:,} tokens"
    return f"has the priority {request.priority}" if abs(request.priority) >= 1 << 31 else None
