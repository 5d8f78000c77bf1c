"""The logits processors of a worker, and what becomes of a request whose processor fails."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quire.core.contracts.logits_processor import LogitsBatch, LogitsProcessor
from quire.core.messages import NewRequest
from quire.core.ops.pinned import copy_to_device
from quire.core.plugin.quarantine import Quarantine
from quire.core.plugin.registry import PROJECT
from quire.core.sample.row_faults import (
    MASKED,
    NO_LOGITS,
    fault_of_failed_processor,
    fault_of_processor,
    find_invalid_rows,
)
from quire.core.stats import QuarantinedPlugin

__all__ = ["LogitsProcessors"]


class LogitsProcessors:
    """Calls processors for the requests that want them. After one that fails, the requests for which it had something
    to do end with an error, or, if it says ``on_failure = "skip"``, go on without it, as do all later ones.

    One whose ``apply`` hung is not called again: every request waits for it. Those that it takes end at once.
    """

    def __init__(
        self,
        processors: Sequence[tuple[str, LogitsProcessor]],
        on_quarantine: Callable[[QuarantinedPlugin], None],
    ) -> None:
        self._guarded = [
            _GuardedProcessor(name, processor, index, self._note_quarantine)
            for index, (name, processor) in enumerate(processors)
        ]
        self._on_quarantine = on_quarantine

    def add_row(self, request: NewRequest) -> None:
        """A request enters its row."""
        for each in list(self._guarded):  # a copy: quarantine removes from it
            each.remove_row(request.row)  # of the row's last request, if that left with a step that failed
            if not (each.processor.argmax_invariant and request.params.greedy):
                each.add_row(request)

    def remove_row(self, row: int) -> None:
        """The row's request left."""
        for each in list(self._guarded):
            each.remove_row(row)

    def works_on_any(self, rows: NDArray[np.int32]) -> bool:
        """Whether a processor works on any of these rows."""
        return any(not each.rows.isdisjoint(rows.tolist()) for each in self._guarded if each.rows)

    def apply(
        self, logits: Tensor, make_batch: Callable[[list[int]], LogitsBatch], rows: NDArray[np.int32]
    ) -> Tensor | None:
        """Change ``logits`` (n, vocab) of the table's ``rows`` (n,) in place. Returns faults (n,) int32
        (``row_faults``), ``MASKED`` where a row is valid still; None: no processor had work."""
        host_rows = rows.tolist()
        at_work = [each for each in self._guarded if each.rows and not each.rows.isdisjoint(host_rows)]
        if not at_work:
            return None
        faults = torch.where(find_invalid_rows(logits), NO_LOGITS, MASKED).int()
        for each in at_work:
            # A processor may raise half-way; the step then goes on with the logits that it was given.
            before = logits.clone()
            if each.apply(logits, make_batch(host_rows.copy())):
                if others := [i for i, row in enumerate(host_rows) if row not in each.rows and each.is_watched]:
                    kept = copy_to_device(others, torch.int64, logits.device)
                    logits.index_copy_(0, kept, before[kept])
                is_invalid = find_invalid_rows(logits)
                failed_rows = each.failed_rows
            else:
                logits.copy_(before)
                is_invalid = torch.zeros_like(faults, dtype=torch.bool)
                failed_rows = set() if each.may_be_skipped else each.rows
            faults = torch.where(is_invalid & (faults == MASKED), each.fault, faults)
            if failed_rows and not failed_rows.isdisjoint(host_rows):
                indices = [i for i, row in enumerate(host_rows) if row in failed_rows]
                faults.index_fill_(0, copy_to_device(indices, torch.int64, logits.device), each.failed_fault)
        return faults

    def _note_quarantine(self, guarded: _GuardedProcessor, plugin: QuarantinedPlugin) -> None:
        if guarded.may_be_skipped:
            self._guarded.remove(guarded)
        self._on_quarantine(plugin)


