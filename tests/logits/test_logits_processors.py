"""``logit_bias`` and ``min_tokens``, each alone: against its definition, and against transformers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import MinNewTokensLengthLogitsProcessor, SequenceBiasLogitsProcessor

from quire.core.contracts.logits_processor import LogitsBatch
from quire.core.errors import InvalidRequestError
from quire.core.messages import NewRequest
from quire.core.sampling_params import SamplingParams
from quire.plugins.logits.logit_bias import LogitBias
from quire.plugins.logits.min_tokens import MinTokens

CPU, VOCAB = torch.device("cpu"), 32


def request(row: int, params: SamplingParams, stops: set[int] = frozenset(), prompt_len: int = 3) -> NewRequest:
    return NewRequest(row, row, [5] * prompt_len, prompt_len, 0, params, seed=1, stop_token_ids=frozenset(stops))


def batch(rows: list[int], max_positions: list[int], positions: list[int] | None = None) -> LogitsBatch:
    exact = torch.tensor(max_positions if positions is None else positions, dtype=torch.int32)
    return LogitsBatch(rows, max_positions, torch.zeros(4, 64, dtype=torch.int32), exact)


def random_logits(n: int) -> Tensor:
    return torch.randn(n, VOCAB, generator=torch.Generator().manual_seed(n))


def test_logit_bias_is_added_to_the_named_tokens() -> None:
    processor, bias = LogitBias(VOCAB, CPU), {3: 5.0, 4: -100.0, 31: 0.25}
    assert processor.add_row(request(0, SamplingParams(logit_bias=bias)))
    assert not processor.add_row(request(1, SamplingParams()))
    assert processor.add_row(request(2, SamplingParams(logit_bias={0: 1.0})))
    logits = random_logits(4)
    expected = logits.clone()
    processor.apply(logits, batch([2, 1, 0, 0], [3, 3, 3, 4]))  # row 0 verifies a draft
    expected[0, 0] += 1.0
    for token, value in bias.items():
        expected[2:, token] += value
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-6)


def test_logit_bias_is_transformers() -> None:
    bias = {7: 2.5, 9: -1.5}
    processor, logits = LogitBias(VOCAB, CPU), random_logits(1)
    processor.add_row(request(0, SamplingParams(logit_bias=bias)))
    theirs = SequenceBiasLogitsProcessor({(token,): value for token, value in bias.items()})
    expected = theirs(torch.zeros(1, 3, dtype=torch.long), logits.clone())
    processor.apply(logits, batch([0], [3]))
    torch.testing.assert_close(logits, expected)


def test_logit_bias_outside_the_vocabulary_is_refused() -> None:
    LogitBias.validate_params(SamplingParams(logit_bias={VOCAB - 1: 1.0}), VOCAB)
    for token in (-1, VOCAB):
        with pytest.raises(InvalidRequestError, match=f"token {token}"):
            LogitBias.validate_params(SamplingParams(logit_bias={token: 1.0}), VOCAB)


@pytest.mark.parametrize("num_generated", range(6))
def test_min_tokens_forbids_stops_until_then(num_generated: int) -> None:
    processor, prompt_len, stops = MinTokens(VOCAB, CPU), 3, {2, 9}
    params = SamplingParams(max_tokens=9, min_tokens=4)
    assert processor.add_row(request(0, params, stops, prompt_len))
    logits = random_logits(1)
    expected = logits.clone()
    theirs = MinNewTokensLengthLogitsProcessor(prompt_len, 4, sorted(stops), device="cpu")
    expected = theirs(torch.zeros(1, prompt_len + num_generated, dtype=torch.long), expected)
    processor.apply(logits, batch([0], [prompt_len + num_generated]))
    assert torch.equal(logits, expected)
    assert bool(logits[0, 2].isinf()) == (num_generated < 4)


@pytest.mark.parametrize("position", [5, 6, 7, 8])
def test_min_tokens_goes_by_the_position_on_the_device(position: int) -> None:
    """With drafts the host has an upper bound alone."""
    processor, logits = MinTokens(VOCAB, CPU), random_logits(1)
    processor.add_row(request(0, SamplingParams(max_tokens=9, min_tokens=4), {2}))  # may end from position 7 on
    processor.apply(logits, batch([0], [9], [position]))
    assert bool(logits[0, 2].isinf()) == (position < 7)
    assert int(logits.isinf().sum()) == (position < 7)


def test_min_tokens_without_stops_has_nothing_to_do() -> None:
    processor = MinTokens(VOCAB, CPU)
    assert not processor.add_row(request(0, SamplingParams(max_tokens=9, min_tokens=4)))
    assert not processor.add_row(request(0, SamplingParams(max_tokens=9), {2}))
    assert not processor.add_row(request(0, SamplingParams(max_tokens=9, min_tokens=4), {VOCAB}))
