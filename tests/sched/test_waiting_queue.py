"""The waiting queue against a sorted list."""

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from quire.core.messages import EngineCoreRequest
from quire.core.request import Request
from quire.core.sampling_params import SamplingParams
from quire.core.sched.waiting_queue import WaitingQueue

FRONT = 4


def make_request(number, key=0):
    message = EngineCoreRequest(number, list(range(1 + number % 7)), SamplingParams(), number, priority=key)
    request = Request(message, 64)
    request.queue_key = ((key,), number)
    return request


class QueueMachine(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.queue = WaitingQueue(block_size=4, max_visible=FRONT)
        self.ready, self.parked = [], []
        self.count = 0

    @rule(key=st.integers(-3, 3), parked=st.booleans())
    def arrive(self, key, parked):
        request = make_request(self.count, key)
        self.count += 1
        if parked:
            self.queue.park_request(request)
            self.parked.append(request)
        else:
            self.queue.add_request(request)
            self.ready.append(request)

    @rule(data=st.data(), back=st.booleans())
    @precondition(lambda self: self.ready)
    def leave(self, data, back):
        request = data.draw(st.sampled_from(self.ready))
        self.queue.remove_request(request)
        if back:  # as after a preemption: with the rank it had
            self.queue.add_request(request)
        else:
            self.ready.remove(request)

    @rule(data=st.data(), stays=st.booleans())
    @precondition(lambda self: self.parked)
    def unpark(self, data, stays):
        request = data.draw(st.sampled_from(self.parked))
        self.parked.remove(request)
        if stays:
            self.queue.unpark_request(request)
            self.ready.append(request)
        else:
            self.queue.remove_request(request)

    @rule()
    def resort(self):
        for request in self.ready + self.parked:
            (key,), number = request.queue_key
            request.queue_key = ((-key,), number)
        self.queue.reorder_requests()

    @invariant()
    def is_a_sorted_list(self):
        best = sorted(self.ready, key=lambda request: request.queue_key)[:FRONT]
        assert self.queue.peek_requests(FRONT) == best
        assert self.queue.peek_requests(2) == best[:2]
        assert self.queue.num_ready == len(self.ready)
        assert len(self.queue) == len(self.ready) + len(self.parked)
        assert set(self.queue) == {*self.ready, *self.parked}
        view = self.queue.view_columns(self.queue.count_remaining_tokens(FRONT))
        assert view.prompt_len.tolist() == [request.prompt_len for request in best]
        assert view.num_remaining_tokens.tolist() == [request.num_tokens for request in best]
        assert view.priority.tolist() == [request.priority for request in best]


TestQueue = QueueMachine.TestCase
TestQueue.settings = settings(max_examples=60, stateful_step_count=40)


class GroupedQueueMachine(RuleBasedStateMachine):
    """Several groups: of each, the policy sees the first few, whatever was seen before."""

    def __init__(self):
        super().__init__()
        self.queue = WaitingQueue(block_size=4, max_visible=6)
        self.groups = {}
        self.count = 0

    @rule(group=st.integers(0, 8), key=st.integers(-3, 3), many=st.integers(1, 9))
    def arrive(self, group, key, many):
        for _ in range(many):
            request = make_request(self.count, key)
            request.group_index = group
            self.count += 1
            self.queue.add_request(request)
            self.groups.setdefault(group, []).append(request)

    @rule(data=st.data(), back=st.booleans())
    @precondition(lambda self: self.groups)
    def leave(self, data, back):
        group = data.draw(st.sampled_from(sorted(self.groups)))
        request = data.draw(st.sampled_from(self.groups[group]))
        self.queue.remove_request(request)
        if back:
            self.queue.add_request(request)
        else:
            self.groups[group].remove(request)
            if not self.groups[group]:
                del self.groups[group]

    @rule(data=st.data())
    @precondition(lambda self: len(self.groups) > 1)
    def regroup(self, data):
        """As when another policy takes over."""
        moved = [request for requests in self.groups.values() for request in requests]
        self.groups = {}
        for request in moved:
            request.group_index = data.draw(st.integers(0, 3))
            self.groups.setdefault(request.group_index, []).append(request)
        self.queue.reorder_requests()

    @rule(limit=st.integers(1, 6))
    def look(self, limit):
        seen = self.queue.peek_requests(limit)
        by_group = {}
        for request in seen:
            by_group.setdefault(request.group_index, []).append(request)
        for group, requests in by_group.items():
            assert requests == sorted(self.groups[group], key=lambda request: request.queue_key)[: len(requests)]
        assert len(seen) <= limit and len(by_group) == min(len(self.groups), limit)
        columns = self.queue.view_columns(self.queue.count_remaining_tokens(limit))
        assert columns.group.tolist() == [request.group_index for request in seen]

    @invariant()
    def nothing_is_lost(self):
        everyone = [request for requests in self.groups.values() for request in requests]
        assert self.queue.num_ready == len(self.queue) == len(everyone)
        assert set(self.queue) == set(everyone)


TestGroupedQueue = GroupedQueueMachine.TestCase
TestGroupedQueue.settings = settings(max_examples=60, stateful_step_count=30)


def test_groups_take_turns_where_not_all_can_be_seen():
    queue = WaitingQueue(block_size=4, max_visible=FRONT)
    for number in range(200):
        request = make_request(number)
        request.group_index = number % 20
        queue.add_request(request)
    served = []
    while queue.num_ready:
        (first, *_) = queue.peek_requests(FRONT)
        served.append(first.group_index)
        queue.remove_request(first)
    assert sorted(served[:20]) == list(range(20)), "no group is served twice before each was served once"


def test_removed_requests_do_not_pile_up():
    queue = WaitingQueue(block_size=4, max_visible=FRONT)
    requests = [make_request(number) for number in range(5000)]
    for request in requests:
        queue.add_request(request)
    for request in requests[10:4990]:
        queue.remove_request(request)
    assert queue.num_heap_entries < 200
    assert queue.peek_requests(FRONT) == requests[:FRONT]


def test_columns_are_read_only_and_made_on_demand():
    queue = WaitingQueue(block_size=4)
    queue.add_request(make_request(5))
    view = queue.view_columns(queue.count_remaining_tokens(10))
    assert len(view) == 1 and "num_computed_tokens" not in vars(view)
    for name in type(view).__mro__[1].__annotations__:
        column = getattr(view, name)
        assert column.dtype == np.int64 and len(column) == 1 and not column.flags.writeable, name
    assert view.num_needed_blocks.tolist() == [2] and view.num_held_blocks.tolist() == [0]