class _GuardedProcessor:
    """A logits processor, and the rows for which it has something to do."""

    def __init__(
        self,
        name: str,
        processor: LogitsProcessor,
        index: int,
        on_quarantine: Callable[[_GuardedProcessor, QuarantinedPlugin], None],
    ) -> None:
        self.processor = processor
        self.rows: set[int] = set()
        self.failed_rows: set[int] = set()
        """Those of ``rows`` that ``add_row`` did not take, or ``apply`` cannot: their requests are not served."""
        self.fault, self.failed_fault = fault_of_processor(index), fault_of_failed_processor(index)
        self.is_watched = not type(processor).__module__.startswith(f"{PROJECT}.")
        """Whether the rows of requests for which it has nothing to do are kept from it."""
        self._name = name
        self._on_quarantine = on_quarantine
        self._quarantine = self._start_quarantine()
        self._is_applied, self._has_hung = False, False

    @property
    def may_be_skipped(self) -> bool:
        """Whether requests go on without it, once it has failed."""
        return self.processor.on_failure == "skip"

    def add_row(self, request: NewRequest) -> None:
        """A request enters its row."""
        has_work = self._call(_add_row_checked, self.processor, request)
        if has_work or has_work is None:
            self.rows.add(request.row)
            if has_work is None or self._has_hung:
                self.failed_rows.add(request.row)

    def remove_row(self, row: int) -> None:
        """The row's request left."""
        if row in self.rows:
            self.rows.discard(row)
            if row in self.failed_rows:
                self.failed_rows.discard(row)
            else:
                self._call(_remove_row_checked, self.processor, row)

    def apply(self, logits: Tensor, batch: LogitsBatch) -> bool:
        """Whether it did not fail, or was not called, all requests of the batch having failed before."""
        if self.rows == self.failed_rows:
            return True
        self._is_applied = True
        try:
            is_applied = self._call(_apply_checked, self.processor, logits, batch) is not None
        finally:
            self._is_applied = False
        if self._has_hung:
            self.failed_rows |= self.rows
        return is_applied

    def _call(self, function: Callable[..., bool], *args: object) -> bool | None:
        """None if it fails."""
        result = self._quarantine.call(function, *args)
        if self._quarantine.is_active:
            return result
        if not self.may_be_skipped:
            self._quarantine = self._start_quarantine()  # its requests end; it is called for others
        return None

    def _start_quarantine(self) -> Quarantine:
        return Quarantine(
            "logits_processor",
            self._name,
            self._note_fault,
            outcome="is quarantined" if self.may_be_skipped else "fails its requests",
            not_faults=(torch.OutOfMemoryError,),  # the step is tried again in smaller ones
        )

    def _note_fault(self, plugin: QuarantinedPlugin) -> None:
        """Where its requests end, these tell, and the step's failures count."""
        hangs = self._is_applied and plugin.reason == "hung"
        self._has_hung |= hangs
        if self.may_be_skipped or hangs:
            self._on_quarantine(self, plugin)


def _add_row_checked(processor: LogitsProcessor, request: NewRequest) -> bool:
    has_work: object = processor.add_row(request)
    if not isinstance(has_work, bool | np.bool_):
        raise TypeError(f"add_row returned {has_work!r:.80}, neither True nor False")
    return bool(has_work)


def _apply_checked(processor: LogitsProcessor, logits: Tensor, batch: LogitsBatch) -> bool:
    shown = logits.detach()  # another tensor in the same memory: of what is done to itself nothing is left
    result: object = processor.apply(shown, batch)
    if result is not None and result is not shown:
        raise TypeError(f"apply returned a {type(result).__name__}, where it changes logits in place")
    if shown.shape != logits.shape or shown.data_ptr() != logits.data_ptr():
        raise TypeError("apply gave logits another shape or memory, where it changes them in place")
    return True


def _remove_row_checked(processor: LogitsProcessor, row: int) -> bool:
    processor.remove_row(row)
    return True
