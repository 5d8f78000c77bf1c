"""The proposer on the device: fed with what steps compute, asked for drafts behind them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from quire.core.contracts.spec import DeviceProposer, StepTokens
from quire.core.sample.verify import place_drafts
from quire.core.worker.input_builder import StepInputs
from quire.core.worker.memory import KVCache
from quire.core.worker.request_table import RequestTable

__all__ = ["Drafting"]

_log = logging.getLogger("quire.worker")


class Drafting:
    """Calls a ``DeviceProposer`` and keeps the engine safe from it: drafts are checked on the device, and a proposer
    that raises is switched off."""

    def __init__(
        self, name: str, proposer: DeviceProposer, table: RequestTable, vocab_size: int, kv: KVCache, group: int
    ) -> None:
        self.proposer = proposer
        self.kv = kv
        """The cache of the proposer's layers, under the block ids of ``group``."""
        self._name = name
        self._table = table
        self._vocab_size = vocab_size
        self._group = group
        self._off = False
        self._faults: list[str] = []
        self._hidden: list[Tensor] = []

    def copy_blocks(self, copies: Sequence[tuple[int, int, int]]) -> None:
        """As the target's cache does."""
        self.kv.copy_blocks(copies, follows=self._group)

    def observe(self, inputs: StepInputs) -> None:
        """A step was computed that holds prompt tokens."""
        i, group = inputs, self._group
        step = StepTokens(i.input_ids, i.positions, i.slot_mapping[group], i.rows, i.batches[group], self._hidden)
        self._guarded(lambda: self.proposer.observe(step))

    def propose(self, rows: Tensor, count: int, *, greedy: bool) -> None:
        """Draft for ``rows`` (n,) int64, and write the drafts behind their tokens."""

        def work() -> None:
            drafts = self.proposer.propose(rows, count, greedy=greedy)
            if drafts.tokens.ndim != 2 or drafts.tokens.shape[0] != len(rows) or drafts.tokens.is_floating_point():
                raise ValueError(f"propose returned drafts {tuple(drafts.tokens.shape)} of {drafts.tokens.dtype}")
            tokens = drafts.tokens[:, :count]
            table = self._table
            place_drafts(tokens, drafts.lengths, rows, table.sampling, table.num_drafts, self._vocab_size)

        self._guarded(work)

    def take_faults(self) -> list[str]:
        """Why the proposer was switched off, once."""
        faults, self._faults = self._faults, []
        return faults

    def _guarded(self, work: Callable[[], None]) -> None:
        if self._off:
            return
        try:
            work()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            reason = f"spec_decode/{self._name}: {type(error).__name__}: {error}"
            _log.error("switched off %s", reason, exc_info=error)
            self._off = True
            self._faults.append(reason)
