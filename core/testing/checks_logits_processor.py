"""What every logits processor must keep: state per row, changes in place, no change to another request's logits."""

from __future__ import annotations

import unittest

import torch
from torch import Tensor

from quire.core.contracts.logits_processor import LogitsBatch, LogitsProcessor
from quire.core.messages import NewRequest
from quire.core.plugin.options import parse_options
from quire.core.sampling_params import SamplingParams

__all__ = [
    "check_a_row_does_not_depend_on_its_neighbours",
    "check_a_token_can_still_be_sampled",
    "check_add_row_says_whether_there_is_work",
    "check_apply_changes_in_place",
    "check_argmax_invariant_keeps_the_argmax",
    "check_only_its_own_rows_change",
    "check_plain_parameters_are_valid",
    "check_rejected_drafts_leave_no_trace",
    "check_remove_row_forgets",
    "check_the_example_request_is_worked_on",
]

_VOCAB = 32


def check_plain_parameters_are_valid(cls: type[LogitsProcessor]) -> None:
    """``validate_params`` has nothing against a request that asks for nothing."""
    cls.validate_params(SamplingParams(), _VOCAB)


def check_add_row_says_whether_there_is_work(cls: type[LogitsProcessor]) -> None:
    """``add_row`` returns a bool, also for a request that asks for nothing."""
    answer = _make(cls).add_row(_request(0, SamplingParams()))
    assert isinstance(answer, bool), f"add_row returned {answer!r}, not True or False"


def check_apply_changes_in_place(cls: type[LogitsProcessor]) -> None:
    """``apply`` returns None, keeps shape and dtype, and makes no NaN."""
    processor = _make_with_request(cls)
    logits = _logits(2)
    result: object = processor.apply(logits, _batch([0, 1]))
    assert result is None, "apply returned something; it must change logits in place"
    assert logits.shape == (2, _VOCAB) and logits.dtype == torch.float32, f"left {tuple(logits.shape)} {logits.dtype}"


def check_a_token_can_still_be_sampled(cls: type[LogitsProcessor]) -> None:
    """``apply`` makes no NaN and no plus infinity, and leaves each row a token that is not minus infinity."""
    processor = _make_with_request(cls)
    for num_tokens in _LENGTHS:
        logits = _logits(2)
        processor.apply(logits, _batch([0, 1], num_tokens))
        for row, of_row in enumerate(logits):
            where = f"row {row} of 2, with {num_tokens} tokens"
            assert not bool(of_row.isnan().any()), f"{where}: apply made a NaN"
            assert bool((of_row < float("inf")).all()), f"{where}: apply made an infinity"
            assert bool(of_row.isfinite().any()), f"{where}: no token is left to be sampled"


def check_the_example_request_is_worked_on(cls: type[LogitsProcessor]) -> None:
    """``apply`` changes logits of the example request, at one of some lengths at least."""
    processor, before = _make_with_request(cls), _logits(1)
    for num_tokens in _LENGTHS:
        logits = before.clone()
        processor.apply(logits, _batch([0], num_tokens))
        if not torch.equal(logits, before):
            return
    raise AssertionError(f"no logit of the example request changes, with {', '.join(map(str, _LENGTHS))} tokens")


def check_a_row_does_not_depend_on_its_neighbours(cls: type[LogitsProcessor]) -> None:
    """A request's logits become the same alone, beside others, and as one of several rows that verify its drafts."""
    source = _logits(4)
    for num_tokens in _LENGTHS:
        alone = source[1:2].clone()
        _make_with_request(cls).apply(alone, _batch([0], num_tokens))
        for rows in ([1, 0], [0, 1, 1], [0, 0]):
            processor = _make_with_request(cls)
            processor.add_row(_request(1, _get_example_params(cls)))
            logits = source[1:2].repeat(len(rows), 1)
            first = {0: num_tokens, 1: 15 - num_tokens}
            lengths = [first[row] + sum(r == row for r in rows[:i]) for i, row in enumerate(rows)]
            processor.apply(logits, _batch(rows, lengths))
            at = rows.index(0)
            assert torch.equal(logits[at], alone[0]), (
                f"with {num_tokens} tokens, row {at} of logits for the requests {rows} is not as alone"
            )


