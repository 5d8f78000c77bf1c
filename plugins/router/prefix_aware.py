"""The engine that has most of the prompt in its prefix cache, unless it has too much to do.

As in the cache-aware routers of SGLang and llm-d: an approximate record of what each engine was sent decides, until the
loads differ too much; then the fewest requests do.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from quire.sdk import ReplicaLoad, RoutedRequest, Router

__all__ = ["PrefixAwareRouter"]


class PrefixAwareRouter(Router):
    """Follows prefixes. A request whose prefix no engine had goes to the one with the fewest requests."""

    @dataclass(frozen=True)
    class Options:
        """Options of the router."""

        max_imbalance: float = 1.5
        """An engine may have this many times the requests of the one with the fewest, and ``min_imbalance`` more,
        before prefixes no longer count."""
        min_imbalance: int = 8
        max_blocks: int = 100_000
        """Blocks that are remembered of each engine; the oldest are forgotten, as its cache evicts them."""

        def __post_init__(self) -> None:
            if not 1 <= self.max_imbalance <= 1e6:
                raise ValueError(f"max_imbalance is a ratio, 1 or more, got {self.max_imbalance}")
            if self.min_imbalance < 0 or self.max_blocks < 1:
                raise ValueError("min_imbalance must be 0 or more, and max_blocks 1 or more")

    def __init__(self, options: Options | None = None) -> None:
        super().__init__(options or self.Options())
        self._sent: list[OrderedDict[int, None]] = []  # by replica: hashes, the oldest first

    def choose_replica(self, request: RoutedRequest, replicas: Sequence[ReplicaLoad]) -> int:
        """The one with the longest prefix; of several the one with the fewest requests."""
        while len(self._sent) < len(replicas):
            self._sent.append(OrderedDict())
        fewest = min(load.num_requests for load in replicas)
        most = max(fewest * self.options.max_imbalance, fewest + self.options.min_imbalance)

        def rank(index: int) -> tuple[int, int, float, int]:
            load = replicas[index]
            matched = self._count_matching(index, request) if load.num_requests <= most else 0
            return -matched, load.num_requests, load.kv_usage, index

        chosen = min(range(len(replicas)), key=rank)
        self._remember(chosen, request)
        return chosen

    def _count_matching(self, replica: int, request: RoutedRequest) -> int:
        sent = self._sent[replica]
        for count, block_hash in enumerate(request.prefix_hashes):
            if block_hash not in sent:
                return count
        return len(request.prefix_hashes)

    def _remember(self, replica: int, request: RoutedRequest) -> None:
        sent = self._sent[replica]
        for block_hash in request.prefix_hashes:
            sent[block_hash] = None
            sent.move_to_end(block_hash)
        while len(sent) > self.options.max_blocks:
            sent.popitem(last=False)
