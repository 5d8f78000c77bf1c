"""The blocks of one group: who references them, which are findable, which go next."""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["BlockPool"]

NULL_BLOCK = 0
"""Block 0 takes the writes of padding. It is never handed out, and serves as the head of the free list."""


class BlockPool:
    """Reference counts, the free list and the hash index of ``num_blocks`` blocks. Every operation is O(1) a block.

    The free list is doubly linked through two plain lists, least valuable first: blocks without content at the front,
    findable ones behind them by the time they were given up. A findable block stays findable until it is taken.
    """

    def __init__(self, num_blocks: int) -> None:
        self.ref_counts = [0] * num_blocks
        self.block_hashes: list[bytes | None] = [None] * num_blocks
        self.cached_blocks: dict[bytes, int] = {}
        self.num_free = num_blocks - 1
        self._next = [*range(1, num_blocks), NULL_BLOCK]
        self._prev = [num_blocks - 1, *range(num_blocks - 1)]

    def allocate_blocks(self, count: int) -> list[int]:
        """``count`` blocks, each with one reference; there must be that many free ones."""
        taken = []
        for _ in range(count):
            block = self._next[NULL_BLOCK]
            self._unlink(block)
            self.evict_block(block)
            self.ref_counts[block] = 1
            taken.append(block)
        return taken

    def add_references(self, blocks: Iterable[int]) -> None:
        """Add a reference to each block (the sink aside), taking it off the free list if nobody held it."""
        for block in blocks:
            if block != NULL_BLOCK:
                if self.ref_counts[block] == 0:
                    self._unlink(block)
                self.ref_counts[block] += 1

    def drop_references(self, blocks: Iterable[int]) -> None:
        """Drop a reference of each block. Those that nobody holds any more are free: the first named goes first."""
        for block in blocks:
            if block != NULL_BLOCK:
                self.ref_counts[block] -= 1
                if self.ref_counts[block] == 0:
                    self._link(block)

    def insert_cached(self, block: int, block_hash: bytes) -> None:
        """Make a full block findable, unless it is already or another block with the same content is."""
        if self.block_hashes[block] is None and block_hash not in self.cached_blocks:
            self.block_hashes[block] = block_hash
            self.cached_blocks[block_hash] = block

    def evict_block(self, block: int) -> bool:
        """Make a block unfindable; whether it was findable."""
        block_hash = self.block_hashes[block]
        if block_hash is None:
            return False
        self.block_hashes[block] = None
        del self.cached_blocks[block_hash]
        return True

    def list_free_blocks(self) -> list[int]:
        """The free blocks in the order in which they will be taken."""
        order, block = [], self._next[NULL_BLOCK]
        while block != NULL_BLOCK:
            order.append(block)
            assert len(order) < len(self._next), "the free list has a cycle"
            assert self._prev[self._next[block]] == block, f"the free list is torn at block {block}"
            block = self._next[block]
        return order

    def _unlink(self, block: int) -> None:
        before, after = self._prev[block], self._next[block]
        self._next[before] = after
        self._prev[after] = before
        self.num_free -= 1

    def _link(self, block: int) -> None:
        """Blocks without content go to the front, the others to the back."""
        if self.block_hashes[block] is None:
            before, after = NULL_BLOCK, self._next[NULL_BLOCK]
        else:
            before, after = self._prev[NULL_BLOCK], NULL_BLOCK
        self._next[before] = self._prev[after] = block
        self._prev[block], self._next[block] = before, after
        self.num_free += 1
