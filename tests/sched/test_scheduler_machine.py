"""Scheduler, allocator and an in-order worker under random traffic: hypothesis looks for the sequence that breaks them.

The worker checks every read against what must be there; the simulated engine every token against what the request
would receive alone; the invariants here look into the allocator.
"""

import contextlib
from collections import Counter

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from quire.core.config import SchedulerConfig, SpeculationConfig
from quire.core.contracts.kv import KVGroup
from quire.core.contracts.spec_decode import HostProposer
from quire.core.errors import QueueFullError
from quire.core.scheduling_params import SchedulingParams
from quire.core.testing.fake_kv_worker import compute_expected_tokens
from quire.core.testing.simulated_engine import SimulatedEngine
from quire.plugins.kv.paged import PagedAllocator
from quire.plugins.sched.fcfs import FCFSPolicy

from .adversary import Adversary
from .test_conformance import BUNDLED

MAX_MODEL_LEN = 32
VOCAB = 12  # small, so that stop tokens are drawn
POLICIES = [*BUNDLED.values(), Adversary]
GROUPS = [(KVGroup(),), (KVGroup(), KVGroup(window=6)), (KVGroup(window=5),), (KVGroup(), KVGroup())]

prompts = st.one_of(
    st.lists(st.integers(0, 1), min_size=1, max_size=20),
    st.integers(1, 24).map(lambda length: [7] * length),
)


class OracleProposer(HostProposer):
    """Knows what the model will say, and is wrong about every third token."""

    def propose(self, request, num_tokens):
        right = compute_expected_tokens(request.seed, request.token_ids, num_tokens, VOCAB)
        return [token + ((request.num_tokens + i) % 3 == 0) for i, token in enumerate(right)]


