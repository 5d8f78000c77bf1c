"""What a proposer was not shown is made up for in parts, and known until then."""

from __future__ import annotations

import numpy as np
import pytest

from quire import SamplingParams
from quire.core.messages import NewRequest, SchedulerOutput
from quire.core.worker import draft_runner
from quire.core.worker.draft_runner import DraftPrefillTracker


def make_step(rows, num_tokens, seq_lens, samples=None, new=()) -> SchedulerOutput:
    return SchedulerOutput(
        step=0,
        rows=np.array(rows, np.int32),
        num_scheduled_tokens=np.array(num_tokens, np.int32),
        sampling_mask=np.array(samples or [True] * len(rows)),
        num_decodes=0,
        total_num_scheduled_tokens=sum(num_tokens),
        max_seq_len=max(seq_lens),
        max_seq_lens=np.array(seq_lens, np.int32),
        new_requests=[NewRequest(row, row, [], 0, 0, SamplingParams(), 0) for row in new],
    )


def test_a_skipped_prompt_is_read_within_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(draft_runner, "_BACKFILL_TOKENS_PER_STEP", 10)
    tracker = DraftPrefillTracker(4)
    tracker.note_skipped_step(make_step([0, 2], [6, 8], [6, 8]))
    tracker.note_skipped_step(make_step([0, 2], [1, 1], [7, 9]))  # the first token that was left out stays the first
    rows = np.array([0, 1, 2], np.int32)
    assert tracker.find_rows_behind(rows).tolist() == [0, 2]
    assert tracker.take_backfill_spans(make_step([0, 1, 2], [1, 1, 1], [8, 5, 10])).tolist() == [[0, 2], [0, 0], [8, 2]]
    assert tracker.find_rows_behind(rows).tolist() == [2]
    assert tracker.take_backfill_spans(make_step([0, 1, 2], [1, 1, 1], [9, 6, 11])).tolist() == [[2], [2], [11]]
    assert tracker.find_rows_behind(rows).tolist() == []
    assert tracker.take_backfill_spans(make_step([0, 2], [1, 1], [10, 12])).size == 0


def test_requests_that_do_not_sample_wait() -> None:
    tracker = DraftPrefillTracker(4)
    tracker.note_skipped_step(make_step([1], [5], [5]))
    assert tracker.take_backfill_spans(make_step([1], [5], [10], samples=[False])).size == 0
    assert tracker.find_rows_behind(np.array([1], np.int32)).tolist() == [1]


def test_a_new_request_owes_nothing_of_the_row_s_last_one() -> None:
    tracker = DraftPrefillTracker(4)
    tracker.note_skipped_step(make_step([3], [5], [5]))
    tracker.add_requests(make_step([3], [2], [2], new=[3]))
    assert tracker.find_rows_behind(np.array([3], np.int32)).tolist() == []
