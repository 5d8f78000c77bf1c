"""Verification and placing of drafts: kernels against torch, in the interpreter by default, and on a GPU."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.core.contracts.sampler import SamplingTable
from quire.core.sample.forced_acceptance import FORCED_ACCEPTANCE_POSITION, ForcedAcceptance, force_acceptance
from quire.core.sample.inputs import DraftSpans
from quire.core.sample.kernels.forced_acceptance_kernel import launch_force_acceptance
from quire.core.sample.kernels.verify_kernel import launch_place_drafts, launch_verify_drafts
from quire.core.sample.noise import philox
from quire.core.sample.verify import place_drafts, verify_drafts

ROWS, LENGTH, VOCAB = 7, 40, 9  # the last row is padding
DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


class Problem:
    """A table whose rows have drafts, a step that verifies some of them, and what the target sampled."""

    def __init__(self, seed: int, count: int, device: str = "cpu") -> None:
        gen = torch.Generator().manual_seed(seed)
        ints = {"dtype": torch.int32, "generator": gen}
        lengths = torch.randint(1, LENGTH - 8, (ROWS,), **ints)
        seeds = torch.randint(-(2**62), 2**62, (ROWS,), generator=gen)
        floats = torch.zeros(ROWS)
        columns = (torch.randint(0, 3, (ROWS, LENGTH), **ints), lengths, floats, floats.int(), floats, floats, seeds)
        self.table = SamplingTable(*(column.to(device) for column in columns))
        self.num_computed = (lengths + 3).to(device)
        self.num_drafts = torch.randint(0, 5, (ROWS,), **ints).to(device)
        rows = torch.randperm(ROWS - 1, generator=gen)[:count]
        granted = torch.randint(0, 5, (count,), generator=gen)
        start = (granted + 1).cumsum(0) - granted - 1
        self.spans = DraftSpans(rows.to(device), start.to(device), granted.to(device), int(granted.max()) + 1)
        self.sampled = torch.randint(0, 3, (int((granted + 1).sum()),), **ints).to(device)

    def accepts(self, request: int, probability: float | None = None) -> tuple[list[int], int]:
        """The tokens that a request gains, and how many of its drafts were verified, one draft after the other."""
        row, start = int(self.spans.rows[request]), int(self.spans.start[request])
        base = int(self.table.num_tokens[row])
        num_verified = min(int(self.spans.num_drafts[request]), int(self.num_drafts[row]))
        tokens = []
        for i in range(num_verified):
            draft, token = int(self.table.token_ids[row, base + i]), int(self.sampled[start + i])
            if probability is None:
                accepted = draft == token
            else:
                place = torch.tensor([base + i]), torch.tensor([FORCED_ACCEPTANCE_POSITION])
                accepted = int(philox(*place, self.table.seed[row, None])) < int(probability * 2**32)
            tokens.append(draft if accepted else token)
            if not accepted:
                return tokens, num_verified
        return [*tokens, int(self.sampled[start + num_verified])], num_verified


def check(problem: Problem, before: Problem, packed: torch.Tensor, probability: float | None = None) -> None:
    """The packed result, and the table after it, are what ``before`` says one draft after the other."""
    table, packed = problem.table, packed.cpu()
    for i, row in enumerate(before.spans.rows.tolist()):
        tokens, num_verified = before.accepts(i, probability)
        base = int(before.table.num_tokens[row])
        assert packed[i, :2].tolist() == [len(tokens), num_verified]
        assert packed[i, 2 : 2 + len(tokens)].tolist() == tokens
        assert table.token_ids[row, : base + len(tokens)].tolist() == [
            *before.table.token_ids[row, :base].tolist(),
            *tokens,
        ]
        assert int(table.num_tokens[row]) == base + len(tokens) == int(problem.num_computed[row]) + 1
        assert int(problem.num_drafts[row]) == 0
        assert bool((table.token_ids[row] >= 0).all())


@DEVICES
@settings(max_examples=12)
@given(seed=st.integers(0, 2**31), count=st.integers(1, 5))
def test_drafts_are_accepted_up_to_the_first_that_was_not_sampled(device: str, seed: int, count: int) -> None:
    for problem, verify in (
        (Problem(seed, count), verify_drafts),
        (Problem(seed, count, device), launch_verify_drafts),
    ):
        p = problem
        packed = verify(p.sampled, p.spans, p.table, p.num_computed, p.num_drafts)
        check(problem, Problem(seed, count), packed)


@DEVICES
@settings(max_examples=12)
@given(seed=st.integers(0, 2**31), probability=st.sampled_from([0.0, 0.6, 1.0]), count=st.integers(1, 5))
def test_forced_acceptance(device: str, seed: int, probability: float, count: int) -> None:
    """By chance alone; a rejected draft is replaced by the sampled token even where the two are equal."""
    p = Problem(seed, count)
    packed = ForcedAcceptance(probability)(p.sampled, p.spans, p.table, p.num_computed, p.num_drafts)
    check(p, Problem(seed, count), packed, probability)
    p = Problem(seed, count, device)
    launch_force_acceptance(p.sampled, p.spans, p.table, p.num_drafts, probability)
    packed = launch_verify_drafts(p.sampled, p.spans, p.table, p.num_computed, p.num_drafts)
    check(p, Problem(seed, count), packed, probability)


def test_forced_acceptance_is_verification_of_changed_drafts() -> None:
    p, q = Problem(3, 5), Problem(3, 5)
    expected = ForcedAcceptance(0.5)(p.sampled, p.spans, p.table, p.num_computed, p.num_drafts)
    force_acceptance(q.sampled, q.spans, q.table, q.num_drafts, 0.5)
    assert torch.equal(verify_drafts(q.sampled, q.spans, q.table, q.num_computed, q.num_drafts), expected)


@DEVICES
@settings(max_examples=12)
@given(seed=st.integers(0, 2**31), k=st.integers(1, 6), with_lengths=st.booleans())
def test_place_drafts(device: str, seed: int, k: int, with_lengths: bool) -> None:
    gen = torch.Generator().manual_seed(seed)
    rows = torch.randperm(ROWS, generator=gen)[:4]
    tokens = torch.randint(-2, VOCAB + 3, (4, k), generator=gen, dtype=torch.int32)
    lengths = torch.randint(-2, k + 3, (4,), generator=gen, dtype=torch.int32) if with_lengths else None
    results = []
    for problem, place in ((Problem(seed, 1), place_drafts), (Problem(seed, 1, device), launch_place_drafts)):
        table, on = problem.table, problem.table.token_ids.device
        table.num_tokens[0] = LENGTH - 2  # room for two
        problem.num_drafts[-1] = 0
        place(tokens.to(on), None if lengths is None else lengths.to(on), rows.to(on), table, problem.num_drafts, VOCAB)
        results.append((problem.num_drafts.tolist(), table.token_ids.tolist()))
    assert results[0] == results[1]
    for i, row in enumerate(rows.tolist()):
        valid = next((j for j, token in enumerate(tokens[i].tolist()) if not 0 <= token < VOCAB), k)
        limit = k if lengths is None else max(0, int(lengths[i]))
        room = 2 if row == 0 else LENGTH
        assert results[0][0][row] == (0 if row == ROWS - 1 else min(valid, limit, room))
