"""What every KV allocator must do."""

from __future__ import annotations

import random
import unittest
from typing import Any

from quire.core.config import SchedulerConfig
from quire.core.contracts.kv import KVAllocator, KVGroup
from quire.core.messages import EngineCoreRequest
from quire.core.plugin.manager import PluginManager
from quire.core.plugin.options import parse_options
from quire.core.request import Request
from quire.core.sampling_params import SamplingParams
from quire.core.testing.simulated_engine import SimulatedEngine

__all__ = [
    "check_a_refusal_changes_nothing",
    "check_a_shared_block_is_copied_before_it_is_written",
    "check_an_engine_serves_on_it",
    "check_blocks_belong_to_one_request",
    "check_blocks_out_of_the_window_come_back",
    "check_everything_comes_back",
    "check_prefixes_are_found",
    "check_prefixes_are_kept_apart_by_salt",
    "check_the_last_token_is_never_matched",
    "check_the_reserve_stays_free",
]

_BLOCK = 4


def check_blocks_belong_to_one_request(cls: type[KVAllocator]) -> None:
    """Blocks are numbered 1 .. num_blocks - 1 and allocated to one request at a time; block 0 is never allocated."""
    allocator = _make(cls, groups=(KVGroup(), KVGroup()))
    seen: list[set[int]] = [set(), set()]
    for i in range(3):
        allocation = allocator.allocate(_request(i, [i] * 9), 9, num_computed_tokens=0)
        assert allocation is not None, "refused although blocks are free"
        for group, blocks in enumerate(allocation.new_blocks):
            assert allocation.starts[group] == 0, "a first allocation starts at 0"
            assert len(blocks) == 3, f"9 tokens take 3 blocks of 4, got {len(blocks)}"
            assert all(0 < block < allocator.num_blocks for block in blocks), f"{blocks} are not all in the pool"
            assert not seen[group] & set(blocks), f"{seen[group] & set(blocks)} belong to two requests"
            seen[group] |= set(blocks)
    allocator.check_integrity()


def check_everything_comes_back(cls: type[KVAllocator]) -> None:
    """Freeing returns every block, and freeing twice does no harm."""
    allocator = _make(cls)
    before = allocator.num_free_blocks()
    requests = [_request(i, range(i, i + 10)) for i in range(3)]
    for request in requests:
        allocator.allocate(request, 10, num_computed_tokens=0)
        allocator.cache_full_blocks(request, 10)
    taken = before - allocator.num_free_blocks()
    assert taken == 9, f"3 requests of 10 tokens take 3 blocks of 4 each, not {taken} together"
    for request in [*requests, *requests]:
        allocator.free(request)
    assert allocator.num_free_blocks() == before, f"{before} blocks were free, now {allocator.num_free_blocks()}"
    allocator.check_integrity()


def check_a_refusal_changes_nothing(cls: type[KVAllocator]) -> None:
    """``allocate`` that returns None leaves the pool and what every request references as they were."""
    allocator = _make(cls, num_blocks=8)
    first, second = _request(1, range(16)), _request(2, range(100, 140))
    assert allocator.allocate(first, 16, num_computed_tokens=0) is not None
    free = allocator.num_free_blocks()
    for request, num_tokens, computed in ((second, 40, 0), (first, 60, 16)):
        assert allocator.allocate(request, num_tokens, num_computed_tokens=computed) is None, (
            "granted more blocks than there are"
        )
        assert allocator.num_free_blocks() == free, "a refusal took or freed blocks"
        allocator.check_integrity()
    allocator.free(second)
    assert allocator.num_free_blocks() == free, "the refused request referenced blocks"
    allocator.free(first)
    assert allocator.num_free_blocks() == 7, "the request that was refused more lost a block"


def check_the_reserve_stays_free(cls: type[KVAllocator]) -> None:
    """``num_reserved_blocks`` blocks remain free, or the request is refused."""
    allocator = _make(cls, num_blocks=8)
    assert allocator.allocate(_request(1, range(16)), 16, num_computed_tokens=0, num_reserved_blocks=4) is None, (
        "the reserve was spent"
    )
    assert allocator.allocate(_request(2, range(16)), 16, num_computed_tokens=0, num_reserved_blocks=3) is not None, (
        "3 would have been left"
    )
    assert allocator.num_free_blocks() == 3


def check_prefixes_are_found(cls: type[KVAllocator]) -> None:
    """Cached blocks are found by a request with the same tokens, in every group, also after their request ended."""
    allocator = _caching(cls, groups=(KVGroup(), KVGroup()))
    first = _request(1, range(10))
    blocks = _fill(allocator, first)
    again = _request(2, [*range(8), 50, 51])
    for _ in range(2):
        match = allocator.match_prefix(again)
        assert match.num_tokens == 8, f"8 tokens in full blocks were cached, {match.num_tokens} are found"
        assert [list(matched) for matched in match.blocks] == [table[:2] for table in blocks], "other blocks are found"
        allocator.free(first)
    free = allocator.num_free_blocks()
    allocation = allocator.allocate(again, 10, num_computed_tokens=8, prefix_match=match)
    assert allocation is not None and not allocation.copies
    assert [new[:2] for new in allocation.new_blocks] == [table[:2] for table in blocks], (
        "the matched blocks head the table"
    )
    assert allocator.num_free_blocks() == free - 3, "matched blocks are in use"
    other = _request(3, [9, *range(1, 10)])
    assert allocator.match_prefix(other).num_tokens == 0, "a block was found although the tokens before it differ"
    allocator.check_integrity()


