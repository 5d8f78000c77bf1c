"""A KV allocator that hands out what it must not is replaced before anything is written: answers stay right."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from quire import LLM, SamplingParams
from quire.core.contracts.kv import KVGroup
from quire.core.request import Request
from quire.core.sched.kv_ownership import BrokenAllocationError, WatchedAllocator
from quire.core.testing.conformance import parametrize_with_checks
from quire.plugins.kv.paged import PagedAllocator
from quire.sdk import Allocation, PrefixMatch

PROMPTS = [[5 + i, 6, 7, 8] * (4 + 5 * i) for i in range(4)]
PARAMS = [
    SamplingParams(temperature=0.8 * (i % 2), seed=i, n=1 + i % 3, max_tokens=40, ignore_eos=True) for i in range(4)
]


class Honest(PagedAllocator):
    """Of another author, and right."""


class CountsInNumpy(PagedAllocator):
    """Of another author, and right: numbers are numpy's."""

    def num_free_blocks(self) -> Any:
        return np.int64(super().num_free_blocks())

    def count_cached_tokens(self, requests: Any) -> Any:
        return np.zeros(len(requests), np.int32)  # a guess is allowed


class CountsInBools(PagedAllocator):
    """Compares in place of counting."""

    def num_free_blocks(self) -> Any:
        return super().num_free_blocks() > 0

    def count_cached_tokens(self, requests: Any) -> Any:
        return [False for _ in requests]


class Mutates(PagedAllocator):
    """Changes what the 9th allocation gives."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.countdown, self.last = 9, 1

    def allocate(self, *args: Any, **options: Any) -> Allocation | None:
        allocation = super().allocate(*args, **options)
        if allocation is not None and allocation.new_blocks[0]:
            self.countdown -= 1
            if self.countdown == 0:
                self.change(allocation)
            self.last = (allocation.new_blocks[0] or [1])[-1]
        return allocation

    def change(self, allocation: Allocation) -> None:
        raise NotImplementedError


class GivesToTwo(Mutates):
    """Hands a block that another request writes to one more."""

    def change(self, allocation: Allocation) -> None:
        allocation.new_blocks[0][-1] = self.last


class BeyondThePool(Mutates):
    """Hands out a block that does not exist."""

    def change(self, allocation: Allocation) -> None:
        allocation.new_blocks[0][-1] = self.num_blocks


class TheNullBlock(Mutates):
    """Hands out what padding is written to."""

    def change(self, allocation: Allocation) -> None:
        allocation.new_blocks[0][-1] = 0


class TooFew(Mutates):
    """Keeps the last block for itself."""

    def change(self, allocation: Allocation) -> None:
        allocation.new_blocks[0].pop()


class NoGroups(Mutates):
    """Has nothing to say."""

    def change(self, allocation: Allocation) -> None:
        allocation.starts = []


class FindsEverything(PagedAllocator):
    """Leaves no token to compute."""

    def match_prefix(self, request: Any) -> PrefixMatch:
        return PrefixMatch(4096, tuple((1,) * 1024 for _ in self.groups))


class Watched(WatchedAllocator):
    """The bundled one under watch."""

    def __init__(self, groups: Any, num_blocks: int, block_size: int, **arguments: Any) -> None:
        super().__init__(PagedAllocator(groups, num_blocks, block_size, **arguments))


def make_engine(tiny: Path, allocator: type | str) -> LLM:
    sizes = {"block_size": 4, "num_gpu_blocks_override": 110, "max_num_seqs": 8, "max_num_batched_tokens": 48}
    return LLM(model=str(tiny), device="cpu", max_model_len=256, kv_allocator=allocator, **sizes)


def generate(llm: LLM) -> list[list[list[int]]]:
    return [[choice.token_ids for choice in output.outputs] for output in llm.generate(PROMPTS, PARAMS)]


@pytest.fixture(scope="module")
def expected(tiny: Path) -> list[list[list[int]]]:
    llm = make_engine(tiny, "paged")
    try:
        return generate(llm)
    finally:
        llm.shutdown()


@pytest.mark.parametrize(
    ("allocator", "message"),
    [
        (GivesToTwo, "to 2 requests, one of which writes it"),
        (BeyondThePool, "gave block 110 of group 0; the pool has 110"),
        (TheNullBlock, "gave block 0 of group 0 to every request"),
        (TooFew, "blocks of group 0 where"),
        (NoGroups, "for 1 groups of layers"),
        (FindsEverything, "match_prefix found 4096 of"),
    ],
)
def test_it_is_replaced_and_answers_stay_right(
    tiny: Path, expected: Any, caplog: pytest.LogCaptureFixture, allocator: type, message: str
) -> None:
    llm = make_engine(tiny, allocator)
    try:
        with caplog.at_level(logging.ERROR, "quire.plugin"):
            assert [generate(llm) for _ in range(2)] == [expected] * 2
        stats = llm.get_stats()
        assert stats["plugin_quarantines_total"] == 1 and stats["kv_cache_usage_perc"] == 0
    finally:
        llm.shutdown()
    [line] = [record.getMessage() for record in caplog.records]
    assert f"{allocator.__name__} is quarantined (invalid_result)" in line and message in line


@pytest.mark.parametrize("allocator", [Honest, CountsInNumpy])
def test_one_that_is_right_is_left_alone(tiny: Path, expected: Any, allocator: type) -> None:
    llm = make_engine(tiny, allocator)
    try:
        assert [generate(llm) for _ in range(2)] == [expected] * 2
        assert llm.get_stats()["plugin_quarantines_total"] == 0
    finally:
        llm.shutdown()


def test_numbers_of_numpy_become_pythons_and_bools_are_no_numbers() -> None:
    request = cast(Request, None)
    watched = WatchedAllocator(CountsInNumpy([KVGroup()], 10, 4))
    numbers = [watched.num_free_blocks(), *watched.count_cached_tokens([request, request])]
    assert numbers == [9, 0, 0] and {type(number) for number in numbers} == {int}
    watched = WatchedAllocator(CountsInBools([KVGroup()], 10, 4))
    with pytest.raises(BrokenAllocationError, match="True, not a number"):
        watched.num_free_blocks()
    with pytest.raises(BrokenAllocationError, match="False"):
        watched.count_cached_tokens([request])


@parametrize_with_checks(Watched)
def test_what_is_right_passes_under_watch(check: Any) -> None:
    """Windows, forks, prefixes, preemption."""
    check()
