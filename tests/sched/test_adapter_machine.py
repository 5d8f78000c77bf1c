"""The scheduler under random traffic with adapters that are loaded, unloaded and reloaded with other weights.

What ``SchedulerMachine`` checks of tokens and blocks holds here too: tokens and keys depend on what a request's slot
holds when they are computed, so a slot that is given away too early is a wrong token, and a prefix that crosses
adapters a wrong key. Run as a script (``make loras``), this makes ten thousand events.
"""

import contextlib
import itertools

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, precondition, rule, run_state_machine_as_test

from quire.core.adapters import AdapterRef
from quire.core.config import SchedulerConfig, SpeculationConfig
from quire.core.contracts.kv import KVGroup
from quire.core.errors import QueueFullError
from quire.core.testing.simulated_engine import SimulatedEngine
from quire.plugins.kv.paged import PagedAllocator
from quire.plugins.sched.fcfs import FCFSPolicy
from quire.plugins.spec_decode.suffix import SuffixProposer

from .test_scheduler_machine import MAX_MODEL_LEN, VOCAB, SchedulerMachine, prompts

NAMES = ("json", "upper", "route", "extract")


class AdapterMachine(SchedulerMachine):
    @initialize(
        num_slots=st.integers(1, 3),
        staging_turns=st.sampled_from([0, 0, 1, 5]),
        spare=st.integers(0, 24),
        rows=st.integers(1, 6),
        budget=st.one_of(st.none(), st.integers(1, 40)),
        depth=st.sampled_from([1, 2, 2, 3]),
        drafts=st.sampled_from([0, 0, 3]),
        on_host=st.booleans(),
        max_wait_ns=st.sampled_from([1, 20_000_000, 10**9]),
    )
    def start(self, num_slots, staging_turns, spare, rows, budget, depth, drafts, on_host, max_wait_ns):
        self.is_trusted = True
        self.num_blocks = MAX_MODEL_LEN // 2 + 1 + spare
        self.engine = SimulatedEngine(
            PagedAllocator((KVGroup(),), self.num_blocks, 2, prefix_caching=True),
            FCFSPolicy(),
            FCFSPolicy(),
            config=SchedulerConfig(rows, budget or MAX_MODEL_LEN, chunked_prefill=budget is not None),
            max_model_len=MAX_MODEL_LEN,
            vocab_size=VOCAB,
            max_in_flight=depth,
            speculation=SpeculationConfig(drafts) if drafts else None,
            proposer=SuffixProposer(drafts) if on_host and drafts else None,
            max_loras=num_slots,
            staging_turns=staging_turns,
        )
        self.slots.max_wait_ns = max_wait_ns
        self.count = 0
        self.ids = itertools.count(1)
        self.loaded = {}

    @property
    def slots(self):
        return self.engine.scheduler.adapter_slots

    def teardown(self):
        """When all is unloaded and done, nothing of any adapter is left."""
        if not hasattr(self, "engine"):
            return
        super().teardown()
        for name in list(self.loaded):
            self.unload(name)
        for _ in range(2):
            self.engine.run_step()
        assert not self.slots.has_pending
        assert not self.engine.worker.loaded_adapters
        assert not self.slots.list_activity()
        assert self.slots.stats()["lora_adapters_in_slots"] == 0
        assert not self.slots.is_known(1)

    @rule(name=st.sampled_from(NAMES), content=st.integers(0, 2))
    def load(self, name, content):
        """Under a name that is taken it replaces what is there; equal content is the same adapter to the cache."""
        if name in self.loaded:
            self.slots.retire_adapter(self.loaded[name].adapter_id)
        self.loaded[name] = AdapterRef(next(self.ids), name, f"/{name}", f"content {content}")
        self.slots.add_adapter(self.loaded[name])

    @rule(name=st.sampled_from(NAMES))
    def unload(self, name):
        if name in self.loaded:
            self.slots.retire_adapter(self.loaded.pop(name).adapter_id)

    @rule(
        prompt=prompts,
        family=st.sampled_from([1, 1, 1, 2, 3]),
        max_tokens=st.integers(1, 12),
        priority=st.integers(-1, 1),
        data=st.data(),
    )
    @precondition(lambda self: self.loaded)
    def arrive_for_an_adapter(self, prompt, family, max_tokens, data, **params):
        adapter = self.loaded[data.draw(st.sampled_from(sorted(self.loaded)))]
        first = f"r{self.count}"
        for member in range(family):
            parent = first if member else None
            with contextlib.suppress(QueueFullError):  # an adversary took over
                self.engine.add_request(
                    f"r{self.count}", prompt, parent=parent, adapter=adapter, max_tokens=max_tokens, **params
                )
            self.count += 1


TestAdapters = AdapterMachine.TestCase
TestAdapters.settings = settings(max_examples=12, stateful_step_count=40)

if __name__ == "__main__":
    run_state_machine_as_test(AdapterMachine, settings=settings(max_examples=250, stateful_step_count=40))
