"""Brings adapters to the workers: from disk into host memory, and from there into slots."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import msgspec

from quire.core.adapters import AdapterRef
from quire.core.config import AdapterConfig
from quire.core.contracts.executor import Executor
from quire.core.control import ControlMethods
from quire.core.errors import EngineDeadError, InvalidRequestError
from quire.core.sched.adapter_slots import AdapterSlots, SlotLoad

__all__ = ["AdapterLoader", "LoadedAdapter"]

_log = logging.getLogger("quire.engine")
_POLL_NS = 2_000_000
"""How often the workers are asked whether they have read an adapter."""


class LoadedAdapter(msgspec.Struct):
    """An adapter that the workers hold."""

    adapter_id: int
    slot: int
    """-1: it is in host memory alone."""
    is_in_host_memory: bool


class AdapterLoader:
    """Decides which adapters are in host memory, at most ``max_cpu_loras``, the least recently used of which make room;
    tells the workers; and lets requests in once their adapter is in its slot. Called between steps.

    The workers read in threads and copy in parts (``Worker``'s control methods ``stage_adapter``, ``load_adapter``,
    ``unload_adapter`` and ``forget_adapter``), so nothing here waits for an adapter.
    """

    def __init__(
        self,
        config: AdapterConfig,
        slots: AdapterSlots,
        executor: Executor,
        fail_requests: Callable[[int, str], None],
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        """``fail_requests`` ends the requests of an adapter that have not begun, with an error."""
        self._max_staged = config.max_cpu_loras
        self._slots, self._executor, self._fail_requests, self._clock = slots, executor, fail_requests, clock
        self._staged: dict[int, bool] = {}  # in host memory, or being read (False); least recently used first
        self._wanted: dict[int, AdapterRef] = {}  # added, and not read yet
        self._errors: dict[int, str] = {}  # of those that were added, until it is told
        self._loading: list[SlotLoad] = []
        self._polled_ns = 0
        self._num_forgotten = 0

    @property
    def has_work(self) -> bool:
        """Whether ``advance`` has anything to do."""
        return bool(self._slots.has_pending or self._wanted or self._loading)

    def add_methods(self, control: ControlMethods) -> None:
        """What control calls may call."""
        control.add_method("add_adapter", self.add_adapter)
        control.add_method("remove_adapter", self.remove_adapter)
        control.add_method("list_adapters", self.list_adapters)

    def add_adapter(self, adapter: AdapterRef) -> bool:
        """Begin to read an adapter into host memory, and whether it is there: call again to ask. Raises
        ``InvalidRequestError`` where it cannot be used."""
        adapter_id = adapter.adapter_id
        self._slots.add_adapter(adapter)
        if not self._staged.get(adapter_id):
            self._wanted[adapter_id] = adapter
            self.advance()
        if (error := self._errors.pop(adapter_id, None)) is not None:
            self.remove_adapter(adapter_id)
            raise InvalidRequestError(error, "lora_path")
        return bool(self._staged.get(adapter_id))

    def remove_adapter(self, adapter_id: int) -> None:
        """No new request will name the adapter. It is dropped once those that do have ended."""
        self._wanted.pop(adapter_id, None)
        self._slots.retire_adapter(adapter_id)
        self.advance()

    def list_adapters(self) -> list[LoadedAdapter]:
        """Every adapter that the workers hold."""
        self.advance()
        slot_of = self._slots.list_slots()
        held = sorted({*slot_of, *self._staged})
        return [LoadedAdapter(each, slot_of.get(each, -1), self._staged.get(each, False)) for each in held]

    def advance(self) -> None:
        """Take every step that can be taken now."""
        now_ns = self._clock()
        if now_ns - self._polled_ns >= _POLL_NS:
            self._polled_ns = now_ns
            for ref in [*self._slots.find_unstaged(), *list(self._wanted.values())]:
                self._stage(ref)
        loads = self._slots.assign_slots()
        for slot in self._slots.take_cleared_slots():
            self._call("unload_adapter", slot=slot)
        self._loading += loads
        for load in list(self._loading):
            self._load(load)
        for adapter_id in [each for each in self._staged if not self._slots.is_known(each)]:
            self._forget(adapter_id)

    def stats(self) -> dict[str, float]:
        """Gauges and counters, by the names of ``quire.core.stats.ENGINE_STATS``."""
        return {
            "lora_adapters_in_host_memory": float(len(self._staged)),
            "lora_host_evictions_total": float(self._num_forgotten),
        }

    def _stage(self, ref: AdapterRef) -> None:
        adapter_id = ref.adapter_id
        is_added = adapter_id in self._wanted
        if self._staged.get(adapter_id) or (adapter_id not in self._staged and not self._make_room(is_added)):
            return
        self._staged.setdefault(adapter_id, False)
        try:
            is_staged = all(
                self._call("stage_adapter", adapter_id=adapter_id, path=ref.path, content_hash=ref.content_hash)
            )
        except EngineDeadError:
            raise
        except Exception as error:  # whatever a file or a plugin does, it is the error of this adapter
            self._forget(adapter_id)
            self._fail(ref, str(error))
            return
        if is_staged:
            self._wanted.pop(adapter_id, None)
            self._staged[adapter_id] = True
            self._slots.set_staged(adapter_id, True)

    def _make_room(self, is_added: bool) -> bool:
        """Room for one more adapter in host memory. False if all of those there are needed. For one that is added, of
        which somebody waits to hear whether it can be used, those that wait for a slot make room as well: they are read
        again."""
        loading = {load.adapter.adapter_id for load in self._loading}
        staged = [each for each, is_staged in self._staged.items() if is_staged and each not in loading]
        unused = [each for each in staged if not self._slots.is_used(each)]
        if is_added:
            unused += [each for each in staged if each not in unused]
        while len(self._staged) >= self._max_staged and unused:
            self._forget(unused.pop(0))
            self._num_forgotten += 1
        return len(self._staged) < self._max_staged

    def _load(self, load: SlotLoad) -> None:
        adapter_id = load.adapter.adapter_id
        try:
            is_loaded = all(self._call("load_adapter", slot=load.slot, adapter_id=adapter_id))
        except EngineDeadError:
            raise
        except Exception as error:
            self._loading.remove(load)
            self._slots.release_slot(adapter_id)
            self._fail(load.adapter, str(error))
            return
        if is_loaded:
            self._loading.remove(load)
            self._slots.open_adapter(adapter_id)
            if adapter_id in self._staged:
                self._staged[adapter_id] = self._staged.pop(adapter_id)  # the most recently used is the last

    def _forget(self, adapter_id: int) -> None:
        del self._staged[adapter_id]
        self._slots.set_staged(adapter_id, False)
        self._call("forget_adapter", adapter_id=adapter_id)

    def _fail(self, ref: AdapterRef, error: str) -> None:
        reason = " ".join(error.split())
        _log.error("the adapter %s cannot be used: %s", ref.name, reason)
        if self._wanted.pop(ref.adapter_id, None) is not None:
            self._errors[ref.adapter_id] = reason
        self._fail_requests(ref.adapter_id, f"the adapter {ref.name!r} cannot be used: {reason}")

    def _call(self, method: str, **arguments: object) -> list[object]:
        return self._executor.collective_rpc(method, arguments)
