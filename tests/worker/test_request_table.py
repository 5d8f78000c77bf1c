"""The request table holds what the differences of every step add up to."""

from __future__ import annotations

import pytest
import torch

from quire import SamplingParams
from quire.core.messages import BlockDiff, HostDraft, NewRequest
from quire.core.worker.request_table import RequestTable

CPU = torch.device("cpu")
PARAMS = SamplingParams(
    temperature=0.5, top_k=7, top_p=0.9, min_p=0.1, repetition_penalty=1.1, frequency_penalty=0.2, presence_penalty=0.3
)


@pytest.fixture
def table() -> RequestTable:
    return RequestTable(num_rows=4, max_model_len=32, block_size=4, num_groups=2, device=CPU, lookahead=3)


def new_request(row: int, token_ids: list[int], num_computed_tokens: int = 0, **fields) -> NewRequest:
    return NewRequest(row, row, token_ids, len(token_ids), num_computed_tokens, fields.pop("params", PARAMS), 9)


def test_a_request_fills_its_row_and_no_other(table: RequestTable) -> None:
    table.add_requests([new_request(2, [5, 6, 7], num_computed_tokens=1), new_request(0, [8])])
    assert table.token_ids[2, :3].tolist() == [5, 6, 7] and table.token_ids[0, :1].tolist() == [8]
    assert table.num_tokens.tolist() == [1, 0, 3, 0, 0]
    assert table.num_computed_tokens.tolist() == [0, 0, 1, 0, 0]
    assert table.prompt_len.tolist() == [1, 0, 3, 0, 0]
    assert table.seed.tolist() == [9, 0, 9, 0, 0]
    for name in ("temperature", "top_k", "top_p", "min_p"):
        expected = torch.tensor(getattr(PARAMS, name)).to(getattr(table.sampling, name).dtype)
        assert getattr(table.sampling, name)[2] == expected, name
        assert getattr(table.sampling, name)[1] == 0, name
    for name in ("repetition_penalty", "frequency_penalty", "presence_penalty"):
        assert getattr(table, name)[2] == torch.tensor(getattr(PARAMS, name)), name


def test_nothing_of_the_row_s_last_request_stays(table: RequestTable) -> None:
    table.add_requests([new_request(1, [1, 2, 3, 4])])
    table.update_block_tables([BlockDiff(0, 1, 0, [11, 12]), BlockDiff(1, 1, 0, [21, 22])])
    table.num_drafts[1] = 3
    table.add_requests([new_request(1, [9], params=SamplingParams(temperature=0))])
    assert table.num_tokens[1] == 1 and table.num_drafts[1] == 0 and table.temperature[1] == 0
    assert not any(blocks[1].any() for blocks in table.block_tables), "what is not assigned is the padding block"


def test_block_tables_change_where_a_diff_says(table: RequestTable) -> None:
    table.update_block_tables(
        [BlockDiff(0, 0, 0, [3, 4, 5]), BlockDiff(1, 0, 1, [8]), BlockDiff(0, 2, 2, [6, 7]), BlockDiff(1, 3, 0, [9])]
    )
    table.update_block_tables([BlockDiff(0, 0, 1, [0])])  # a block that left the window
    first, second = (blocks.tolist() for blocks in table.block_tables)
    width = len(first[0])
    assert first == [[3, 0, 5] + [0] * (width - 3), [0] * width, [0, 0, 6, 7] + [0] * (width - 4), *[[0] * width] * 2]
    assert second == [[0, 8] + [0] * (width - 2), [0] * width, [0] * width, [9] + [0] * (width - 1), [0] * width]


def test_there_is_room_for_drafts_behind_the_longest_request(table: RequestTable) -> None:
    """32 tokens and 3 of lookahead: 9 blocks of 4, and a token more."""
    assert [tuple(blocks.shape) for blocks in table.block_tables] == [(5, 9), (5, 9)]
    assert table.token_ids.shape[1] == 36
    assert table.padding_row == 4


def test_sampled_tokens_are_appended(table: RequestTable) -> None:
    table.add_requests([new_request(0, [1, 2]), new_request(3, [4, 5, 6])])
    table.append_tokens(torch.tensor([3, 0]), torch.tensor([70, 80], dtype=torch.int32))
    assert table.token_ids[3, :4].tolist() == [4, 5, 6, 70] and table.token_ids[0, :3].tolist() == [1, 2, 80]
    assert table.num_tokens.tolist() == [3, 0, 0, 4, 0]


@pytest.mark.parametrize(
    ("base_len", "token_ids", "drafts"),
    [
        (3, [40, 41], [40, 41]),  # nothing was sampled since
        (2, [7, 40, 41], [40, 41]),  # the first was sampled since
        (1, [6, 7], []),  # all were
        (2, [8, 40], []),  # another was
        (3, [40, 10_000, 41], [40]),  # what is no token of the vocabulary ends a draft
    ],
)
def test_host_drafts_are_kept_as_far_as_they_agree(
    table: RequestTable, base_len: int, token_ids: list[int], drafts: list[int]
) -> None:
    table.add_requests([new_request(1, [5, 6, 7]), new_request(2, [5, 6])])
    table.place_host_drafts([HostDraft(1, base_len, token_ids), HostDraft(2, 2, [50])], vocab_size=100)
    assert table.num_drafts[1] == len(drafts) and table.token_ids[1, 3 : 3 + len(drafts)].tolist() == drafts
    assert table.num_drafts[2] == 1 and table.token_ids[2, 2] == 50
    assert table.num_tokens.tolist()[1:3] == [3, 2], "drafts are no tokens yet"


def test_drafts_for_a_row_whose_request_never_came(table: RequestTable) -> None:
    """The step that brought it failed, when the step that verifies its drafts was on its way."""
    table.add_requests([new_request(1, [5, 6, 7]), new_request(2, [5, 6])])
    table.place_host_drafts([HostDraft(1, 16, [50, 51]), HostDraft(2, 2, [50])], vocab_size=100)
    assert table.num_drafts.tolist()[1:3] == [0, 1] and table.token_ids[2, 2] == 50
