"""Keeps account of the blocks that a KV allocator hands out: each is in the pool, and has one writer.

A block with two writers would give both requests wrong answers in silence. Allocators of other authors are watched; the
bundled one keeps the promise in its tests, and its calls stay as they are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from numbers import Integral

from quire.core.contracts.kv import Allocation, KVAllocator, KVStats, PrefixMatch
from quire.core.request import Request

__all__ = ["BrokenAllocationError", "WatchedAllocator"]

_NULL_BLOCK = 0


class BrokenAllocationError(Exception):
    """What an allocator returned would let a request read or write what is not its own."""


class WatchedAllocator(KVAllocator):
    """Passes everything on to ``allocator``, and raises ``BrokenAllocationError`` before a block with two writers, or
    outside of the pool, is used."""

    def __init__(self, allocator: KVAllocator) -> None:
        super().__init__(
            allocator.groups, allocator.num_blocks, allocator.block_size, prefix_caching=allocator.prefix_caching
        )
        self.allocator = allocator
        self._tables: dict[int, list[list[int]]] = {}  # by request id: the blocks of each group
        self._num_holders: list[Counter[int]] = [Counter() for _ in self.groups]  # requests that hold a block

    def match_prefix(self, request: Request) -> PrefixMatch:
        """Checks that it is of whole blocks of the pool, and leaves a token to compute."""
        match = self.allocator.match_prefix(request)
        num_blocks, rest = divmod(match.num_tokens, self.block_size)
        if rest or match.num_tokens >= max(request.num_tokens, 1) or match.num_tokens < 0:
            raise BrokenAllocationError(f"found {match.num_tokens} of {request.num_tokens} tokens in the cache")
        self._check_blocks(match.blocks)
        self._check_lengths(match.blocks, num_blocks)
        return match

    def count_cached_tokens(self, requests: Sequence[Request]) -> list[int]:
        """Checks that it is a number for each."""
        counts = self.allocator.count_cached_tokens(requests)
        if len(counts) != len(requests) or not all(map(_is_integer, counts)):
            raise BrokenAllocationError(f"returned {counts!r:.100} for {len(requests)} requests")
        return list(map(int, counts))

    def allocate(
        self,
        request: Request,
        num_tokens: int,
        *,
        num_computed_tokens: int,
        prefix_match: PrefixMatch | None = None,
        num_reserved_blocks: int = 0,
    ) -> Allocation | None:
        """Checks that blocks which will be written are the request's alone, and that a refusal has a reason."""
        allocation = self.allocator.allocate(
            request,
            num_tokens,
            num_computed_tokens=num_computed_tokens,
            prefix_match=prefix_match,
            num_reserved_blocks=num_reserved_blocks,
        )
        if allocation is None:
            self._check_refusal(-(-num_tokens // self.block_size) + num_reserved_blocks)
            return None
        tables = self._apply(request, self._tables.get(request.request_id), allocation)
        self._check_lengths(tables, -(-num_tokens // self.block_size))
        first = num_computed_tokens // self.block_size
        for group, (table, holders) in enumerate(zip(tables, self._num_holders, strict=True)):
            written = table[first:]
            if len(set(written)) < len(written):
                raise BrokenAllocationError(f"gave a request one block twice: {written}")
            for block in written:
                if block == _NULL_BLOCK or holders[block] > 1:
                    to = "every request" if block == _NULL_BLOCK else f"{holders[block]} requests"
                    raise BrokenAllocationError(f"gave block {block} of group {group} to {to}, one of which writes it")
        return allocation

    def cache_full_blocks(self, request: Request, num_tokens: int) -> None:
        """As the allocator does."""
        self.allocator.cache_full_blocks(request, num_tokens)

    def evict_prefix(self, request: Request) -> None:
        """As the allocator does."""
        self.allocator.evict_prefix(request)

    def fork_blocks(self, parent: Request, child: Request, num_tokens: int) -> Allocation | None:
        """Checks that the child's blocks are those of its parent."""
        allocation = self.allocator.fork_blocks(parent, child, num_tokens)
        if allocation is not None:
            tables = self._apply(child, None, allocation)
            self._check_lengths(tables, -(-num_tokens // self.block_size))
            of_parent = self._tables.get(parent.request_id, tables)
            for table, source in zip(tables, of_parent, strict=True):
                if any(block not in (source[i], _NULL_BLOCK) for i, block in enumerate(table[: len(source)])):
                    raise BrokenAllocationError(f"gave a fork the blocks {table}, those of its parent are {source}")
        return allocation

    def free_out_of_window_blocks(self, request: Request, group: int, before: int) -> None:
        """The request no longer holds them, whether the allocator frees them or not."""
        self.allocator.free_out_of_window_blocks(request, group, before)
        tables = self._tables.get(request.request_id)
        if tables is not None:
            table = tables[group]
            for i in range(min(before // self.block_size, len(table))):
                self._release(group, table[i])
                table[i] = _NULL_BLOCK

    def free(self, request: Request) -> None:
        """The request holds nothing any more."""
        self.allocator.free(request)
        for group, table in enumerate(self._tables.pop(request.request_id, ())):
            for block in table:
                self._release(group, block)

    def num_free_blocks(self) -> int:
        """Checks that it is a number."""
        num_free = self.allocator.num_free_blocks()
        if not _is_integer(num_free):
            raise BrokenAllocationError(f"returned {num_free!r:.100}, not a number")
        return int(num_free)

    def stats(self) -> KVStats:
        """Checks that they are ``KVStats``."""
        stats = self.allocator.stats()
        if not isinstance(stats, KVStats):
            raise BrokenAllocationError(f"returned {stats!r:.100}, not KVStats")
        return stats

    def check_integrity(self) -> None:
        """As the allocator does."""
        self.allocator.check_integrity()

    def _apply(self, request: Request, before: list[list[int]] | None, allocation: Allocation) -> list[list[int]]:
        """The request's tables with what has changed."""
        tables = [[] for _ in self.groups] if before is None else before
        parts = (allocation.starts, allocation.new_blocks)
        if any(len(part) != len(tables) for part in parts):
            raise BrokenAllocationError(f"returned {allocation} for {len(tables)} groups of layers")
        self._check_blocks(allocation.new_blocks)
        self._tables[request.request_id] = tables
        for group, (table, start, blocks) in enumerate(zip(tables, *parts, strict=True)):
            for block in table[start:]:
                self._release(group, block)
            table[start:] = blocks
            self._num_holders[group].update(set(blocks) - {_NULL_BLOCK})
        return tables

    def _check_refusal(self, num_blocks: int) -> None:
        """A request that is refused while no request holds a block would wait for ever, and those behind it."""
        is_any_held = any(any(table) for tables in self._tables.values() for table in tables)
        if num_blocks < self.num_blocks and not is_any_held:
            raise BrokenAllocationError(f"refused {num_blocks} of {self.num_blocks - 1} blocks, none of which is held")

    def _check_blocks(self, blocks: Sequence[Sequence[int]]) -> None:
        """Each by group must be one of the pool, or the null block."""
        for group, of_group in enumerate(blocks):
            wrong = next((b for b in of_group if not isinstance(b, int) or not 0 <= b < self.num_blocks), None)
            if wrong is not None:
                raise BrokenAllocationError(f"gave block {wrong!r} of group {group}; the pool has {self.num_blocks}")

    def _check_lengths(self, tables: Sequence[Sequence[int]], num_blocks: int) -> None:
        if len(tables) != len(self.groups):
            raise BrokenAllocationError(f"returned blocks of {len(tables)} groups of layers, not {len(self.groups)}")
        for group, table in enumerate(tables):
            if len(table) < num_blocks:
                raise BrokenAllocationError(f"gave {len(table)} blocks of group {group} where {num_blocks} are needed")

    def _release(self, group: int, block: int) -> None:
        if block != _NULL_BLOCK:
            self._num_holders[group][block] -= 1


def _is_integer(value: object) -> bool:
    """Of numpy too, which some allocators count in; True is none."""
    return isinstance(value, Integral) and not isinstance(value, bool)
