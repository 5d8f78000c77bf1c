"""Adapters of one rank: reads them, copies them into slots between steps, and tells layers which token has which."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quire.core.contracts.adapter import AdapterTensors
from quire.core.errors import InvalidRequestError
from quire.core.layers.adapters import ModelAdapters
from quire.core.messages import SchedulerOutput

__all__ = ["AdapterRunner", "CopyLimits"]

_log = logging.getLogger("quire.worker")


@dataclass(frozen=True, slots=True)
class CopyLimits:
    """How much of an adapter is copied before one step: 0.4 ms of a PCIe 5 link, and as much of launching."""

    num_bytes: int = 16 << 20
    num_tensors: int = 64


class _Copy(NamedTuple):
    destination: Tensor
    source: Tensor


@dataclass(slots=True)
class _SlotLoad:
    """An adapter on its way into a slot."""

    tensors: Future[list[AdapterTensors]]
    copies: deque[_Copy] | None = (
        None  # what is not queued yet, oldest first; None: the tensors have not been looked at
    )


class AdapterRunner:
    """Loads adapters in two phases, so that no step waits for one.

    *Staging* reads an adapter in a thread and leaves its tensors in host memory as the slots hold them. *Loading*
    copies them into a slot: on a GPU first, in another thread, into pinned memory, of which enough for one adapter is
    kept; then to the device, behind the steps that are launched and some before each step that follows. A step that
    names the slot gets the rest first. So a step uses what was loaded before it, whole.
    """

    def __init__(
        self, adapters: ModelAdapters, num_rows: int, device: torch.device, copy_limits: CopyLimits | None = None
    ) -> None:
        """``copy_limits`` None: an adapter is copied whole where it is loaded."""
        self._adapters = adapters
        self._method = adapters.method
        self._device = device
        self._copy_limits = copy_limits
        self._slot_of_row = np.full(num_rows + 1, -1, np.int32)  # of the request table
        self._step_slots = np.zeros(0, np.int32)  # (num_reqs,) of the step that runs
        self._num_scheduled_tokens = np.zeros(0, np.int32)  # (num_reqs,) likewise
        self._prepared: NDArray[np.int32] | None = None  # what a captured step was prepared with last
        self._staged: dict[int, Future[list[AdapterTensors]]] = {}
        self._reading_pool = ThreadPoolExecutor(1, thread_name_prefix="quire-read-adapter")
        self._pinning_pool = ThreadPoolExecutor(1, thread_name_prefix="quire-pin-adapter")
        self._adapter_of_slot: dict[int, int] = {}
        self._has_copied = False  # before a step, since ``load_adapter`` asked last
        self._loads: dict[int, _SlotLoad] = {}  # by slot

    @property
    def is_active(self) -> bool:
        """Whether a token of the step that runs has an adapter."""
        return self._method.is_active

    @property
    def num_named_slots(self) -> int:
        """Which graph of a captured step is replayed: 0 without adapters, or the slots, of the first, that it reads."""
        return self._method.num_named_slots if self.is_active else 0

    def list_slot_counts(self, num_tokens: int) -> Sequence[int]:
        """For which numbers of slots a step of ``num_tokens`` is captured."""
        return self._method.list_slot_counts(num_tokens)

    # ---- adapters

    def stage_adapter(self, adapter_id: int, path: str, content_hash: str = "") -> bool:
        """Read the adapter in the folder ``path``, unless ``adapter_id`` is staged. Returns at once, and whether it is
        staged: call again to ask. Raises ``CheckpointError`` where it cannot be used, and forgets it."""
        future = self._staged.get(adapter_id)
        if future is None:
            self._staged[adapter_id] = self._reading_pool.submit(self._make_tensors, Path(path), content_hash or None)
            return False
        if not future.done():
            return False
        self._take_tensors(adapter_id)
        return True

    def load_adapter(self, slot: int, adapter_id: int) -> bool:
        """From the next step on ``slot`` holds the adapter, in place of any other. Waits if it is not staged yet.

        Returns whether the last of its copies is queued: a step that names the slot before that pays for the others.
        Call again to ask, which queues some more where no step does.
        """
        self._check_slot(slot)
        if self._adapter_of_slot.get(slot) == adapter_id:
            if not self._has_copied:
                self._copy_some()
            self._has_copied = False
            return slot not in self._loads
        if adapter_id not in self._staged:
            raise InvalidRequestError(f"adapter {adapter_id} is not staged; call stage_adapter first", "adapter_id")
        tensors = self._take_tensors(adapter_id)
        self.unload_adapter(slot)
        is_on_gpu = self._device.type == "cuda"
        self._loads[slot] = _SlotLoad(
            self._pinning_pool.submit(_pin_tensors, tensors, self._list_buffers(slot))
            if is_on_gpu
            else self._staged[adapter_id]
        )
        self._adapter_of_slot[slot] = adapter_id
        if self._copy_limits is None:
            self._finish_load(slot)
        return slot not in self._loads

    @torch.inference_mode()
    def unload_adapter(self, slot: int) -> None:
        """From the next step on ``slot`` changes nothing."""
        self._check_slot(slot)
        self._loads.pop(slot, None)
        self._adapter_of_slot.pop(slot, None)
        self._method.clear_slot(slot)

    def forget_adapter(self, adapter_id: int) -> None:
        """Free the host's copy. Slots keep theirs."""
        future = self._staged.pop(adapter_id, None)
        if future is not None:
            future.cancel()

    def reserve_pinned_memory(self) -> None:
        """Let torch keep pinned memory for one adapter of the largest rank: to pin more waits for the device."""
        blocks = [_make_pinned(buffer) for buffers in self._list_buffers(0) for buffer in buffers]
        blocks.clear()

    # ---- steps

    def begin_step(self, step: SchedulerOutput) -> None:
        """Note the slots of requests that enter, copy some of what is being loaded, and see whether the step has
        adapters; one of the ``prepare`` methods comes next."""
        for request in step.new_requests:
            self._slot_of_row[request.row] = request.adapter_slot
        self._step_slots, self._num_scheduled_tokens = self._slot_of_row[step.rows], step.num_scheduled_tokens
        self._method.is_active = bool((self._step_slots >= 0).any())
        if self._loads:
            for slot in [slot for slot in self._loads if slot in self._step_slots]:
                self._finish_load(slot)
            self._copy_some()
            self._has_copied = True

    def prepare_step(self) -> None:
        """The step runs as it is."""
        if self.is_active:
            self._prepared = None
            self._method.prepare_metadata(np.repeat(self._step_slots, self._num_scheduled_tokens))

    def prepare_decodes(self, size: int, query_len: int) -> None:
        """The step runs padded to ``size`` requests of ``query_len`` tokens each, as captured."""
        if self.is_active:
            token_slots = np.full(size * query_len, -1, np.int32)
            token_slots[: len(self._step_slots) * query_len] = np.repeat(self._step_slots, query_len)
            self._prepare_captured(token_slots)

    def prepare_prefill(self, num_decodes: int, padded_decodes: int, num_tokens: int) -> None:
        """The step runs padded to ``num_tokens``, as captured: its first ``num_decodes``, padding up to
        ``padded_decodes``, the others, and padding."""
        if self.is_active:
            of_tokens = np.repeat(self._step_slots, self._num_scheduled_tokens)
            token_slots = np.full(num_tokens, -1, np.int32)
            token_slots[:num_decodes] = of_tokens[:num_decodes]
            token_slots[padded_decodes : padded_decodes + len(of_tokens) - num_decodes] = of_tokens[num_decodes:]
            self._prepare_captured(token_slots)

    def prepare_padding(self, num_tokens: int, num_slots: int) -> None:
        """What is launched next is captured with ``num_tokens``, none of which has an adapter, for steps that name the
        first ``num_slots``; 0: without adapters."""
        self._method.is_active = num_slots > 0
        self._prepared = None  # every pass that is captured is prepared for
        if num_slots:
            self._prepare_captured(np.full(num_tokens, -1, np.int32), num_slots)

    def _prepare_captured(self, token_slots: NDArray[np.int32], num_slots: int | None = None) -> None:
        method = self._method
        if num_slots is None:
            least = int(token_slots.max()) + 1
            num_slots = next(count for count in method.list_slot_counts(len(token_slots)) if count >= least)
        # Most decodes have the requests of the step before: then nothing is copied to the device.
        is_prepared = self._prepared is not None and np.array_equal(self._prepared, token_slots)
        if not is_prepared or num_slots != method.num_named_slots:
            method.num_named_slots = num_slots
            method.prepare_metadata(token_slots, is_captured=True)
            self._prepared = token_slots

    # ---- copies

    def _list_buffers(self, slot: int) -> list[Sequence[Tensor]]:
        """What the layers share, then each layer's."""
        return [self._method.slot_buffers(slot), *(each.slot_buffers(slot) for each in self._adapters.layers.values())]

    def _make_tensors(self, path: Path, content_hash: str | None) -> list[AdapterTensors]:
        """In the thread: what the layers share of an adapter, and of each layer."""
        limits = self._method.limits
        adapter = self._method.read_adapter(
            path,
            max_rank=limits.max_rank,
            module_shapes=self._adapters.module_shapes,
            dtype=limits.dtype,
            content_hash=content_hash,
        )
        tensors = [self._method.make_tensors(adapter)]
        tensors += [layer.make_tensors(adapter) for layer in self._adapters.layers.values()]
        return tensors

    def _take_tensors(self, adapter_id: int) -> list[AdapterTensors]:
        try:
            return self._staged[adapter_id].result()
        except BaseException:
            del self._staged[adapter_id]
            raise

    @torch.inference_mode()
    def _copy_some(self) -> None:
        if not self._loads or self._copy_limits is None:
            return
        num_bytes, num_tensors = self._copy_limits.num_bytes, self._copy_limits.num_tensors
        for slot, load in list(self._loads.items()):
            if not load.tensors.done():
                continue
            copies = self._list_copies(slot, load)
            while copies and num_bytes > 0 and num_tensors > 0:
                copy = copies.popleft()
                copy.destination.copy_(copy.source, non_blocking=True)
                num_bytes -= copy.source.nbytes
                num_tensors -= 1
            if not copies:
                del self._loads[slot]

    @torch.inference_mode()
    def _finish_load(self, slot: int) -> None:
        for copy in self._list_copies(slot, self._loads.pop(slot)):
            copy.destination.copy_(copy.source, non_blocking=True)

    def _list_copies(self, slot: int, load: _SlotLoad) -> deque[_Copy]:
        """What is not queued yet. Waits for the tensors."""
        if load.copies is None:
            load.copies = deque(
                _Copy(buffer[: len(source)], source)
                for buffers, sources in zip(self._list_buffers(slot), load.tensors.result(), strict=True)
                for buffer, source in zip(buffers, sources, strict=True)
                if source is not None
            )
        return load.copies

    def _check_slot(self, slot: int) -> None:
        num_slots = self._method.limits.num_slots
        if not 0 <= slot < num_slots:
            raise InvalidRequestError(f"slot {slot} is none of the {num_slots} slots", "slot")


def _pin_tensors(tensors: list[AdapterTensors], buffers: list[Sequence[Tensor]]) -> list[AdapterTensors]:
    """Copies in pinned memory, or the tensors themselves where there is none left: copies to the device then wait."""
    try:
        return [
            [
                None if source is None else _make_pinned(buffer)[: len(source)].copy_(source)
                for buffer, source in zip(buffers_of_layer, sources, strict=True)
            ]
            for buffers_of_layer, sources in zip(buffers, tensors, strict=True)
        ]
    except RuntimeError as error:
        _log.warning("an adapter is copied from memory that is not pinned, which steps wait for: %s", error)
        return tensors


def _make_pinned(buffer: Tensor) -> Tensor:
    """Of ``buffer``'s size, also for a smaller rank: torch keeps pinned blocks by their size."""
    return torch.empty(buffer.shape, dtype=buffer.dtype, pin_memory=True)