def check_rejected_drafts_leave_no_trace(cls: type[LogitsProcessor]) -> None:
    """After rows of drafts that are rejected, the request's logits become what they would have been."""
    for num_tokens in _LENGTHS[:-1]:
        plain, after_drafts = _logits(1), _logits(1)
        _make_with_request(cls).apply(plain, _batch([0], num_tokens))
        processor = _make_with_request(cls)
        processor.apply(_logits(3), _batch([0] * 3, [num_tokens, num_tokens + 1, num_tokens + 2]))
        processor.apply(after_drafts, _batch([0], num_tokens))
        assert torch.equal(plain, after_drafts), f"two drafts behind {num_tokens} tokens were rejected, and still count"


def check_only_its_own_rows_change(cls: type[LogitsProcessor]) -> None:
    """A row of logits whose request has no work is left as it was, wherever it stands in the batch."""
    for rows in ([0, 1], [1, 0], [1]):
        processor = _make_with_request(cls)
        if processor.add_row(_request(1, SamplingParams())):
            raise unittest.SkipTest("works on every request")
        logits = _logits(len(rows))
        before = logits.clone()
        processor.apply(logits, _batch(rows))
        logits_row = rows.index(1)
        assert torch.equal(logits[logits_row], before[logits_row]), f"rows {rows}: the logits of row 1 changed"


def check_remove_row_forgets(cls: type[LogitsProcessor]) -> None:
    """After ``remove_row``, the row can be given to a request without work and is left alone."""
    processor = _make_with_request(cls)
    processor.add_row(_request(1, _get_example_params(cls)))
    processor.remove_row(0)
    if processor.add_row(_request(0, SamplingParams())):
        raise unittest.SkipTest("works on every request")
    logits = _logits(2)
    before = logits.clone()
    processor.apply(logits, _batch([0, 1]))
    assert torch.equal(logits[0], before[0]), "the row still changes after remove_row"


def check_argmax_invariant_keeps_the_argmax(cls: type[LogitsProcessor]) -> None:
    """A processor that declares itself ``argmax_invariant`` never changes which token is the largest."""
    if not cls.argmax_invariant:
        raise unittest.SkipTest("declares that it may change the argmax")
    processor = _make_with_request(cls)
    logits = _logits(1)
    before = logits.argmax(-1)
    processor.apply(logits, _batch([0]))
    assert torch.equal(logits.argmax(-1), before), "the argmax changed"


_PARAMS = SamplingParams(
    max_tokens=8,
    min_tokens=4,
    logit_bias={3: 5.0, 4: -100.0},
    allowed_token_ids=[1, 3, 4, 9],
    bad_words_token_ids=[[9], [7, 4]],
    seed=1,
)
"""A request that gives every bundled processor something to do."""


_LENGTHS = (3, 4, 6, 9, 12)
"""Tokens of a request, the three of its prompt included."""


def _make(cls: type[LogitsProcessor]) -> LogitsProcessor:
    return cls(_VOCAB, torch.device("cpu"), parse_options(cls, {}))


def _get_example_params(cls: type[LogitsProcessor]) -> SamplingParams:
    return cls.example_params() or _PARAMS


def _make_with_request(cls: type[LogitsProcessor]) -> LogitsProcessor:
    """A processor with a request in row 0 that it works on."""
    processor, params = _make(cls), _get_example_params(cls)
    cls.validate_params(params, _VOCAB)
    assert processor.add_row(_request(0, params)) is True, (
        "add_row has nothing to do for the example request; name one in example_params(), or nothing can be checked"
    )
    return processor


def _request(row: int, params: SamplingParams) -> NewRequest:
    return NewRequest(row, row, [5, 6, 7], 3, 0, params, seed=1, stop_token_ids=frozenset({2}))


def _batch(rows: list[int], num_tokens: int | list[int] = 3) -> LogitsBatch:
    counts = [num_tokens] * len(rows) if isinstance(num_tokens, int) else num_tokens
    tokens = torch.arange(5, 21, dtype=torch.int32).repeat(4, 1)  # of each row of the table
    return LogitsBatch(rows, list(counts), tokens, torch.tensor(counts, dtype=torch.int32))


def _logits(n: int) -> Tensor:
    return torch.randn(n, _VOCAB, generator=torch.Generator().manual_seed(n))
