"""Guards the engine against its KV allocator: one that raises costs requests at most, never the engine."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

from quire.core.contracts.kv import Allocation, KVAllocator, KVStats, PrefixMatch
from quire.core.plugin.quarantine import Quarantine
from quire.core.request import Request
from quire.core.stats import QuarantinedPlugin

__all__ = ["AllocatorError", "GuardedAllocator"]

_log = logging.getLogger("quire.plugin")
_T = TypeVar("_T")


class AllocatorError(Exception):
    """The allocator raised while a step was scheduled, for ``request``, or for no request in particular."""

    def __init__(self, message: str, request: Request | None) -> None:
        super().__init__(message)
        self.request = request


class GuardedAllocator(KVAllocator):
    """Calls ``allocator``. Nothing else can keep its blocks, so it is not replaced:

    - what only the prefix cache needs (``match_prefix``, ``count_cached_tokens``, ``cache_full_blocks``) is not called
      any more once it raised;
    - what must not fail (``free``, ``stats``) is logged;
    - whatever else raises is an ``AllocatorError``, which ends the request that it was called for.
    """

    def __init__(self, allocator: KVAllocator, name: str, on_quarantine: Callable[[QuarantinedPlugin], None]) -> None:
        super().__init__(
            allocator.groups, allocator.num_blocks, allocator.block_size, prefix_caching=allocator.prefix_caching
        )
        self.allocator = allocator
        self._name = name
        self._no_match = PrefixMatch(0, tuple(() for _ in allocator.groups))
        self._last_stats = KVStats(0, 0, 0, 0, 0)
        self._prefix_cache = Quarantine("kv", name, on_quarantine, replacement="no prefix cache")

    def match_prefix(self, request: Request) -> PrefixMatch:
        """Nothing, once the prefix cache has failed."""
        match = self._prefix_cache.call(self.allocator.match_prefix, request)
        return self._no_match if match is None else match

    def count_cached_tokens(self, request: Request) -> int:
        """0, once the prefix cache has failed."""
        return self._prefix_cache.call(self.allocator.count_cached_tokens, request) or 0

    def allocate(
        self,
        request: Request,
        num_tokens: int,
        *,
        num_computed_tokens: int,
        prefix_match: PrefixMatch | None = None,
        num_reserved_blocks: int = 0,
    ) -> Allocation | None:
        """Raises ``AllocatorError``."""
        try:
            return self.allocator.allocate(
                request,
                num_tokens,
                num_computed_tokens=num_computed_tokens,
                prefix_match=prefix_match,
                num_reserved_blocks=num_reserved_blocks,
            )
        except Exception as error:
            raise self._note_error("allocate", error, request) from error

    def cache_full_blocks(self, request: Request, num_tokens: int) -> None:
        """Does nothing, once the prefix cache has failed."""
        self._prefix_cache.call(self.allocator.cache_full_blocks, request, num_tokens)

    def fork_blocks(self, parent: Request, child: Request, num_tokens: int) -> Allocation | None:
        """Raises ``AllocatorError``."""
        return self._call("fork_blocks", child, lambda: self.allocator.fork_blocks(parent, child, num_tokens))

    def free_out_of_window_blocks(self, request: Request, group: int, before: int) -> None:
        """Raises ``AllocatorError``."""
        free = self.allocator.free_out_of_window_blocks
        self._call("free_out_of_window_blocks", request, lambda: free(request, group, before))

    def free(self, request: Request) -> None:
        """Does what it can: blocks may be lost."""
        try:
            self.allocator.free(request)
        except Exception as error:
            self._note_error("free", error, request)

    def num_free_blocks(self) -> int:
        """Raises ``AllocatorError``."""
        try:
            return self.allocator.num_free_blocks()
        except Exception as error:
            raise self._note_error("num_free_blocks", error, None) from error

    def stats(self) -> KVStats:
        """Those of the last call that did not raise."""
        try:
            self._last_stats = self.allocator.stats()
        except Exception as error:
            self._note_error("stats", error, None)
        return self._last_stats

    def check_integrity(self) -> None:
        """As the allocator does."""
        self.allocator.check_integrity()

    def _call(self, method: str, request: Request, call: Callable[[], _T]) -> _T:
        try:
            return call()
        except Exception as error:
            raise self._note_error(method, error, request) from error

    def _note_error(self, method: str, error: Exception, request: Request | None) -> AllocatorError:
        text = f"kv/{self._name}: {method} raised {type(error).__name__}: {error}"
        _log.error("%s", text, exc_info=error)
        return AllocatorError(text, request)