def check_the_last_token_is_never_matched(cls: type[KVAllocator]) -> None:
    """At least one token is left to compute, and prompt log-probabilities forbid a match."""
    allocator = _caching(cls)
    _fill(allocator, _request(1, range(8)))
    assert allocator.match_prefix(_request(2, range(8))).num_tokens == 4
    skipping = _request(3, range(8), prompt_logprobs=1)
    assert allocator.match_prefix(skipping).num_tokens == 0, "skip_prefix_cache was not respected"


def check_prefixes_are_kept_apart_by_salt(cls: type[KVAllocator]) -> None:
    """A prefix is found only under the ``extra_keys`` it was computed with."""
    allocator = _caching(cls)
    _fill(allocator, _request(1, range(10), salt="a"))
    assert allocator.match_prefix(_request(2, range(10), salt="a")).num_tokens == 8
    for salt in (None, "b"):
        assert allocator.match_prefix(_request(3, range(10), salt=salt)).num_tokens == 0, "the salt was ignored"


def check_a_shared_block_is_copied_before_it_is_written(cls: type[KVAllocator]) -> None:
    """After ``fork_blocks``, the request that first writes into the shared block gets a copy; the other keeps it."""
    for writer_is_parent in (False, True):
        allocator = _make(cls)
        before = allocator.num_free_blocks()
        parent, child = _request(1, range(6)), _request(2, range(6))
        allocator.allocate(parent, 6, num_computed_tokens=0)
        forked = allocator.fork_blocks(parent, child, 6)
        assert forked is not None and allocator.num_free_blocks() == before - 2, "a fork takes no new blocks"
        writer, other = (parent, child) if writer_is_parent else (child, parent)
        allocation = allocator.allocate(writer, 7, num_computed_tokens=6)
        assert allocation is not None and len(allocation.copies) == 1, "a shared block would be written"
        ((group, source, destination),) = allocation.copies
        assert (group, source) == (0, forked.new_blocks[0][1])
        assert allocation.starts == [1] and allocation.new_blocks == [[destination]], "the table must name the copy"
        second = allocator.allocate(other, 7, num_computed_tokens=6)
        assert second is not None and not second.copies, "the original is shared no more"
        allocator.check_integrity()
        allocator.free(parent)
        allocator.free(child)
        assert allocator.num_free_blocks() == before


def check_blocks_out_of_the_window_come_back(cls: type[KVAllocator]) -> None:
    """Whole blocks before the position are freed in that group, and only there."""
    allocator = _make(cls, groups=(KVGroup(), KVGroup(window=4)))
    before, pool = allocator.num_free_blocks(), allocator.stats().num_free
    request = _request(1, range(20))
    allocator.allocate(request, 20, num_computed_tokens=0)
    allocator.free_out_of_window_blocks(request, 1, 11)
    left = pool - allocator.stats().num_free
    assert left == 8, f"5 + 3 blocks should be left, not {left}"
    allocator.free_out_of_window_blocks(request, 1, 11)
    assert allocator.allocate(request, 24, num_computed_tokens=20) is not None
    allocator.check_integrity()
    allocator.free(request)
    assert allocator.num_free_blocks() == before


def check_an_engine_serves_on_it(cls: type[KVAllocator]) -> None:
    """Random traffic on a small pool, with forks, aborts and preemptions: every key is where it must be."""
    policy = PluginManager().load_class("policy", "fcfs")
    for seed, groups in enumerate(((KVGroup(),), (KVGroup(), KVGroup(window=6)), (KVGroup(window=5),))):
        rng = random.Random(seed)
        allocator = _make(cls, groups=groups, num_blocks=24)
        before = allocator.num_free_blocks()
        engine = SimulatedEngine(allocator, policy(), policy(), config=SchedulerConfig(6, 16), max_model_len=60)
        for i in range(24):
            prompt = [1] * rng.randrange(12) + [rng.randrange(3) for _ in range(rng.randrange(1, 8))]
            engine.add_request(f"r{i}", prompt, max_tokens=rng.randrange(1, 24), eos=[3])
            engine.add_request(f"r{i}b", prompt, max_tokens=rng.randrange(1, 24), parent=f"r{i}")
            for _ in range(rng.randrange(6)):
                engine.run_step()
                allocator.check_integrity()
            if rng.random() < 0.2 and f"r{i}" not in engine.finished:
                engine.abort_request(f"r{i}")
        engine.run_until_finished()
        allocator.check_integrity()
        assert allocator.num_free_blocks() == before, f"{before - allocator.num_free_blocks()} blocks were lost"


def _make(cls: type[KVAllocator], *, groups: tuple[KVGroup, ...] = (KVGroup(),), num_blocks: int = 32) -> KVAllocator:
    return cls(groups, num_blocks, _BLOCK, prefix_caching=True, options=parse_options(cls, {}))


def _caching(cls: type[KVAllocator], **sizes: Any) -> KVAllocator:
    """An allocator, unless its kind caches nothing."""
    probe = _make(cls)
    _fill(probe, _request(1, range(8)))
    if probe.match_prefix(_request(2, range(8))).num_tokens == 0:
        raise unittest.SkipTest("caches no prefixes")
    return _make(cls, **sizes)


def _request(request_id: int, tokens: Any, *, salt: str | None = None, **params: Any) -> Request:
    message = EngineCoreRequest(request_id, list(tokens), SamplingParams(**params), 0, cache_salt=salt)
    return Request(message, 1024)


def _fill(allocator: KVAllocator, request: Request) -> list[list[int]]:
    """Allocate and cache all of a request's tokens; its block table."""
    allocation = allocator.allocate(request, request.num_tokens, num_computed_tokens=0)
    assert allocation is not None, "refused although blocks are free"
    allocator.cache_full_blocks(request, request.num_tokens)
    return allocation.new_blocks
