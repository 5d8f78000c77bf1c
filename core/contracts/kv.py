"""KV allocator: which blocks of the KV cache belong to which request. On the host, in one thread, without waiting."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from quire.core.messages import BlockCopy
from quire.core.request import Request

__all__ = ["Allocation", "KVAllocator", "KVGroup", "KVStats", "PrefixMatch"]


@dataclass(frozen=True, slots=True)
class KVGroup:
    """A group of layers with the same KV geometry. Each group has block tables and block ids of its own."""

    window: int | None = None
    """Sliding window in tokens: blocks wholly before it may be freed. None: every layer reads the whole context."""


@dataclass(slots=True)
class PrefixMatch:
    """A cached prefix: the same number of tokens in every group, in whole blocks."""

    num_tokens: int
    blocks: tuple[tuple[int, ...], ...]
    """Block ids per group."""


@dataclass(slots=True)
class Allocation:
    """What changed: per group, entries ``starts[g] ..`` of the request's block table become ``new_blocks[g]``."""

    starts: list[int]
    new_blocks: list[list[int]]
    copies: list[BlockCopy] = field(default_factory=list)
    """Shared blocks that will be written, each replaced by a private copy."""


@dataclass(slots=True)
class KVStats:
    """Gauges and counters of the pool; blocks of all groups together."""

    num_blocks: int
    num_free: int
    """Blocks that can be allocated now, cached ones without a reference included."""
    num_cached: int
    """Blocks in the prefix cache."""
    prefix_queries: int
    """Tokens looked up."""
    prefix_hits: int
    """Tokens found."""


class KVAllocator(ABC):
    """Owns ``num_blocks`` blocks per group. Block 0 is the null block: it takes the writes of padding, and is never
    allocated.

    Promised by an allocator: no block is writable by two requests; none is both free and referenced; a failed
    ``allocate`` changes nothing; after every request is freed the pool is back at its baseline. Reads of a request
    are of ``request_id`` (a number, never used again), ``token_ids``, ``extra_keys``, ``skip_prefix_cache`` and
    ``block_hashes`` (its scratch). Table entries whose blocks a window has left behind are 0.

    An allocator that raises is quarantined: the bundled one takes its place, and running requests are computed again.
    """

    def __init__(
        self,
        groups: Sequence[KVGroup],
        num_blocks: int,
        block_size: int,
        *,
        prefix_caching: bool = True,
        options: object | None = None,
    ) -> None:
        self.groups = tuple(groups)
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.prefix_caching = prefix_caching
        self.options: Any = options
        """An instance of the class's ``Options`` dataclass, None without one."""

    @abstractmethod
    def match_prefix(self, request: Request) -> PrefixMatch:
        """The longest cached prefix, at most ``num_tokens - 1``: the last token is always computed. Changes nothing."""

    def count_cached_tokens(self, requests: Sequence[Request]) -> list[int]:
        """Of each request ``match_prefix(request).num_tokens``, or what it very likely is: policies ask this of many
        waiting requests in one step. Changes nothing."""
        return [self.match_prefix(request).num_tokens for request in requests]

    @abstractmethod
    def allocate(
        self,
        request: Request,
        num_tokens: int,
        *,
        num_computed_tokens: int,
        prefix_match: PrefixMatch | None = None,
        num_reserved_blocks: int = 0,
    ) -> Allocation | None:
        """Give the request blocks for its first ``num_tokens`` tokens, of which those from ``num_computed_tokens`` on
        will be written.

        The first call for a request (or after ``free``) may pass the ``prefix_match`` to start from; its blocks get a
        reference. ``num_reserved_blocks`` blocks per group must remain free afterwards (the watermark). Shared blocks
        that will be written are replaced and listed in ``copies``. ``None``: not enough blocks, nothing changed. Blocks
        that no request holds can be had at once, also by one that frees late: while none is held, a refusal of what the
        pool has is a fault.
        """

    @abstractmethod
    def cache_full_blocks(self, request: Request, num_tokens: int) -> None:
        """The KV of the first ``num_tokens`` tokens is written (or will be, in stream order) and their ids are known:
        blocks that are full now enter the prefix cache."""

    def evict_prefix(self, request: Request) -> None:
        """What was computed for the request is wrong: none of its blocks may be found, or enter, the prefix cache. By
        default nothing is done, which is right where nothing is cached."""

    @abstractmethod
    def fork_blocks(self, parent: Request, child: Request, num_tokens: int) -> Allocation | None:
        """Start ``child`` with references to the parent's blocks of the first ``num_tokens`` tokens. ``None``: the
        parent no longer has all that the child must read (a window moved on), nothing changed."""

    @abstractmethod
    def free_out_of_window_blocks(self, request: Request, group: int, before: int) -> None:
        """Tokens before position ``before`` will not be read again in this group: their blocks may be freed."""

    @abstractmethod
    def free(self, request: Request) -> None:
        """Free every block of the request. Cached blocks stay in the prefix cache until they are needed. Idempotent."""

    @abstractmethod
    def num_free_blocks(self) -> int:
        """Blocks that can be allocated now in the scarcest group."""

    @abstractmethod
    def stats(self) -> KVStats:
        """The pool now."""

    @abstractmethod
    def check_integrity(self) -> None:
        """Raise ``AssertionError`` naming the first broken promise. For tests and debugging; may be slow."""
