"""The blocks of one group: how many requests reference each, which are cached, which are allocated next."""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["NULL_BLOCK", "BlockPool"]

NULL_BLOCK = 0
"""Block 0 takes the writes of padding, and stands in tables for blocks that a sliding window has left behind. It is
never allocated, and serves as the head of the free list."""


class BlockPool:
    """Reference counts, the free list and the hash index of ``num_blocks`` blocks. Every operation takes constant time
    per block.

    The free list is doubly linked through two plain lists, in the order of allocation: first blocks that are not
    cached, then cached ones, the least recently used first. A cached block stays cached until it is allocated anew.
    """

    def __init__(self, num_blocks: int) -> None:
        self.ref_counts = [0] * num_blocks
        self.block_hashes: list[bytes | None] = [None] * num_blocks
        """By block: the hash under which it is cached, or None."""
        self.cached_blocks: dict[bytes, int] = {}
        """The same by hash."""
        self.watchers: dict[bytes, set[int]] = {}
        """By hash: requests to be named once in ``notified`` when a block is cached under it, or is not any more."""
        self.notified: list[int] = []
        self.num_free = num_blocks - 1
        # The neighbours of each block in the free list; those of blocks that are not free mean nothing.
        self._next = [*range(1, num_blocks), NULL_BLOCK]
        self._prev = [num_blocks - 1, *range(num_blocks - 1)]

    def allocate_blocks(self, count: int) -> list[int]:
        """``count`` blocks, each with one reference. There must be that many free ones; cached ones are evicted."""
        following, ref_counts, block_hashes = self._next, self.ref_counts, self.block_hashes
        blocks, block = [], following[NULL_BLOCK]
        for _ in range(count):
            if block_hashes[block] is not None:
                self.evict_block(block)
            ref_counts[block] = 1
            blocks.append(block)
            block = following[block]
        following[NULL_BLOCK], self._prev[block] = block, NULL_BLOCK
        self.num_free -= count
        return blocks

    def add_references(self, blocks: Iterable[int]) -> None:
        """Add a reference to each block except the null block, and take it off the free list if it is there."""
        for block in blocks:
            if block != NULL_BLOCK:
                if self.ref_counts[block] == 0:
                    self._unlink(block)
                self.ref_counts[block] += 1

    def drop_references(self, blocks: Iterable[int]) -> None:
        """Drop a reference to each block. Blocks without references are free, to be allocated in the order given."""
        following, before, ref_counts, block_hashes = self._next, self._prev, self.ref_counts, self.block_hashes
        for block in blocks:
            if block != NULL_BLOCK:
                ref_counts[block] = num_references = ref_counts[block] - 1
                if not num_references:  # one that is not cached goes to the front, a cached one to the back
                    if block_hashes[block] is None:
                        first = following[NULL_BLOCK]
                        following[NULL_BLOCK] = before[first] = block
                        before[block], following[block] = NULL_BLOCK, first
                    else:
                        last = before[NULL_BLOCK]
                        following[last] = before[NULL_BLOCK] = block
                        before[block], following[block] = last, NULL_BLOCK
                    self.num_free += 1

    def insert_cached(self, block: int, block_hash: bytes) -> None:
        """Cache a full block under its hash, unless it is cached or another block with the same content is."""
        if self.block_hashes[block] is None and block_hash not in self.cached_blocks:
            self.block_hashes[block] = block_hash
            self.cached_blocks[block_hash] = block
            if block_hash in self.watchers:
                self.notified += self.watchers.pop(block_hash)

    def evict_block(self, block: int) -> None:
        """Take a block out of the prefix cache, if it is there."""
        block_hash = self.block_hashes[block]
        if block_hash is not None:
            self.block_hashes[block] = None
            del self.cached_blocks[block_hash]
            if block_hash in self.watchers:
                self.notified += self.watchers.pop(block_hash)

    def list_free_blocks(self) -> list[int]:
        """The free blocks in the order in which they will be allocated; checks the links. For tests and debugging."""
        order, block = [], self._next[NULL_BLOCK]
        while block != NULL_BLOCK:
            order.append(block)
            assert len(order) < len(self._next), "the free list has a cycle"
            assert self._prev[self._next[block]] == block, f"the free list is broken at block {block}"
            block = self._next[block]
        return order

    def _unlink(self, block: int) -> None:
        before, after = self._prev[block], self._next[block]
        self._next[before] = after
        self._prev[after] = before
        self.num_free -= 1
