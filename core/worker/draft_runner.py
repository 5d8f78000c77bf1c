"""Runs the proposer on the device: shows it what steps compute, and asks it for drafts after them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quire.core.contracts.attention import AttentionBatch
from quire.core.contracts.spec_decode import DeviceProposer, StepTokens
from quire.core.messages import BlockCopy, SchedulerOutput
from quire.core.ops.pinned import copy_to_device
from quire.core.plugin.quarantine import Quarantine
from quire.core.sample.verify import place_drafts
from quire.core.stats import QuarantinedPlugin
from quire.core.worker.cuda_graphs.capture import GraphCapturer
from quire.core.worker.cuda_graphs.capture_sizes import choose_verify_capture_sizes, choose_verify_query_lens
from quire.core.worker.input_builder import StepInputs
from quire.core.worker.kv_cache import KVCache
from quire.core.worker.request_table import RequestTable

__all__ = ["DraftPrefillTracker", "DraftRunner"]

_BACKFILL_TOKENS_PER_STEP = 2048
"""Tokens that a proposer makes up for in a step: 8 ms of a model of a billion weights on an H200."""


class DraftRunner:
    """Calls a ``DeviceProposer`` and keeps the engine safe from it: drafts are checked on the device, and a proposer
    that raises is quarantined."""

    def __init__(
        self,
        name: str,
        proposer: DeviceProposer,
        table: RequestTable,
        vocab_size: int,
        kv_cache: KVCache,
        target_group: int,
    ) -> None:
        self.proposer = proposer
        self.kv_cache = kv_cache
        """The cache of the proposer's layers, under the block ids of the target's ``target_group``."""
        self._table = table
        self._vocab_size = vocab_size
        self._target_group = target_group
        self._prefill_tracker = DraftPrefillTracker(table.num_rows) if proposer.supports_backfill else None
        self._quarantined: list[QuarantinedPlugin] = []
        self._quarantine = Quarantine(
            "spec_decode",
            name,
            self._quarantined.append,
            not_faults=(torch.OutOfMemoryError,),  # the step is retried with fewer tokens
        )
        self._capture_sizes = choose_verify_capture_sizes(table.num_rows)
        max_reqs = self._capture_sizes[-1] if self._capture_sizes else 1
        # (max_reqs,) rows of the table: what graphs read. Each takes the front of it, with padding rows at its end.
        self._graph_rows = torch.full((max_reqs,), table.padding_row, dtype=torch.int64, device=table.device)
        self._uploaded_rows: NDArray[np.int64] | None = None  # what the front of it holds
        self._graphs: dict[_ProposalShape, torch.cuda.CUDAGraph] = {}

    def copy_blocks(self, copies: Sequence[BlockCopy]) -> None:
        """As the target's cache does."""
        self.kv_cache.copy_blocks(copies, target_group=self._target_group)

    def process_target_step(self, step: SchedulerOutput, inputs: StepInputs | None) -> None:
        """The target computed a step. Shows it to the proposer now, or notes that this was left out; ``inputs`` None:
        every request decoded, and the graphs have shown it the step if it observes every one."""
        num_verifying = 0 if step.num_draft_tokens is None else int(np.count_nonzero(step.num_draft_tokens))
        has_prompts = step.num_decodes + num_verifying < len(step.rows)
        if self._prefill_tracker is not None:
            self._prefill_tracker.add_requests(step)
            # Decodes are read by the proposer when it drafts after them, prompts only when they are shown to it.
            if not (step.run_draft_prefill if has_prompts else step.num_tokens_to_propose):
                self._prefill_tracker.note_skipped_step(step)
                return
        if inputs is not None and (has_prompts or self.proposer.observes_every_step):
            self.run_draft_prefill(inputs)

    def run_draft_prefill(self, inputs: StepInputs) -> None:
        """Show the proposer a step that holds prompt tokens, or any if it wants them all."""
        self._quarantine.call(self.launch_draft_prefill, inputs)

    def launch_draft_prefill(self, inputs: StepInputs) -> None:
        """``run_draft_prefill`` without its guard, to be captured."""
        group = self._target_group
        self.proposer.observe_step(
            StepTokens(
                inputs.input_ids, inputs.positions, inputs.slot_mapping[group], inputs.rows, inputs.batches[group]
            )
        )

    def propose_drafts(self, step: SchedulerOutput, *, greedy: bool) -> bool:
        """Draft for the requests that sampled, and write the drafts behind their tokens in the table. Whether the
        proposer also made up for tokens that it was not shown."""
        rows, num_tokens = step.rows[step.sampling_mask], step.num_tokens_to_propose
        device, tracker = self._table.device, self._prefill_tracker
        ran_backfill = False
        if tracker is not None and step.run_draft_prefill:
            spans = tracker.take_backfill_spans(step)
            if ran_backfill := spans.size > 0:
                self._quarantine.call(self.proposer.backfill, copy_to_device(spans, torch.int64, device), spans)
        size = next((size for size in self._capture_sizes if size >= len(rows)), len(rows))
        graph = self._graphs.get((size, num_tokens, greedy))  # type: ignore[call-overload]  # equal to the named tuple
        padded_rows = np.full(size if graph else len(rows), self._table.padding_row, np.int64)
        padded_rows[: len(rows)] = rows
        if graph is not None and self._quarantine.is_active:
            # As in ``DecodeGraphs.run_model``: most steps have the requests of the step before.
            if self._uploaded_rows is None or not np.array_equal(padded_rows, self._uploaded_rows):
                self._graph_rows[:size] = copy_to_device(padded_rows, torch.int64, device)
                self._uploaded_rows = padded_rows
            graph.replay()
        else:
            device_rows = copy_to_device(padded_rows, torch.int64, device)
            self._quarantine.call(self._launch_proposal, device_rows, num_tokens, greedy)
        # Drafts of a request whose tokens the proposer has not all read would be wrong: they are withdrawn.
        if tracker is not None and len(behind := tracker.find_rows_behind(rows)):
            self._table.num_drafts.index_fill_(0, copy_to_device(behind, torch.int64, device), 0)
        return ran_backfill

    def warm_up(self) -> None:
        """Launch what proposals of one token launch, for padding rows, at every size."""
        for size in self._capture_sizes:
            rows = self._graph_rows[:size]
            self._launch_proposal(rows, 1, False)
            self._launch_proposal(rows, 1, True)
            if self.proposer.attention_specs():
                self.proposer.observe_step(self._make_padding_step(size))

    def launch_longest_drafts(self) -> None:
        """Launch drafts of full length at every size, for padding rows: where nothing is captured, the kernels of their
        later passes are compiled here. A proposer that raises is quarantined."""
        for size in self._capture_sizes:
            for greedy in (False, True):
                rows = self._graph_rows[:size]
                self._quarantine.call(self._launch_proposal, rows, self.proposer.num_tokens, greedy)

    def capture_graphs(self, capturer: GraphCapturer) -> None:
        """Capture proposals of every size and number of tokens, the largest first."""
        if not self.proposer.capturable:
            return
        for size in reversed(self._capture_sizes):
            for query_len in choose_verify_query_lens(self.proposer.num_tokens):
                num_tokens = query_len - 1
                for greedy in (True, False):
                    launch = partial(self._launch_proposal, self._graph_rows[:size], num_tokens, greedy)
                    launch()  # loads what it launches: that cannot happen in a capture
                    shape = _ProposalShape(size, num_tokens, greedy)
                    self._graphs[shape] = capturer.capture_graph(launch).graph

    def take_quarantined(self) -> list[QuarantinedPlugin]:
        """The proposer, once, if it was quarantined."""
        quarantined = self._quarantined.copy()
        self._quarantined.clear()
        return quarantined

    def _launch_proposal(self, rows: Tensor, num_tokens: int, greedy: bool) -> None:
        drafts = self.proposer.propose(rows, num_tokens, greedy=greedy)
        if drafts.token_ids.ndim != 2 or drafts.token_ids.shape[0] != len(rows) or drafts.token_ids.is_floating_point():
            raise ValueError(f"propose returned drafts {tuple(drafts.token_ids.shape)} of {drafts.token_ids.dtype}")
        tokens, table = drafts.token_ids[:, :num_tokens], self._table
        place_drafts(tokens, drafts.lengths, rows, table.sampling, table.num_drafts, self._vocab_size)

    def _make_padding_step(self, size: int) -> StepTokens:
        """A step of ``size`` padding requests with a token each."""
        rows = self._graph_rows[:size]
        zeros = torch.zeros(size, dtype=torch.int64, device=self._table.device)
        batch = AttentionBatch(
            query_start_loc=torch.arange(size + 1, dtype=torch.int32, device=zeros.device),
            seq_lens=zeros.int() + 1,
            block_table=self._table.block_tables[self._target_group][rows],
            num_reqs=size,
            num_tokens=size,
            max_query_len=1,
            max_seq_len=1,
            num_decodes=size,
        )
        return StepTokens(input_ids=zeros.int(), positions=zeros, slot_mapping=zeros, rows=rows, batch=batch)