class SchedulerMachine(RuleBasedStateMachine):
    @initialize(
        groups=st.sampled_from(GROUPS),
        block_size=st.sampled_from([1, 2, 4]),
        spare=st.integers(0, 24),
        caching=st.booleans(),
        rows=st.integers(1, 6),
        budget=st.one_of(st.none(), st.integers(1, 40)),
        watermark=st.sampled_from([0.0, 0.1, 0.3]),
        policy=st.sampled_from(POLICIES),
        seed=st.integers(0, 2**32 - 1),
        depth=st.sampled_from([1, 2, 2, 3]),
        stages=st.sampled_from([1, 1, 1, 2, 3]),
        drafts=st.sampled_from([0, 0, 1, 3, 5]),
        skill=st.sampled_from([0.0, 0.6, 1.0]),
        on_host=st.booleans(),
    )
    def start(
        self,
        groups,
        block_size,
        spare,
        caching,
        rows,
        budget,
        watermark,
        policy,
        seed,
        depth,
        stages,
        drafts,
        skill,
        on_host,
    ):
        """The pool holds one request of full length and a little more; without a budget, prompts go whole."""
        self.is_trusted = policy is not Adversary
        self.num_blocks = -(-MAX_MODEL_LEN // block_size) + 1 + spare
        allocator = PagedAllocator(groups, self.num_blocks, block_size, prefix_caching=caching)
        self.engine = SimulatedEngine(
            allocator,
            policy() if policy is not Adversary else Adversary(seed),
            FCFSPolicy(),
            config=SchedulerConfig(rows, budget or MAX_MODEL_LEN, chunked_prefill=budget is not None),
            watermark=watermark,
            max_model_len=MAX_MODEL_LEN,
            vocab_size=VOCAB,
            max_in_flight=depth if stages == 1 else stages + 1,
            num_stages=stages,
            speculation=SpeculationConfig(drafts, adaptive=drafts == 5) if drafts else None,
            proposer=OracleProposer(drafts) if on_host else None,
            draft_accuracy=skill,
        )
        self.count = 0

    def teardown(self):
        """Whatever happened, every request is served in the end and every block comes back."""
        if not hasattr(self, "engine"):
            return
        engine = self.engine
        engine.run_until_finished(limit=200 + 40 * MAX_MODEL_LEN * max(self.count, 1))
        self.sound()
        assert engine.finished.keys() == engine.received.keys()
        assert engine.allocator.num_free_blocks() == self.num_blocks - 1
        assert engine.scheduler.num_running == engine.scheduler.num_waiting == 0
        assert engine.scheduler.stats()["plugin_quarantines_total"] == 0 or not self.is_trusted

    @property
    def alive(self):
        return [name for name in self.engine.received if name not in self.engine.finished]

    @rule(
        prompt=prompts,
        family=st.sampled_from([1, 1, 1, 2, 3]),
        max_tokens=st.one_of(st.none(), st.integers(1, 16)),
        eos=st.lists(st.integers(0, VOCAB - 1), max_size=2),
        stops=st.lists(st.integers(0, VOCAB - 1), max_size=2),
        min_tokens=st.integers(0, 4),
        priority=st.integers(-1, 1),
        salt=st.sampled_from([None, None, "salt"]),
        prompt_logprobs=st.sampled_from([None, None, None, 1]),
        scheduling=st.builds(
            SchedulingParams,
            group=st.sampled_from([None, "a", "b", "c"]),
            deadline_ms=st.sampled_from([None, 5, 1e6]),
            predicted_tokens=st.sampled_from([None, 1, 9]),
            tpot_target_ms=st.sampled_from([None, 1]),
        ),
    )
    def arrive(self, prompt, family, max_tokens, min_tokens, stops, **params):
        first = f"r{self.count}"
        for member in range(family):
            try:
                self.engine.add_request(
                    f"r{self.count}",
                    prompt,
                    parent=first if member else None,
                    max_tokens=max_tokens,
                    min_tokens=min(min_tokens, max_tokens or MAX_MODEL_LEN),
                    stop_token_ids=stops,
                    **params,
                )
            except QueueFullError:
                assert not self.is_trusted, "it was rejected, and nothing is left of it"
            self.count += 1

    @rule(data=st.data())
    @precondition(lambda self: self.alive)
    def abort(self, data):
        self.engine.abort_request(data.draw(st.sampled_from(self.alive)))

    @rule()
    def launch(self):
        self.engine.launch_step()

    @rule(read_differences=st.booleans())
    def run_out_of_memory(self, read_differences):
        self.engine.launch_step_out_of_memory(read_differences=read_differences)

    @rule(read_differences=st.booleans())
    def fail(self, read_differences):
        self.engine.launch_failing_step(read_differences=read_differences)

    @rule()
    @precondition(lambda self: self.engine.in_flight)
    def finish(self):
        self.engine.finish_step()

    @rule(
        prompt=st.lists(st.integers(0, 1), min_size=4, max_size=20),
        family=st.integers(2, 3),
        read_differences=st.booleans(),
        then=st.sampled_from(["finish", "abort", "out of memory"]),
    )
    def prompt_fails_under_its_children(self, prompt, family, read_differences, then):
        """Those that could be admitted share the prompt before it is known to have failed."""
        first = f"r{self.count}"
        for _ in range(family):
            name = f"r{self.count}"
            with contextlib.suppress(QueueFullError):
                self.engine.add_request(name, prompt, parent=None if name == first else first, max_tokens=4)
            self.count += 1
        self.engine.launch_failing_step(read_differences=read_differences)
        self.engine.launch_step()
        if then == "abort" and first in self.alive:
            self.engine.abort_request(first)
        elif then == "out of memory":
            self.engine.launch_step_out_of_memory(read_differences=read_differences)

    @rule(policy=st.sampled_from(POLICIES), seed=st.integers(0, 2**32 - 1))
    def another_policy_takes_over(self, policy, seed):
        self.is_trusted &= policy is not Adversary
        self.engine.scheduler.policy_runner.replace_policy(
            policy() if policy is not Adversary else Adversary(seed), "next"
        )

    @rule(turns=st.integers(1, 12))
    def serve(self, turns):
        for _ in range(turns):
            self.engine.run_step()

    @invariant()
    def sound(self):
        """Counts are exact; a block that a running request will write is its own and not in the prefix cache; and what
        a failed step was to write is not there either."""
        if not hasattr(self, "engine"):
            return
        allocator, scheduler = self.engine.allocator, self.engine.scheduler
        table, blocks = scheduler.debug_state().running, allocator.debug_state()
        allocator.check_integrity()
        for group, pool in enumerate(blocks.pools):
            for block in pool.cached_blocks.values():
                assert not self.engine.worker.holds_garbage(group, block), f"block {block} is cached and not computed"
            writable = Counter()
            for row in table.rows.tolist():
                computed = int(table.num_computed_tokens[row] - table.max_overcount[row])
                for block in blocks.tables[table.request_ids[row]][group][computed // allocator.block_size :]:
                    writable[block] += 1
                    assert pool.ref_counts[block] == 1, f"block {block} is writable and shared"
                    assert pool.block_hashes[block] is None, f"block {block} is writable and cached"
            assert not writable or max(writable.values()) == 1, "a block is writable by two requests"
        running = [table.get_request(row) for row in table.rows.tolist()]
        assert [request.row for request in running] == table.rows.tolist()
        running_ids = {request.request_id for request in running}
        assert blocks.tables.keys() == running_ids, "a request holds blocks without running"
        assert len(running_ids) + scheduler.num_waiting == len(self.alive), "a request was lost"


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(max_examples=120, stateful_step_count=40)
