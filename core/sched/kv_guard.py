"""Guards the engine against its KV allocator: one that raises is replaced, and no request is lost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

from quire.core.contracts.kv import Allocation, KVAllocator, KVStats, PrefixMatch
from quire.core.plugin.quarantine import NEVER_CONTAINED, Quarantine, class_path, read_error_text
from quire.core.request import Request
from quire.core.sched.kv_ownership import BrokenAllocationError
from quire.core.stats import QuarantinedPlugin

__all__ = ["AllocatorError", "GuardedAllocator"]

_T = TypeVar("_T")


class AllocatorError(Exception):
    """The allocator cannot be used any more: once no request keeps blocks, ``guard.replace_allocator`` is due."""

    def __init__(self, guard: GuardedAllocator) -> None:
        super().__init__(f"kv/{guard.name} failed; the engine's log says why")  # its requests are told this
        self.guard = guard


class GuardedAllocator(KVAllocator):
    """Calls ``allocator`` until it raises, in whichever method. Which blocks are free is not known then, nor what the
    cached ones hold, so it is quarantined as a whole.

    What the engine can do without at that moment (a prefix match, caching, freeing, statistics) is passed over;
    everything else raises ``AllocatorError``, at the latest when the next step is scheduled. The engine then takes back
    the blocks of all requests and goes on with what ``make_replacement`` returns; they are computed again.
    """

    def __init__(
        self,
        allocator: KVAllocator,
        name: str,
        make_replacement: Callable[[], KVAllocator],
        on_quarantine: Callable[[QuarantinedPlugin], None],
    ) -> None:
        super().__init__(
            allocator.groups, allocator.num_blocks, allocator.block_size, prefix_caching=allocator.prefix_caching
        )
        self.allocator = allocator
        self.is_replaced = False
        """Whether ``allocator`` is a replacement already. If that raises too, requests are at fault: they must end."""
        self.fault_request: Request | None = None
        """The request for which it was called then; None: no request in particular."""
        self._make_replacement = make_replacement
        self._on_quarantine = on_quarantine
        self._quarantine = self._start_quarantine(name)
        self._no_match = PrefixMatch(0, tuple(() for _ in allocator.groups))
        self._last_stats = self._base_stats = KVStats(0, 0, 0, 0, 0)

    @property
    def name(self) -> str:
        """The allocator's."""
        return self._quarantine.name

    def replace_allocator(self) -> None:
        """Start over with another allocator: every block is free, and nothing is cached."""
        self._base_stats = self._last_stats
        self.allocator, self.is_replaced = self._make_replacement(), True
        self._quarantine = self._start_quarantine(class_path(self.allocator))

    def match_prefix(self, request: Request) -> PrefixMatch:
        """Nothing, if the allocator has failed."""
        match = self._call("match_prefix", request, partial(self.allocator.match_prefix, request))
        return self._no_match if match is None else match

    def count_cached_tokens(self, requests: Sequence[Request]) -> list[int]:
        """Zeros, if the allocator has failed."""
        counts = self._call("count_cached_tokens", None, partial(self.allocator.count_cached_tokens, requests))
        return counts or [0] * len(requests)

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
        if not self._quarantine.is_active:
            raise AllocatorError(self)
        try:  # written out: it is called for every block
            return self.allocator.allocate(
                request,
                num_tokens,
                num_computed_tokens=num_computed_tokens,
                prefix_match=prefix_match,
                num_reserved_blocks=num_reserved_blocks,
            )
        except NEVER_CONTAINED:
            raise
        except BaseException as error:
            self._note_fault("allocate", error, request)
            raise AllocatorError(self) from error

    def cache_full_blocks(self, request: Request, num_tokens: int) -> None:
        """Does nothing, if the allocator has failed."""
        self._call("cache_full_blocks", request, partial(self.allocator.cache_full_blocks, request, num_tokens))

    def evict_prefix(self, request: Request) -> None:
        """Does nothing, if the allocator has failed: what it has cached is never read again."""
        self._call("evict_prefix", request, partial(self.allocator.evict_prefix, request))

    def fork_blocks(self, parent: Request, child: Request, num_tokens: int) -> Allocation | None:
        """Raises ``AllocatorError``."""
        return self._require("fork_blocks", child, partial(self.allocator.fork_blocks, parent, child, num_tokens))

    def free_out_of_window_blocks(self, request: Request, group: int, before: int) -> None:
        """Raises ``AllocatorError``."""
        free = partial(self.allocator.free_out_of_window_blocks, request, group, before)
        self._require("free_out_of_window_blocks", request, free)

    def free(self, request: Request) -> None:
        """Does nothing, if the allocator has failed: all blocks will be free."""
        self._call("free", request, partial(self.allocator.free, request))

    def num_free_blocks(self) -> int:
        """Raises ``AllocatorError``."""
        if not self._quarantine.is_active:
            raise AllocatorError(self)
        try:  # written out: it is called in every step
            return self.allocator.num_free_blocks()
        except NEVER_CONTAINED:
            raise
        except BaseException as error:
            self._note_fault("num_free_blocks", error, None)
            raise AllocatorError(self) from error

    def stats(self) -> KVStats:
        """Those of the last call, if the allocator has failed. Counters go on where those of a replaced one ended."""
        stats = self._call("stats", None, self.allocator.stats)
        if stats is not None:
            stats.prefix_queries += self._base_stats.prefix_queries
            stats.prefix_hits += self._base_stats.prefix_hits
            self._last_stats = stats
        return self._last_stats

    def check_integrity(self) -> None:
        """As the allocator does."""
        self.allocator.check_integrity()

    def _call(self, method: str, request: Request | None, call: Callable[[], _T]) -> _T | None:
        """None, if the allocator has failed."""
        try:
            return self._require(method, request, call)
        except AllocatorError:
            return None

    def _require(self, method: str, request: Request | None, call: Callable[[], _T]) -> _T:
        """Raises ``AllocatorError``."""
        if not self._quarantine.is_active:
            raise AllocatorError(self)
        try:
            return call()
        except NEVER_CONTAINED:
            raise
        except BaseException as error:
            self._note_fault(method, error, request)
            raise AllocatorError(self) from error

    def _note_fault(self, method: str, error: BaseException, request: Request | None) -> None:
        self.fault_request = request
        is_broken = isinstance(error, BrokenAllocationError)
        text = read_error_text(error)
        detail = f"{method} {text}" if is_broken else f"{method} raised {type(error).__name__}: {text}"
        self._quarantine.switch_off("invalid_result" if is_broken else "raised", detail, error)

    def _start_quarantine(self, name: str) -> Quarantine:
        return Quarantine("kv", name, self._on_quarantine, replacement="another allocator")
