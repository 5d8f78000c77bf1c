"""Which adapters have a slot on the device, and which requests wait for one."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

from quire.core.adapters import AdapterActivity, AdapterRef
from quire.core.request import Request
from quire.core.sched.waiting_queue import WaitingQueue

if TYPE_CHECKING:
    from quire.core.sched.output_updater import InFlightStep
    from quire.core.sched.request_log import RequestLog

__all__ = ["AdapterSlots", "SlotLoad"]

_MAX_WAIT_NS = 1_000_000_000
"""How long requests of an adapter without a slot wait before another adapter has to give one up."""


class SlotLoad(NamedTuple):
    """An adapter that is to be copied into a slot."""

    slot: int
    adapter: AdapterRef


class AdapterSlots:
    """Gives ``num_slots`` slots to adapters in turn.

    Requests of an adapter without a slot are held back: parked in the queue, out of sight of the policy, so that those
    behind them go on. A request has its adapter's slot from its first grant to its end, preemptions included, and a
    slot is given to another adapter only when no live request has it and no step in flight names it: no request ever
    sees another's weights.

    A free slot goes to the adapter whose waiting request is first by the policy's order. Where requests have waited for
    ``max_wait_ns`` and no slot is free, the adapter that has had its slot for longest is closed: requests that have not
    begun are held back too, and the slot is free when those that have begun end.
    """

    def __init__(
        self,
        num_slots: int,
        waiting: WaitingQueue,
        in_flight: deque[InFlightStep],
        log: RequestLog,
        clock: Callable[[], int] = time.monotonic_ns,
        max_wait_ns: int = _MAX_WAIT_NS,
    ) -> None:
        self._waiting, self._in_flight, self._log, self._clock = waiting, in_flight, log, clock
        self.max_wait_ns = max_wait_ns
        """How long requests wait for a slot before an adapter that has one is closed."""
        self._adapters: dict[int, _Adapter] = {}
        self._held: dict[int, _Adapter] = {}  # adapters with requests that are held back
        self._retired: set[int] = set()
        self._retiring: set[int] = set()  # those of which something is left
        self._slots: list[_Adapter | None] = [None] * num_slots
        self._cleared: list[int] = []
        self.num_loads = self.num_evictions = 0
        waiting.hold_back = self._hold_back

    # ---- Adapters and requests come and go.

    def add_adapter(self, ref: AdapterRef) -> None:
        """Know an adapter. That of a request is known without this."""
        if ref.adapter_id not in self._adapters:
            self._adapters[ref.adapter_id] = _Adapter(ref)
            if ref.adapter_id in self._retired:  # a request that was on its way
                self._retiring.add(ref.adapter_id)

    def retire_adapter(self, adapter_id: int) -> None:
        """No new request will name the adapter: its slot is cleared as soon as its last request has ended."""
        self._retired.add(adapter_id)
        self._retiring.add(adapter_id)

    def set_staged(self, adapter_id: int, is_staged: bool) -> None:
        """Whether the adapter can be copied into a slot at once."""
        if adapter_id in self._adapters:
            self._adapters[adapter_id].is_staged = is_staged

    def admit_request(self, request: Request) -> None:
        """The request gets its first grant, or goes on after a preemption."""
        assert request.adapter is not None
        if request.adapter_slot < 0:
            adapter = self._adapters[request.adapter.adapter_id]
            del adapter.queued[request.request_id]
            adapter.num_running += 1
            request.adapter_slot = adapter.slot

    def request_finished(self, request: Request) -> None:
        """The request has ended."""
        assert request.adapter is not None
        adapter = self._adapters.get(request.adapter.adapter_id)
        if adapter is None:
            return
        if request.adapter_slot >= 0:
            adapter.num_running -= 1
            # Steps in flight may still have rows of it.
            adapter.busy_until = self._in_flight[-1].step.step if self._in_flight else -1
        else:
            adapter.queued.pop(request.request_id, None)
            adapter.held.pop(request.request_id, None)
            if not adapter.held:
                self._held.pop(adapter.ref.adapter_id, None)
        adapter.last_used_ns = self._clock()

    def take_requests(self, adapter_id: int) -> list[Request]:
        """The adapter's requests that have not begun: it cannot be loaded, and they are to be ended."""
        adapter = self._adapters.get(adapter_id)
        return [] if adapter is None else [*adapter.held.values(), *adapter.queued.values()]

    # ---- Slots are given away, between two steps.

    @property
    def has_pending(self) -> bool:
        """Whether a call of ``assign_slots`` or ``take_cleared_slots`` may do anything."""
        return bool(self._held or self._retiring or self._cleared)

    def find_unstaged(self) -> list[AdapterRef]:
        """Adapters that requests wait for and that are not in host memory, those that have waited longest first."""
        unstaged = [each for each in self._held.values() if each.slot < 0 and not each.is_staged]
        return [each.ref for each in sorted(unstaged, key=lambda each: each.held_since_ns)]

    def assign_slots(self) -> list[SlotLoad]:
        """Slots for staged adapters whose requests wait; once the weights are there, ``open_adapter`` lets them in."""
        self._drop_retired()
        loads: list[SlotLoad] = []
        if not self._held:
            return loads
        now_ns = self._clock()
        candidates = [each for each in self._held.values() if each.is_staged and each.slot < 0]
        free = self._find_free_slots() if candidates else []
        if free:
            candidates.sort(key=lambda each: self._rank_waiting(each, now_ns))
        while candidates and free:
            slot, adapter = free.pop(0), candidates.pop(0)
            self._free_slot(slot)
            self._slots[slot], adapter.slot, adapter.is_loading = adapter, slot, True
            adapter.loaded_ns = now_ns
            self.num_loads += 1
            loads.append(SlotLoad(slot, adapter.ref))
        self._close_adapters(sum(now_ns - each.held_since_ns >= self.max_wait_ns for each in candidates))
        return loads

    def open_adapter(self, adapter_id: int) -> None:
        """The adapter's weights are in its slot: its requests may run."""
        adapter = self._adapters[adapter_id]
        adapter.is_loading = adapter.is_closed = False
        self._let_in(adapter)

    def release_slot(self, adapter_id: int) -> None:
        """The adapter's weights could not be copied into its slot."""
        adapter = self._adapters[adapter_id]
        self._free_slot(adapter.slot)

    def take_cleared_slots(self) -> list[int]:
        """Slots of adapters that were retired: what is in them can be dropped."""
        cleared, self._cleared = self._cleared, []
        return cleared

    # ---- What is reported.

    def is_known(self, adapter_id: int) -> bool:
        """Whether the adapter is registered and not retired, or has requests."""
        return adapter_id in self._adapters

    def is_used(self, adapter_id: int) -> bool:
        """Whether requests wait for the adapter to be copied into a slot, or it is being copied."""
        adapter = self._adapters.get(adapter_id)
        return adapter is not None and (adapter.is_loading or (bool(adapter.held) and adapter.slot < 0))

    def list_slots(self) -> dict[int, int]:
        """The slot of each adapter that has one, by the adapter's number."""
        return {adapter.ref.adapter_id: adapter.slot for adapter in self._residents()}

    def list_activity(self) -> list[AdapterActivity]:
        """Adapters that have requests."""
        active = (each for each in self._adapters.values() if each.num_running or each.held or each.queued)
        return [AdapterActivity(each.ref.name, each.num_running, len(each.held) + len(each.queued)) for each in active]

    def stats(self) -> dict[str, float]:
        """Gauges and counters, by the names of ``quire.core.stats.ENGINE_STATS``."""
        num_loading = sum(len(each.held) for each in self._held.values() if not each.is_staged and each.slot < 0)
        num_held = sum(len(each.held) for each in self._held.values())
        return {
            "lora_adapters_in_slots": float(sum(adapter is not None for adapter in self._slots)),
            "lora_requests_waiting_for_load": float(num_loading),
            "lora_requests_waiting_for_slot": float(num_held - num_loading),
            "lora_loads_total": float(self.num_loads),
            "lora_evictions_total": float(self.num_evictions),
        }

    # ---- The queue asks, whenever a request is to enter it.

    def _hold_back(self, request: Request) -> bool:
        """Whether the request has to wait for its adapter, out of the queue."""
        if request.adapter is None or request.adapter_slot >= 0:
            return False
        self.add_adapter(request.adapter)
        adapter = self._adapters[request.adapter.adapter_id]
        if adapter.slot >= 0 and not adapter.is_loading and not adapter.is_closed:
            adapter.queued[request.request_id] = request
            return False
        if not adapter.held:
            adapter.held_since_ns = self._clock()
            self._held[adapter.ref.adapter_id] = adapter
        adapter.held[request.request_id] = request
        self._log.request_held_back(request, self._clock())
        return True

    def _let_in(self, adapter: _Adapter) -> None:
        held, adapter.held = adapter.held, {}
        self._held.pop(adapter.ref.adapter_id, None)
        for request in held.values():
            self._log.request_let_in(request, self._clock())
            self._waiting.unpark_request(request)

    # ---- Slots.

    def _rank_waiting(self, adapter: _Adapter, now_ns: int) -> tuple[object, ...]:
        """Those that have waited too long first, the longest before the others; then in the policy's order."""
        if now_ns - adapter.held_since_ns >= self.max_wait_ns:
            return (0, adapter.held_since_ns, ())
        return (1, 0, min(request.queue_key for request in adapter.held.values()))

    def _find_free_slots(self) -> list[int]:
        """Slots that may be given away: the empty ones, then the least recently used first."""
        empty = [slot for slot, adapter in enumerate(self._slots) if adapter is None]
        idle = [each for each in self._residents() if self._is_idle(each)]
        return empty + [each.slot for each in sorted(idle, key=lambda each: each.last_used_ns)]

    def _is_idle(self, adapter: _Adapter) -> bool:
        """Whether nothing refers to the adapter's slot: no request, and no step in flight."""
        if adapter.num_running or adapter.queued or adapter.is_loading:
            return False
        return not self._in_flight or self._in_flight[0].step.step > adapter.busy_until

    def _residents(self) -> Iterator[_Adapter]:
        return (adapter for adapter in self._slots if adapter is not None)

    def _free_slot(self, slot: int) -> None:
        adapter = self._slots[slot]
        self._slots[slot] = None
        if adapter is not None:
            adapter.slot, adapter.is_loading, adapter.is_closed = -1, False, False
            self.num_evictions += 1
            if adapter.held:
                adapter.held_since_ns = self._clock()  # it has had its turn

    def _close_adapters(self, num_needed: int) -> None:
        """Close as many adapters with slots as others have waited for too long, and open again those beyond."""
        residents = [each for each in self._residents() if not each.is_loading]
        residents.sort(key=lambda each: (not each.is_closed, each.loaded_ns))
        for index, adapter in enumerate(residents):
            if index < num_needed and not adapter.is_closed:
                adapter.is_closed = True
                queued, adapter.queued = adapter.queued, {}
                for request in queued.values():
                    self._waiting.remove_request(request)
                    self._waiting.add_request(request)  # which holds it back
            elif index >= num_needed and adapter.is_closed:
                adapter.is_closed = False
                self._let_in(adapter)

    def _drop_retired(self) -> None:
        for adapter_id in list(self._retiring):
            adapter = self._adapters.get(adapter_id)
            if adapter is not None:
                if adapter.held or not self._is_idle(adapter):
                    continue
                if adapter.slot >= 0:
                    self._cleared.append(adapter.slot)
                    self._free_slot(adapter.slot)
                del self._adapters[adapter_id]
            self._retiring.discard(adapter_id)


class _Adapter:
    """What is known of an adapter."""

    __slots__ = (
        *("busy_until", "held", "held_since_ns", "is_closed", "is_loading", "is_staged", "last_used_ns"),
        *("loaded_ns", "num_running", "queued", "ref", "slot"),
    )

    def __init__(self, ref: AdapterRef) -> None:
        self.ref = ref
        self.slot = -1
        self.is_staged = self.is_loading = False
        self.is_closed = False
        """Others have waited for too long: requests that have not begun wait until it has a slot again."""
        self.held: dict[int, Request] = {}
        """Requests that are parked until it has a slot, by number."""
        self.queued: dict[int, Request] = {}
        """Requests in the queue that have not begun."""
        self.num_running = 0
        """Requests that have begun, preempted ones included."""
        self.busy_until = -1
        """The last step that may name its slot, if none has begun."""
        self.held_since_ns = self.loaded_ns = self.last_used_ns = 0
