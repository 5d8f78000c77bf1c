"""The proposer on the device: fed with what steps compute, asked for drafts behind them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quire.core.contracts.attention import AttentionBatch
from quire.core.contracts.spec_decode import DeviceProposer, StepTokens
from quire.core.messages import SchedulerOutput
from quire.core.ops.pinned import copy_to_device
from quire.core.sample.verify import place_drafts
from quire.core.worker.cuda_graphs.capture import GraphCapturer
from quire.core.worker.cuda_graphs.decode import choose_verify_capture_sizes, choose_verify_query_lens
from quire.core.worker.draft_prefill import DraftPrefillTracker
from quire.core.worker.input_builder import StepInputs
from quire.core.worker.kv_cache import KVCache
from quire.core.worker.request_table import RequestTable

__all__ = ["DraftRunner"]

_log = logging.getLogger("quire.worker")


class DraftRunner:
    """Calls a ``DeviceProposer`` and keeps the engine safe from it: drafts are checked on the device, and a proposer
    that raises is switched off."""

    def __init__(
        self, name: str, proposer: DeviceProposer, table: RequestTable, vocab_size: int, kv: KVCache, group: int
    ) -> None:
        self.proposer = proposer
        self.kv_cache = kv
        """The cache of the proposer's layers, under the block ids of ``group``."""
        self._name = name
        self._table = table
        self._vocab_size = vocab_size
        self._group = group
        self._disabled = False
        self._prefill_tracker = DraftPrefillTracker(table.num_rows) if proposer.supports_backfill else None
        self._quarantined: list[str] = []
        self._capture_sizes = choose_verify_capture_sizes(table.num_rows)
        most = self._capture_sizes[-1] if self._capture_sizes else 1
        self._graph_rows = torch.full((most,), table.padding_row, dtype=torch.int64, device=table.device)
        self._uploaded_rows: NDArray[np.int64] | None = None  # what of these is on the device
        self._graphs: dict[tuple[int, int, bool], torch.cuda.CUDAGraph] = {}

    def copy_blocks(self, copies: Sequence[tuple[int, int, int]]) -> None:
        """As the target's cache does."""
        self.kv_cache.copy_blocks(copies, target_group=self._group)

    def process_target_step(self, step: SchedulerOutput, inputs: StepInputs | None) -> None:
        """A step was computed; ``inputs`` where it may hold prompts."""
        drafts = 0 if step.num_draft_tokens is None else int(np.count_nonzero(step.num_draft_tokens))
        prompts = step.num_decodes + drafts < len(step.rows)
        if self._prefill_tracker is not None:
            self._prefill_tracker.add_requests(step)
            if not (step.run_draft_prefill if prompts else step.num_tokens_to_propose):
                self._prefill_tracker.note_skipped_step(step)
                return
        if inputs is not None and (prompts or self.proposer.observes_every_step):
            self.run_draft_prefill(inputs)

    def run_draft_prefill(self, inputs: StepInputs) -> None:
        """A step was computed that holds prompt tokens, or any if the proposer wants them all."""
        self._call_guarded(lambda: self.launch_draft_prefill(inputs))

    def launch_draft_prefill(self, inputs: StepInputs) -> None:
        """``run_draft_prefill`` without its guard, to be captured."""
        i, group = inputs, self._group
        self.proposer.observe_step(
            StepTokens(i.input_ids, i.positions, i.slot_mapping[group], i.rows, i.batches[group])
        )

    def propose_drafts(self, step: SchedulerOutput, *, greedy: bool) -> bool:
        """Draft for the rows of the table that drew, and write the drafts behind their tokens. Whether the proposer
        also made up for what it had passed over."""
        rows, count = step.rows[step.sampling_mask], step.num_tokens_to_propose
        late = (
            self._prefill_tracker is not None
            and step.run_draft_prefill
            and (spans := self._prefill_tracker.take_backfill_spans(step)).size > 0
        )
        if late:
            self._call_guarded(
                lambda: self.proposer.backfill(copy_to_device(spans, torch.int64, self._table.device), spans)
            )
        size = next((size for size in self._capture_sizes if size >= len(rows)), len(rows))
        graph = self._graphs.get((size, count, greedy))
        padded = np.full(size if graph else len(rows), self._table.padding_row, np.int64)
        padded[: len(rows)] = rows
        if graph is not None and not self._disabled:
            if self._uploaded_rows is None or not np.array_equal(padded, self._uploaded_rows):
                self._graph_rows[:size] = copy_to_device(padded, torch.int64, self._table.device)
                self._uploaded_rows = padded
            graph.replay()
        else:
            who = copy_to_device(padded, torch.int64, self._table.device)
            self._call_guarded(lambda: self._launch_proposal(who, count, greedy))
        if self._prefill_tracker is not None and len(lacking := self._prefill_tracker.find_rows_behind(rows)):
            self._table.num_drafts.index_fill_(0, copy_to_device(lacking, torch.int64, self._table.device), 0)
        return late

    def warm_up(self) -> None:
        """Launch what passes of every size launch; tokens that were not drawn are not read."""
        for size in self._capture_sizes:
            rows = self._graph_rows[:size]
            self._launch_proposal(rows, 1, False)
            self._launch_proposal(rows, 1, True)
            if self.proposer.attention_specs():
                self.proposer.observe_step(self._make_padding_step(size))

    def capture_graphs(self, recorder: GraphCapturer) -> None:
        """Record proposals of every size and count."""
        if not self.proposer.capturable:
            return
        for size in reversed(self._capture_sizes):
            for count in choose_verify_query_lens(self.proposer.num_tokens):
                for greedy in (True, False):
                    work = partial(self._launch_proposal, self._graph_rows[:size], count - 1, greedy)
                    work()  # compiles and warms up
                    self._graphs[size, count - 1, greedy] = recorder.capture_graph(work)[0]

    def _launch_proposal(self, rows: Tensor, count: int, greedy: bool) -> None:
        drafts = self.proposer.propose(rows, count, greedy=greedy)
        if drafts.token_ids.ndim != 2 or drafts.token_ids.shape[0] != len(rows) or drafts.token_ids.is_floating_point():
            raise ValueError(f"propose returned drafts {tuple(drafts.token_ids.shape)} of {drafts.token_ids.dtype}")
        tokens, table = drafts.token_ids[:, :count], self._table
        place_drafts(tokens, drafts.lengths, rows, table.sampling, table.num_drafts, self._vocab_size)

    def _make_padding_step(self, size: int) -> StepTokens:
        """A step of ``size`` padding requests with a token each."""
        none = torch.zeros(size, dtype=torch.int64, device=self._table.device)
        one, start = none.int() + 1, torch.arange(size + 1, dtype=torch.int32, device=none.device)
        blocks = self._table.block_tables[self._group][self._graph_rows[:size]]
        batch = AttentionBatch(start, one, blocks, size, size, 1, 1, size)
        return StepTokens(none.int(), none, none, self._graph_rows[:size], batch)

    def take_quarantined(self) -> list[str]:
        """Why the proposer was switched off, once."""
        faults, self._quarantined = self._quarantined, []
        return faults

    def _call_guarded(self, work: Callable[[], None]) -> None:
        if self._disabled:
            return
        try:
            work()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            reason = f"spec_decode/{self._name}: {type(error).__name__}: {error}"
            _log.error("switched off %s", reason, exc_info=error)
            self._disabled = True
            self._quarantined.append(reason)
