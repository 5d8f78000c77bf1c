"""The paged allocator against a model of what each block holds: hypothesis looks for the sequence that breaks it."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule

from quire.core.contracts.kv import KVGroup
from quire.core.messages import EngineCoreRequest
from quire.core.request import Request
from quire.core.sampling_params import SamplingParams
from quire.plugins.kv.paged import PagedAllocator

GROUPS = [(KVGroup(),), (KVGroup(), KVGroup(window=5)), (KVGroup(window=3),)]


class PagedMachine(RuleBasedStateMachine):
    """Contents are modelled as text: slot -> all tokens up to it. A write into a slot that another request still reads,
    or a match that leads to other contents, is found when the readers are checked."""

    requests = Bundle("requests")

    @initialize(groups=st.sampled_from(GROUPS), size=st.sampled_from([1, 2, 3]), blocks=st.integers(6, 24))
    def start(self, groups, size, blocks):
        self.allocator = PagedAllocator(groups, blocks, size)
        self.size, self.blocks, self.groups = size, blocks, groups
        self.slots = [{} for _ in groups]
        self.tables, self.computed, self.first_kept = {}, {}, {}
        self.count = 0

    @rule(target=requests, tokens=st.lists(st.integers(0, 1), min_size=1, max_size=14), reserve=st.integers(0, 3))
    def arrive(self, tokens, reserve):
        request = self.request(tokens)
        before = self.picture()
        match = self.allocator.match_prefix(request)
        assert self.picture() == before
        assert match.num_tokens < len(tokens) and match.num_tokens % self.size == 0
        allocation = self.allocator.allocate(
            request, len(tokens), num_computed_tokens=match.num_tokens, prefix_match=match, num_reserved_blocks=reserve
        )
        if allocation is None:
            assert self.picture() == before
            return multiple()
        assert self.allocator.num_free_blocks() >= reserve
        self.tables[request] = [{} for _ in self.groups]
        self.first_kept[request] = [self.first_read(group, match.num_tokens) for group in self.groups]
        self.apply(request, allocation)
        self.write(request, match.num_tokens, len(tokens))
        return request

    @rule(request=requests, tokens=st.lists(st.integers(0, 1), min_size=1, max_size=5))
    def grow(self, request, tokens):
        computed = self.computed[request]
        before = self.picture()
        request.token_ids += tokens
        allocation = self.allocator.allocate(request, computed + len(tokens), num_computed_tokens=computed)
        if allocation is None:
            assert self.picture() == before
            del request.token_ids[computed:]
        else:
            self.apply(request, allocation)
            self.write(request, computed, computed + len(tokens))

    @rule(request=requests, late=st.integers(0, 4))
    def cache(self, request, late):
        self.allocator.cache_full_blocks(request, max(self.computed[request] - late, 0))

    @rule(target=requests, parent=requests, late=st.integers(0, 2))
    def fork(self, parent, late):
        length = self.computed[parent] - late
        if length < 1:
            return multiple()
        child = self.request(parent.token_ids[:length])
        before = self.picture()
        allocation = self.allocator.fork_blocks(parent, child, length)
        if allocation is None:
            assert self.picture() == before
            assert any(group.window is not None for group in self.groups)
            return multiple()
        self.tables[child] = [{} for _ in self.groups]
        self.first_kept[child] = [
            max(first, self.first_read(group, length))
            for group, first in zip(self.groups, self.first_kept[parent], strict=True)
        ]
        self.computed[child] = length
        self.apply(child, allocation)
        return child

    @rule(request=requests)
    def free_out_of_window(self, request):
        for index, group in enumerate(self.groups):
            if group.window is not None:
                before = self.first_read(group, self.computed[request])
                self.allocator.free_out_of_window_blocks(request, index, before)
                self.first_kept[request][index] = max(self.first_kept[request][index], before)

    @rule(request=consumes(requests))
    def free(self, request):
        self.allocator.free(request)
        self.allocator.free(request)
        del self.tables[request], self.computed[request], self.first_kept[request]

    @invariant()
    def sound(self):
        if not hasattr(self, "allocator"):
            return
        self.allocator.check_integrity()
        for request, tables in self.tables.items():
            for index, table in enumerate(tables):
                for position in range(self.first_kept[request][index], self.computed[request]):
                    slot = table[position // self.size] * self.size + position % self.size
                    assert self.slots[index].get(slot) == tuple(request.token_ids[: position + 1])

    def teardown(self):
        if hasattr(self, "allocator"):
            for request in self.tables:
                self.allocator.free(request)
            assert self.allocator.num_free_blocks() == self.blocks - 1
            self.allocator.check_integrity()

    def request(self, tokens):
        self.count += 1
        return Request(EngineCoreRequest(self.count, list(tokens), SamplingParams(), 0), 1024)

    def picture(self):
        pools = self.allocator.debug_state().pools
        return [(list(p.ref_counts), list(p.block_hashes), p.list_free_blocks(), p.num_free) for p in pools]

    def first_read(self, group, computed):
        return 0 if group.window is None else max(computed - group.window + 1, 0)

    def apply(self, request, allocation):
        for table, start, blocks in zip(self.tables[request], allocation.starts, allocation.new_blocks, strict=True):
            table.update(enumerate(blocks, start))
        for group, source, destination in allocation.copies:
            for offset in range(self.size):
                text = self.slots[group].get(source * self.size + offset)
                self.slots[group][destination * self.size + offset] = text

    def write(self, request, start, end):
        for index, table in enumerate(self.tables[request]):
            for position in range(start, end):
                block = table[position // self.size]
                assert block != 0, "the null block was written"
                self.slots[index][block * self.size + position % self.size] = tuple(request.token_ids[: position + 1])
        self.computed[request] = end


TestPaged = PagedMachine.TestCase
TestPaged.settings = settings(max_examples=100, stateful_step_count=40)
