"""A worker without a model that knows how long each answer is: it samples a stop token at its end."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from quire.core.messages import ModelRunnerOutput, SchedulerOutput
from quire.server.simulate.drafts import SimulatedDrafts
from quire.server.simulate.sequences import FILLER, STOP

__all__ = ["LengthWorker", "RequestTokens"]

NEVER = np.iinfo(np.int64).max
_TOKENS = np.array([FILLER, STOP], np.int32)
"""By whether a request ends with it."""


class RequestTokens:
    """What a request will have generated."""

    __slots__ = ("end_len", "sequence", "stops")

    def __init__(self, end_len: int, stops: bool, sequence: NDArray[np.int32] | None) -> None:
        self.end_len = end_len
        """Tokens, the prompt's included, with which it ends."""
        self.stops = stops
        """Whether it ends by a stop token; else by its limit."""
        self.sequence = sequence
        """Its tokens, where others may share them."""


class LengthWorker:
    """Samples the tokens of steps, in the order in which they are scheduled."""

    def __init__(
        self, max_num_seqs: int, requests: Mapping[int, RequestTokens], drafts: SimulatedDrafts | None = None
    ) -> None:
        self._requests = requests
        self._drafts = drafts
        self._numbers = np.zeros(max_num_seqs, np.int64)  # by row
        self._lengths = np.zeros(max_num_seqs, np.int64)  # by row: tokens, those in flight included
        self._end_lens = np.full(max_num_seqs, NEVER)
        self._stop_lens = np.full(max_num_seqs, NEVER)
        self._sequences: dict[int, NDArray[np.int32]] = {}  # by row

    def execute_step(self, step: SchedulerOutput) -> ModelRunnerOutput:
        """The step's tokens."""
        for new in step.new_requests:
            known, row = self._requests[new.request_id], new.row
            self._numbers[row] = new.request_id
            self._lengths[row] = len(new.token_ids)
            self._end_lens[row] = known.end_len
            self._stop_lens[row] = known.end_len if known.stops else NEVER
            if known.sequence is not None:
                self._sequences[row] = known.sequence
            else:
                self._sequences.pop(row, None)
        if self._drafts is not None and step.num_draft_tokens is not None:
            return self._verify_drafts(self._drafts, step, step.num_draft_tokens)
        self._lengths[step.rows] += step.sampling_mask
        return self.sample_tokens(step)

    def sample_tokens(self, step: SchedulerOutput) -> ModelRunnerOutput:
        """The tokens of the last step that was executed."""
        rows, mask = step.rows, step.sampling_mask
        lengths = self._lengths[rows]
        tokens = _TOKENS.take(lengths == self._stop_lens[rows])
        if self.has_sequences:
            self._take_sequence_tokens(rows, lengths, tokens)
        return ModelRunnerOutput(step.step, tokens[:, None], mask.astype(np.int32))

    @property
    def has_sequences(self) -> bool:
        """Whether the tokens of any request matter beyond their number."""
        return bool(self._sequences)

    def count_steps_before_end(self, rows: NDArray[np.int64]) -> int:
        """Steps of decodes until one samples the last token of a request among ``rows``: those before it."""
        return int((self._end_lens[rows] - self._lengths[rows]).min()) - 1

    def skip_steps(self, rows: NDArray[np.int64], num_steps: int) -> list[list[int]]:
        """Sample ``num_steps`` tokens more for each row. Returns the tokens that the host learns meanwhile: the one in
        flight, and all but the last."""
        skipped = []
        for row, length in zip(rows.tolist(), self._lengths[rows].tolist(), strict=True):
            sequence = self._sequences.get(row)
            if sequence is None:
                skipped.append([FILLER] * num_steps)
            else:
                skipped.append(sequence[length - 1 : length - 1 + num_steps].tolist())
        self._lengths[rows] += num_steps
        return skipped

    def _verify_drafts(
        self, drafts: SimulatedDrafts, step: SchedulerOutput, num_drafts: NDArray[np.int32]
    ) -> ModelRunnerOutput:
        rows = step.rows
        before = self._lengths[rows]
        counts = (drafts.count_accepted(self._numbers[rows], before, num_drafts) + 1) * step.sampling_mask
        self._lengths[rows] += counts
        columns = []
        for column in range(1, int(counts.max(initial=1)) + 1):
            tokens = np.where(before + column == self._stop_lens[rows], STOP, FILLER).astype(np.int32)
            if self.has_sequences:
                self._take_sequence_tokens(rows, before + column, tokens)
            columns.append(tokens)
        return ModelRunnerOutput(step.step, np.stack(columns, axis=1), counts.astype(np.int32), num_drafts)

    def _take_sequence_tokens(
        self, rows: NDArray[np.int32], lengths: NDArray[np.int64], tokens: NDArray[np.int32]
    ) -> None:
        for i, (row, length) in enumerate(zip(rows.tolist(), lengths.tolist(), strict=True)):
            sequence = self._sequences.get(row)
            if sequence is not None and tokens[i] != STOP and length <= len(sequence):
                tokens[i] = sequence[length - 1]