class DraftPrefillTracker:
    """How much a proposer has read of each request that it must read whole, by row of the request table; on the host.

    While drafting does not pay, prompts are not shown to the proposer. What was left out is made up for in parts once
    it pays again (backfill); until then drafts of the request are withdrawn, since they would be wrong.
    """

    def __init__(self, num_rows: int) -> None:
        self._first_skipped: NDArray[np.int64] = np.full(num_rows + 1, -1)  # first token that was left out; -1: none

    def add_requests(self, step: SchedulerOutput) -> None:
        """New requests enter their rows: nothing of them was left out yet."""
        self._first_skipped[[request.row for request in step.new_requests]] = -1

    def note_skipped_step(self, step: SchedulerOutput) -> None:
        """The proposer was not shown the step."""
        num_drafts = 0 if step.num_draft_tokens is None else step.num_draft_tokens
        first_token = step.max_seq_lens - step.num_scheduled_tokens - num_drafts
        first_skipped = self._first_skipped[step.rows]
        self._first_skipped[step.rows] = np.where(first_skipped < 0, first_token, first_skipped)

    def take_backfill_spans(self, step: SchedulerOutput) -> NDArray[np.int64]:
        """What to read now of the requests that sampled: spans (3, n) of row, first token and last token + 1. They
        count as read afterwards."""
        rows, seq_lens = step.rows[step.sampling_mask], step.max_seq_lens[step.sampling_mask]
        is_behind = self._first_skipped[rows] >= 0
        rows, num_missing = rows[is_behind], (seq_lens - self._first_skipped[rows])[is_behind]
        # The first requests are read whole, as far as the budget goes, and the one where it ends in part.
        num_before = num_missing.cumsum() - num_missing
        num_read = np.clip(_BACKFILL_TOKENS_PER_STEP - num_before, 0, num_missing)
        first = self._first_skipped[rows]
        self._first_skipped[rows] = np.where(num_read < num_missing, first + num_read, -1)
        return np.stack((rows, first, first + num_read))[:, num_read > 0]

    def find_rows_behind(self, rows: NDArray[np.int32]) -> NDArray[np.int32]:
        """Those of ``rows`` of which tokens are still left out."""
        return rows[self._first_skipped[rows] >= 0]


class _ProposalShape(NamedTuple):
    num_rows: int
    num_tokens: int
    greedy: bool
