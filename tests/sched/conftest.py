import pytest

from quire.core.config import SchedulerConfig
from quire.core.contracts.kv import KVGroup
from quire.core.testing.simulated_engine import SimulatedEngine
from quire.plugins.kv.paged import PagedAllocator
from quire.plugins.sched.fcfs import FCFSPolicy


@pytest.fixture
def make_engine():
    """Makes simulated engines on the paged allocator; the policy is first come, first served unless one is given."""

    def make(
        policy=None,
        *,
        groups=(KVGroup(),),
        num_blocks=64,
        block_size=4,
        prefix_caching=True,
        rows=8,
        budget=32,
        chunked=True,
        max_queued=None,
        **sizes,
    ):
        allocator = PagedAllocator(groups, num_blocks, block_size, prefix_caching=prefix_caching)
        config = SchedulerConfig(rows, budget, chunked, max_queued)
        return SimulatedEngine(allocator, policy or FCFSPolicy(), FCFSPolicy(), config=config, **sizes)

    return make
