"""What the paged allocator promises beyond the contract."""

import random

from quire.core.contracts.kv import KVGroup
from quire.core.messages import EngineCoreRequest
from quire.core.request import Request
from quire.core.sampling_params import SamplingParams
from quire.plugins.kv.paged import PagedAllocator
from quire.plugins.kv.pool import BlockPool


def make(groups=(KVGroup(),), num_blocks=16, size=4, **kwargs):
    return PagedAllocator(groups, num_blocks, size, **kwargs)


def make_request(request_id, tokens):
    return Request(EngineCoreRequest(request_id, list(tokens), SamplingParams(), 0), 1024)


def serve(allocator, request):
    """Allocate, cache and free; the blocks that the request had in group 0."""
    match = allocator.match_prefix(request)
    allocation = allocator.allocate(
        request, request.num_tokens, num_computed_tokens=match.num_tokens, prefix_match=match
    )
    allocator.cache_full_blocks(request, request.num_tokens)
    allocator.free(request)
    return allocation.new_blocks[0]


def test_blocks_without_content_are_taken_before_cached_ones():
    allocator = make(num_blocks=7)
    cached = serve(allocator, make_request(1, range(8)))
    assert not set(serve(allocator, make_request(2, [50] * 3))) & set(cached)
    assert allocator.match_prefix(make_request(3, range(9))).num_tokens == 8


def test_the_least_recently_used_chain_goes_first_and_from_its_tail():
    allocator = make(num_blocks=9)
    serve(allocator, make_request(1, range(16)))
    serve(allocator, make_request(2, range(100, 116)))
    serve(allocator, make_request(3, range(17)))  # needs one more block: b loses its last, a is used anew
    assert allocator.match_prefix(make_request(4, range(17))).num_tokens == 16
    assert allocator.match_prefix(make_request(4, range(100, 117))).num_tokens == 12


def test_two_requests_that_compute_the_same_keep_their_own_blocks():
    allocator = make()
    a, b = make_request(1, range(8)), make_request(2, range(8))
    for each in (a, b):
        allocator.allocate(each, 8, num_computed_tokens=0)
    for each in (a, b):
        allocator.cache_full_blocks(each, 8)
    assert allocator.stats().num_cached == 2 and allocator.num_free_blocks() == 11
    allocator.free(a)
    assert allocator.match_prefix(make_request(3, range(9))).num_tokens == 8
    allocator.free(b)
    allocator.check_integrity()


def test_a_window_needs_only_its_own_blocks():
    allocator = make((KVGroup(), KVGroup(window=5)))
    first = make_request(1, range(16))
    allocator.allocate(first, 16, num_computed_tokens=0)
    allocator.cache_full_blocks(first, 16)
    allocator.free_out_of_window_blocks(first, 1, 12)
    match = allocator.match_prefix(make_request(2, range(17)))
    assert match.num_tokens == 16
    assert match.blocks[1][:3] == (0, 0, 0) and match.blocks[1][3] != 0
    assert len(match.blocks[0]) == 4 and 0 not in match.blocks[0]


def test_all_groups_find_the_same_number_of_tokens():
    allocator = make((KVGroup(window=5), KVGroup()), num_blocks=9)
    first = make_request(1, range(16))
    allocator.allocate(first, 16, num_computed_tokens=0)
    allocator.cache_full_blocks(first, 16)
    debug = allocator.debug_state()
    debug.pools[0].evict_block(debug.tables[1][0][3])
    assert allocator.match_prefix(make_request(2, range(17))).num_tokens == 12
    debug.pools[1].evict_block(debug.tables[1][1][1])
    match = allocator.match_prefix(make_request(2, range(17)))
    assert match.num_tokens == 4 and [len(blocks) for blocks in match.blocks] == [1, 1]


def test_a_fork_past_the_window_is_refused():
    allocator = make((KVGroup(window=4),))
    parent, child = make_request(1, range(30)), make_request(2, range(10))
    allocator.allocate(parent, 30, num_computed_tokens=0)
    allocator.free_out_of_window_blocks(parent, 0, 27)
    free = allocator.num_free_blocks()
    assert allocator.fork_blocks(parent, child, 9) is None
    allocator.free(child)
    assert allocator.num_free_blocks() == free, "a refused fork references nothing"
    allocator.check_integrity()


def test_without_caching_nothing_is_found():
    allocator = make(prefix_caching=False)
    serve(allocator, make_request(1, range(8)))
    assert allocator.match_prefix(make_request(2, range(9))).num_tokens == 0
    assert allocator.stats().num_cached == 0


def test_stats_count_what_was_looked_up_for_requests_that_got_blocks():
    allocator = make()
    serve(allocator, make_request(1, range(8)))
    serve(allocator, make_request(2, range(9)))
    allocator.match_prefix(make_request(3, range(9)))
    stats = allocator.stats()
    assert (stats.num_blocks, stats.num_free, stats.prefix_queries, stats.prefix_hits) == (15, 15, 17, 8)


def test_the_chain_covers_everything_before():
    allocator = make()
    a, b = make_request(1, [1] * 4 + [2] * 4), make_request(2, [2] * 4 + [2] * 4)
    for each in (a, b):
        serve(allocator, each)
    assert len({*a.block_hashes, *b.block_hashes}) == 4


def test_the_free_list_is_a_queue():
    pool = BlockPool(5)
    assert pool.list_free_blocks() == [1, 2, 3, 4]
    blocks = pool.allocate_blocks(3)
    pool.insert_cached(2, b"two")
    pool.drop_references(blocks)
    assert pool.list_free_blocks() == [3, 1, 4, 2] and pool.num_free == 4
    assert pool.allocate_blocks(4) == [3, 1, 4, 2] and pool.cached_blocks == {}


def test_what_is_cached_of_waiting_requests_is_counted_anew_as_blocks_come_and_go():
    rng = random.Random(0)
    allocator = make(num_blocks=24)
    prompts = [[rng.randrange(3) for _ in range(4)] * 2 + [rng.randrange(2)] * 8 for _ in range(12)]
    waiting = [make_request(number, prompt) for number, prompt in enumerate(prompts)]
    counts = set()
    for number in range(200):
        if number % 7 == 0:  # preempted, it waits with more tokens than before
            allocator.free(waiting[number % len(waiting)])
            waiting[number % len(waiting)].token_ids.append(rng.randrange(2))
        serve(allocator, make_request(100 + number, rng.choice(prompts)[: rng.randrange(4, 17)]))
        counted = allocator.count_cached_tokens(waiting)
        assert counted == [allocator.match_prefix(request).num_tokens for request in waiting]
        counts.update(counted)
    assert len(counts) >= 4


def test_requests_that_were_served_watch_no_cached_prefix_for_ever(monkeypatch):
    monkeypatch.setattr("quire.plugins.kv.paged._MAX_WATCHES", 40)
    allocator, prefix = make(num_blocks=24), [*range(8)]
    serve(allocator, make_request(0, prefix))
    for number in range(1, 200):
        request = make_request(number, [*prefix, 100 + number, 9, 9, 9, 9])
        assert allocator.count_cached_tokens([request]) == [8]
        serve(allocator, request)
    assert allocator.debug_state().num_watches <= 42
