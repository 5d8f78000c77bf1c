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
    "check_add_row_says_whether_there_is_work",
    "check_apply_changes_in_place",
    "check_argmax_invariant_keeps_the_argmax",
    "check_only_its_own_rows_change",
    "check_plain_parameters_are_valid",
    "check_remove_row_forgets",
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
    assert logits.shape == (2, _VOCAB) and not bool(logits.isnan().any()), "apply made a NaN"


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
    processor.add_row(_request(1, _PARAMS))
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


def _make(cls: type[LogitsProcessor]) -> LogitsProcessor:
    return cls(_VOCAB, torch.device("cpu"), parse_options(cls, {}))


def _make_with_request(cls: type[LogitsProcessor]) -> LogitsProcessor:
    """A processor with a request in row 0 that it works on. Skips where it has none for the sample request."""
    processor = _make(cls)
    if not processor.add_row(_request(0, _PARAMS)):
        raise unittest.SkipTest("has nothing to do for min_tokens, logit_bias, allowed_token_ids and bad_words")
    return processor


def _request(row: int, params: SamplingParams) -> NewRequest:
    return NewRequest(row, row, [5, 6, 7], 3, 0, params, seed=1, stop_token_ids=frozenset({2}))


def _batch(rows: list[int]) -> LogitsBatch:
    tokens = torch.zeros(4, 16, dtype=torch.int32)
    tokens[:, :3] = torch.tensor([5, 6, 7])
    return LogitsBatch(rows, [3] * len(rows), tokens, torch.full((len(rows),), 3, dtype=torch.int32))


def _logits(n: int) -> Tensor:
    return torch.randn(n, _VOCAB, generator=torch.Generator().manual_seed(n))
