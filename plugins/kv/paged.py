"""Blocks of tokens with reference counts, copy-on-write and a prefix cache found by a hash chain."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from operator import attrgetter
from typing import Any, NamedTuple

from quire.plugins.kv.hashing import hash_chain
from quire.plugins.kv.pool import NULL_BLOCK, BlockPool
from quire.sdk import Allocation, BlockCopy, KVAllocator, KVGroup, KVStats, PrefixMatch, Request

__all__ = ["PagedAllocator", "PagedDebugState"]

_request_id_of = attrgetter("request_id")

_MAX_COUNTED = 2048
"""Requests of which it is remembered how much was cached: more than a policy sees at once."""
_MAX_WATCHES = 16_384
"""Of blocks: requests that left may still watch the end of a prefix that stays cached for good."""


class PagedDebugState(NamedTuple):
    """The allocator's live parts, for tests and debugging: to look at, not to change."""

    pools: list[BlockPool]
    """By group."""
    tables: dict[int, list[list[int]]]
    """By request id: its blocks per group."""
    num_watches: int
    """Of blocks, for requests that wait."""


class PagedAllocator(KVAllocator):
    """The default allocator. Each group has its own pool; a request holds one list of blocks per group.

    A block is cached under the hash of its tokens and of everything before them. Free cached blocks are evicted least
    recently used first, and of one request the last blocks before the first ones, so that a cached prefix shrinks from
    its end. Table entries that a window has left behind are the null block.
    """

    def __init__(
        self,
        groups: Sequence[KVGroup],
        num_blocks: int,
        block_size: int,
        *,
        prefix_caching: bool = True,
        options: Any = None,
    ) -> None:
        super().__init__(groups, num_blocks, block_size, prefix_caching=prefix_caching, options=options)
        self._pools = [BlockPool(num_blocks) for _ in self.groups]
        self._tables: dict[int, _BlockTable] = {}
        self._counted: dict[int, int] = {}  # by request id: what ``count_cached_tokens`` gave, while it holds
        self._num_watches = 0
        self._num_queries = self._num_hits = 0  # tokens

    def match_prefix(self, request: Request) -> PrefixMatch:
        """Walk the chain of hashes until a block is not cached in a group without a window; then shorten the prefix
        until every window before its end is cached as well."""
        if not self.prefix_caching or request.skip_prefix_cache:
            return PrefixMatch(0, tuple(() for _ in self.groups))
        hashes = hash_chain(request, self.block_size, (len(request.token_ids) - 1) // self.block_size)
        length = len(hashes)
        for group, pool in zip(self.groups, self._pools, strict=True):
            if group.window is None:
                cached = pool.cached_blocks
                length = next((i for i in range(length) if hashes[i] not in cached), length)
        length = self._fit_windows(hashes, length)
        blocks = tuple(self._matched_blocks(group, hashes, length) for group in range(len(self.groups)))
        return PrefixMatch(length * self.block_size, blocks)

    def count_cached_tokens(self, requests: Sequence[Request]) -> list[int]:
        """Policies ask of the same waiting requests in every step, so what was counted is kept until a block is cached,
        or evicted, where the cached prefix ends."""
        if not self.prefix_caching:
            return [0] * len(requests)
        if len(self.groups) > 1 or self.groups[0].window is not None:
            return [self._count_prefix(request)[0] * self.block_size for request in requests]
        pool, known = self._pools[0], self._counted
        for request_id in pool.notified:
            known.pop(request_id, None)
        pool.notified.clear()
        if len(known) > _MAX_COUNTED or self._num_watches > _MAX_WATCHES:
            known.clear()
            pool.watchers.clear()
            self._num_watches = 0
        counts: list[Any] = [*map(known.get, map(_request_id_of, requests))]
        if None in counts:
            for place, request in enumerate(requests):
                if counts[place] is None:
                    counts[place] = known[request.request_id] = self._count_and_watch(request)
        return counts

    def _count_and_watch(self, request: Request) -> int:
        num_blocks, hashes = self._count_prefix(request)
        watchers = self._pools[0].watchers
        for block_hash in hashes[max(num_blocks - 1, 0) : num_blocks + 1]:  # the last cached one, and the one behind it
            watchers.setdefault(block_hash, set()).add(request.request_id)
            self._num_watches += 1
        return num_blocks * self.block_size

    def _count_prefix(self, request: Request) -> tuple[int, Sequence[bytes]]:
        """Its cached blocks, and the hashes of all that may be. By bisection: free blocks are evicted from the end of a
        prefix, so that it is cached up to some block."""
        if request.skip_prefix_cache:
            return 0, ()
        length = num_full = (len(request.token_ids) - 1) // self.block_size
        hashes = request.block_hashes
        if len(hashes) < length:
            hashes = hash_chain(request, self.block_size, length)
        has_windows = False
        for group, pool in zip(self.groups, self._pools, strict=True):
            if group.window is not None:
                has_windows = True
                continue
            cached = pool.cached_blocks
            low = length if length and hashes[length - 1] in cached else 0
            while low < length:
                middle = (low + length) // 2
                if hashes[middle] in cached:
                    low = middle + 1
                else:
                    length = middle
        if has_windows:
            length = self._fit_windows(hashes, length)
        return length, hashes[:num_full]

    def allocate(
        self,
        request: Request,
        num_tokens: int,
        *,
        num_computed_tokens: int,
        prefix_match: PrefixMatch | None = None,
        num_reserved_blocks: int = 0,
    ) -> Allocation | None:
        """Count first, so that a refusal changes nothing; then copy blocks that are shared, and append new ones."""
        size = self.block_size
        table = self._tables.get(request.request_id)
        if table is not None and num_computed_tokens >= len(table.blocks[0]) * size:
            return self._append_blocks(table, -(-num_tokens // size), num_reserved_blocks)
        is_new = table is None
        if table is None:
            table = _BlockTable(
                [list(blocks) for blocks in prefix_match.blocks] if prefix_match else [[] for _ in self.groups]
            )
        num_blocks, first = -(-num_tokens // size), num_computed_tokens // size
        shared: list[list[int]] = []  # per group: indices of blocks that will be written and that others can read
        for pool, blocks in zip(self._pools, table.blocks, strict=True):
            refs = pool.ref_counts
            indices = [i for i in range(first, len(blocks)) if refs[blocks[i]] > 1]
            # Matched blocks without references are on the free list, and leave it too.
            revived = sum(block != NULL_BLOCK and refs[block] == 0 for block in blocks) if is_new else 0
            if max(num_blocks - len(blocks), 0) + len(indices) + revived + num_reserved_blocks > pool.num_free:
                return None
            shared.append(indices)
        if is_new:
            self._open_table(request, table, prefix_match)
        starts, new_blocks, copies = [], [], []
        for g, (pool, blocks, indices) in enumerate(zip(self._pools, table.blocks, shared, strict=True)):
            start = 0 if is_new else indices[0] if indices else len(blocks)
            for block in blocks[first:]:  # they will be written: what is cached of them is no longer true
                if pool.ref_counts[block] == 1:
                    pool.evict_block(block)
            for i in indices:
                (copy,) = pool.allocate_blocks(1)
                copies.append(BlockCopy(g, blocks[i], copy))
                pool.drop_references((blocks[i],))
                blocks[i] = copy
            if num_blocks > len(blocks):
                blocks += pool.allocate_blocks(num_blocks - len(blocks))
            starts.append(start)
            new_blocks.append(blocks[start:])
        return Allocation(starts, new_blocks, copies)

    def cache_full_blocks(self, request: Request, num_tokens: int) -> None:
        """Cache the blocks that have become full since the last call."""
        table = self._tables.get(request.request_id)
        if table is None or not self.prefix_caching:
            return
        num_full = num_tokens // self.block_size
        hashes = hash_chain(request, self.block_size, num_full)
        for pool, blocks in zip(self._pools, table.blocks, strict=True):
            for i in range(table.num_cached, num_full):
                if blocks[i] != NULL_BLOCK:
                    pool.insert_cached(blocks[i], hashes[i])
        table.num_cached = max(table.num_cached, num_full)

    def evict_prefix(self, request: Request) -> None:
        """Of all groups, by the hashes of its tokens: also where its blocks were freed before."""
        if not self.prefix_caching:
            return
        hashes = hash_chain(request, self.block_size, len(request.token_ids) // self.block_size)
        for pool in self._pools:
            for block in [pool.cached_blocks[each] for each in hashes if each in pool.cached_blocks]:
                pool.evict_block(block)
        if (table := self._tables.get(request.request_id)) is not None:
            table.num_cached = max(len(blocks) for blocks in table.blocks)

    def fork_blocks(self, parent: Request, child: Request, num_tokens: int) -> Allocation | None:
        """Share the parent's blocks. The request that first writes into a shared one copies it (see ``allocate``)."""
        source = self._tables[parent.request_id]
        count = -(-num_tokens // self.block_size)
        for group, blocks in zip(self.groups, source.blocks, strict=True):
            if group.window is not None and NULL_BLOCK in blocks[self._window_start(group.window, num_tokens) : count]:
                return None
        table = _BlockTable([blocks[:count] for blocks in source.blocks])
        table.num_cached = min(source.num_cached, num_tokens // self.block_size)
        table.num_out_of_window = list(source.num_out_of_window)
        for pool, blocks in zip(self._pools, table.blocks, strict=True):
            pool.add_references(blocks)
        self._tables[child.request_id] = table
        return Allocation([0] * len(self.groups), [list(blocks) for blocks in table.blocks])

    def free_out_of_window_blocks(self, request: Request, group: int, before: int) -> None:
        """Free the blocks that lie wholly before the position; their entries become the null block."""
        table = self._tables[request.request_id]
        blocks, start = table.blocks[group], table.num_out_of_window[group]
        end = min(before // self.block_size, len(blocks))
        if end > start:
            self._pools[group].drop_references(reversed(blocks[start:end]))
            blocks[start:end] = [NULL_BLOCK] * (end - start)
            table.num_out_of_window[group] = end

    def free(self, request: Request) -> None:
        """Free the last block first, so that a cached prefix is evicted from its end."""
        self._counted.pop(request.request_id, None)  # if it waits again, then with more tokens
        table = self._tables.pop(request.request_id, None)
        if table is not None:
            for pool, blocks in zip(self._pools, table.blocks, strict=True):
                pool.drop_references(reversed(blocks))

    def num_free_blocks(self) -> int:
        """Of the scarcest group."""
        return min([pool.num_free for pool in self._pools])

    def stats(self) -> KVStats:
        """Sums over the groups."""
        return KVStats(
            num_blocks=(self.num_blocks - 1) * len(self.groups),
            num_free=sum(pool.num_free for pool in self._pools),
            num_cached=sum(len(pool.cached_blocks) for pool in self._pools),
            prefix_queries=self._num_queries,
            prefix_hits=self._num_hits,
        )

    def check_integrity(self) -> None:
        """Recount references from the tables, and compare with counts, free list and hash index."""
        for g, pool in enumerate(self._pools):
            refs = Counter(block for table in self._tables.values() for block in table.blocks[g] if block != NULL_BLOCK)
            null_refs = refs[NULL_BLOCK] + pool.ref_counts[NULL_BLOCK]
            assert null_refs == 0, f"group {g}: the null block was allocated"
            for block in range(1, self.num_blocks):
                counted = pool.ref_counts[block]
                assert counted == refs[block], (
                    f"group {g}, block {block}: {counted} references, {refs[block]} in tables"
                )
            free = pool.list_free_blocks()
            assert len(free) == pool.num_free, f"group {g}: {len(free)} blocks in the free list, not {pool.num_free}"
            expected = {block for block in range(1, self.num_blocks) if refs[block] == 0}
            assert set(free) == expected, f"group {g}: free and unreferenced differ: {set(free) ^ expected}"
            index = {h: b for b, h in enumerate(pool.block_hashes) if h is not None}
            assert index == pool.cached_blocks, f"group {g}: the hash index and the blocks disagree"

    def debug_state(self) -> PagedDebugState:
        """The live parts, for tests and debugging."""
        tables = {name: table.blocks for name, table in self._tables.items()}
        return PagedDebugState(self._pools, tables, sum(map(len, self._pools[0].watchers.values())))

    def _append_blocks(self, table: _BlockTable, num_blocks: int, num_reserved_blocks: int) -> Allocation | None:
        """``allocate`` where no block of the table will be written: the common case, a decoding request's next
        block."""
        starts, new_blocks = [], []
        num_new = num_blocks - len(table.blocks[0])
        for pool in self._pools:
            if pool.num_free < num_new + num_reserved_blocks:
                return None
        for pool, blocks in zip(self._pools, table.blocks, strict=True):
            starts.append(len(blocks))
            new = pool.allocate_blocks(num_new)
            blocks += new
            new_blocks.append(new)
        return Allocation(starts, new_blocks)

    def _open_table(self, request: Request, table: _BlockTable, match: PrefixMatch | None) -> None:
        """Register a request's first table, and add references to its matched blocks."""
        self._tables[request.request_id] = table
        if match is not None:
            table.num_cached = match.num_tokens // self.block_size
            self._num_queries += len(request.token_ids)
            self._num_hits += match.num_tokens
            for pool, blocks in zip(self._pools, table.blocks, strict=True):
                pool.add_references(blocks)

    def _window_start(self, window: int, num_tokens: int) -> int:
        """The first block that the token at position ``num_tokens`` reads."""
        return max(num_tokens - window + 1, 0) // self.block_size

    def _fit_windows(self, hashes: list[bytes], length: int) -> int:
        """The longest prefix, in blocks, whose last window is cached in every group that has one."""
        pairs = zip(self.groups, self._pools, strict=True)
        windowed = [(group.window, pool.cached_blocks) for group, pool in pairs if group.window is not None]
        changed = True
        while changed:  # a shorter prefix moves every group's window
            changed = False
            for window, cached in windowed:
                start = self._window_start(window, length * self.block_size)
                missing = next((i for i in range(length - 1, start - 1, -1) if hashes[i] not in cached), None)
                if missing is not None:
                    length, changed = missing, True
        return length

    def _matched_blocks(self, group: int, hashes: list[bytes], length: int) -> tuple[int, ...]:
        """The blocks of a cached prefix of ``length`` blocks: the null block before a window."""
        cached, window = self._pools[group].cached_blocks, self.groups[group].window
        start = 0 if window is None else min(self._window_start(window, length * self.block_size), length)
        return (NULL_BLOCK,) * start + tuple(cached[hashes[i]] for i in range(start, length))


class _BlockTable:
    """The blocks of one request: a list per group."""

    __slots__ = ("blocks", "num_cached", "num_out_of_window")

    def __init__(self, blocks: list[list[int]]) -> None:
        self.blocks = blocks
        self.num_cached = 0
        """Blocks from the start that ``cache_full_blocks`` has seen."""
        self.num_out_of_window = [0] * len(blocks)
        """By group: blocks from the start that a window has left behind."""
