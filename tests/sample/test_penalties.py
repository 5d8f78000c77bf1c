"""Each penalty alone, against transformers and against its formula in float64; the kernels against the torch code."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import RepetitionPenaltyLogitsProcessor

from quire.core.sample.inputs import PenaltyColumns
from quire.core.sample.kernels.penalties_kernel import launch_penalties
from quire.core.sample.penalties import apply_penalties, apply_penalties_torch

VOCAB, LENGTH, ROWS = 24, 12, 3
NEUTRAL = {"repetition": 1.0, "frequency": 0.0, "presence": 0.0}


class Problem:
    """Rows of logits, each of a request of some tokens, the first of which are its prompt."""

    def __init__(self, seed: int, **strengths: float) -> None:
        gen = torch.Generator().manual_seed(seed)
        self.logits = torch.randn(ROWS, VOCAB, generator=gen) * 3
        self.num_tokens = torch.randint(1, LENGTH + 1, (ROWS,), generator=gen, dtype=torch.int32)
        prompt_len = (self.num_tokens * torch.rand(ROWS, generator=gen)).int().clamp(min=1)
        tokens = torch.randint(0, VOCAB // 2, (ROWS, LENGTH), generator=gen, dtype=torch.int32)
        columns = (torch.full((ROWS,), value) for value in (NEUTRAL | strengths).values())
        self.columns = PenaltyColumns(tokens, prompt_len, *columns)

    def penalized(self) -> Tensor:
        logits = self.logits.clone()
        apply_penalties_torch(logits, self.num_tokens, self.columns)
        return logits

    def penalized_by_kernels(self) -> Tensor:
        logits, index = self.logits.clone(), torch.arange(ROWS)
        launch_penalties(logits, index, index, self.num_tokens, LENGTH, self.columns)
        return logits

    def expected(self) -> Tensor:
        """The definition, in float64, one token of the vocabulary after the other."""
        logits = self.logits.double()
        for row in range(ROWS):
            n, prompt_len = int(self.num_tokens[row]), int(self.columns.prompt_len[row])
            repetition, frequency, presence = (float(column[row]) for column in self.columns[2:])
            seen = self.columns.token_ids[row, :n].tolist()
            for token in range(VOCAB):
                x, count = float(logits[row, token]), seen[prompt_len:].count(token)
                if token in seen:
                    x = x / repetition if x > 0 else x * repetition
                logits[row, token] = x - frequency * count - presence * (count > 0)
        return logits


@settings(max_examples=20)
@given(seed=st.integers(0, 2**31), factor=st.sampled_from([0.5, 1.0, 1.3, 2.0]))
def test_repetition_penalty_is_transformers(seed: int, factor: float) -> None:
    problem = Problem(seed, repetition=factor)
    processor = RepetitionPenaltyLogitsProcessor(factor)
    for row, n in enumerate(problem.num_tokens.tolist()):
        tokens = problem.columns.token_ids[row : row + 1, :n].long()
        expected = processor(tokens, problem.logits[row : row + 1].clone())
        torch.testing.assert_close(problem.penalized()[row : row + 1], expected)


@pytest.mark.parametrize(
    "strengths",
    [
        {"repetition": 1.3},
        {"repetition": 0.7},
        {"frequency": 0.5},
        {"frequency": -1.5},
        {"presence": 0.7},
        {"presence": -2.0},
        {"repetition": 1.2, "frequency": 0.4, "presence": -0.3},
    ],
    ids=str,
)
@settings(max_examples=8)
@given(seed=st.integers(0, 2**31))
def test_each_penalty_is_its_formula(strengths: dict[str, float], seed: int) -> None:
    problem = Problem(seed, **strengths)
    expected = problem.expected()
    assert not torch.equal(expected, problem.logits.double()) or not problem.num_tokens.gt(problem.columns[1]).any()
    torch.testing.assert_close(problem.penalized().double(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(problem.penalized_by_kernels().double(), expected, rtol=1e-6, atol=1e-6)


def test_neutral_penalties_change_no_bit() -> None:
    problem = Problem(5)
    assert torch.equal(problem.penalized(), problem.logits)
    assert torch.equal(problem.penalized_by_kernels(), problem.logits)


def test_frequency_and_presence_count_generated_tokens_alone() -> None:
    tokens = torch.tensor([[1, 2, 2, 3, 3, 3, 9, 9]])
    logits = torch.zeros(1, VOCAB)
    columns = PenaltyColumns(tokens, torch.tensor([2]), torch.ones(1), torch.tensor([0.5]), torch.tensor([0.1]))
    apply_penalties_torch(logits, torch.tensor([6]), columns)
    expected = torch.zeros(VOCAB)
    expected[2], expected[3] = -0.6, -1.6  # 2 was generated once, 3 three times; 1 and the second 9 not at all
    torch.testing.assert_close(logits[0], expected)


@pytest.mark.parametrize(
    ("device", "vocab", "length"), [("cpu", 40, 30), pytest.param("cuda", 151936, 3000, marks=pytest.mark.gpu)]
)
def test_some_logits_rows_of_a_table(device: str, vocab: int, length: int) -> None:
    """The kernels, and the torch code behind ``apply_penalties``, leave the other rows of the logits alone."""
    gen = torch.Generator().manual_seed(vocab)
    tokens = torch.randint(0, vocab if vocab < 100 else 500, (5, length), generator=gen, dtype=torch.int32)
    rows, logits_rows = torch.tensor([4, 1, 0, 2]), torch.tensor([3, 0, 1])
    num_tokens = torch.tensor([length, 7, 1, length - 2], dtype=torch.int32)
    prompt_len = torch.tensor([3, 7, 9, 1, length // 2], dtype=torch.int32)
    columns = PenaltyColumns(tokens, prompt_len, *(torch.rand(5, generator=gen) + 0.5 for _ in range(3)))
    logits = torch.randn(4, vocab, generator=gen) * 3
    expected = logits.clone()
    penalized_rows = rows[logits_rows]
    some = expected[logits_rows]
    apply_penalties_torch(
        some, num_tokens[logits_rows], PenaltyColumns(*(column[penalized_rows] for column in columns))
    )
    expected[logits_rows] = some
    for apply, on in ((apply_penalties, "cpu"), (launch_penalties, device), (apply_penalties, device)):
        got = logits.clone().to(on)
        moved = PenaltyColumns(*(column.to(on) for column in columns))
        apply(got, logits_rows.to(on), rows.to(on), num_tokens.to(on), length, moved)
        torch.testing.assert_close(got.cpu(), expected, rtol=1e-5, atol=1e-5)
