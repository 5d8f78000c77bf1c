"""What of a request's prompt is cached, and what of it earlier requests had too: for policies that read it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from quire.core.contracts.kv import KVAllocator
from quire.core.request import Request

__all__ = ["PrefixLookup", "SharedPrefix"]

_MAX_REMEMBERED_BLOCKS = 100_000
"""Block hashes of earlier prompts that are remembered: 1.6 million tokens."""


class SharedPrefix(NamedTuple):
    """Of a prompt, when it arrived."""

    num_cached_tokens: int
    prefix_hash: int
    """Of the longest beginning, in whole blocks, that an earlier prompt had; 0: none."""


class PrefixLookup:
    """Looks up prompts in the prefix cache, and remembers their blocks."""

    def __init__(self, allocator: KVAllocator, max_remembered_blocks: int = _MAX_REMEMBERED_BLOCKS) -> None:
        self._allocator = allocator
        self._max_remembered_blocks = max_remembered_blocks
        self._seen: dict[bytes, None] = {}  # in the order in which they were first seen

    def record_arrival(self, request: Request) -> SharedPrefix:
        """What the prompt shares with those before it, which it joins."""
        (num_cached_tokens,) = self._allocator.count_cached_tokens([request])
        seen, shared = self._seen, b""
        for block_hash in request.block_hashes:
            if block_hash in seen:
                shared = block_hash
            else:
                seen[block_hash] = None
        while len(seen) > self._max_remembered_blocks:
            del seen[next(iter(seen))]
        return SharedPrefix(num_cached_tokens, int.from_bytes(shared[:8], "little") >> 1)

    def count_cached_tokens(self, requests: Sequence[Request]) -> NDArray[np.int64]:
        """Tokens of each request that the prefix cache holds now."""
        return np.array(self._allocator.count_cached_tokens(requests), np.int64)
