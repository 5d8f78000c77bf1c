"""Router: which of several engines serves a request. Deterministic: loads in, an index out.

The simulator asks it at each arrival (``quire simulate --replicas N --router NAME``).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["ReplicaLoad", "RoutedRequest", "Router"]


@dataclass(frozen=True, slots=True)
class RoutedRequest:
    """What is known of a request when it arrives."""

    request_id: str
    arrival_ns: int
    prompt_len: int
    max_tokens: int | None
    """Upper bound of the tokens that it may generate, if it names one."""
    group: str | None = None
    """Whose request it is, as policies see it."""
    prefix_hashes: tuple[int, ...] = ()
    """One of each full block of ``prefix_block_size`` tokens of the prompt, which covers all before it: equal prefixes
    have equal hashes. Empty where prefixes are not known."""
    prefix_block_size: int = 0


@dataclass(frozen=True, slots=True)
class ReplicaLoad:
    """One engine, as far as is known: a live router learns of it ten times a second."""

    num_running: int
    """Requests in the running batch."""
    num_waiting: int
    """Requests that were given to it and do not run yet."""
    kv_usage: float
    """Share of the KV blocks in use, 0 to 1."""

    @property
    def num_requests(self) -> int:
        """All requests that it has."""
        return self.num_running + self.num_waiting


class Router(ABC):
    """Chooses an engine for each request as it arrives; requests do not move afterwards.

    Given the same requests and loads, a router chooses the same: no clock, no I/O, seeded randomness.
    """

    def __init__(self, options: Any = None) -> None:
        self.options = options

    @abstractmethod
    def choose_replica(self, request: RoutedRequest, replicas: Sequence[ReplicaLoad]) -> int:
        """The index of the engine that is to serve the request. ``replicas`` has one entry or more, always the same
        number, in the same order."""

    def request_finished(self, request_id: str, replica: int) -> None:
        """A request has left its engine: it finished, failed or was aborted."""
