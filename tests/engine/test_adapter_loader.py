"""What is in host memory, while nothing steps."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

from quire.core.adapters import AdapterRef
from quire.core.config import AdapterConfig
from quire.core.contracts.kv import KVGroup
from quire.core.engine.adapter_loader import AdapterLoader
from quire.core.testing.simulated_engine import SimulatedEngine
from quire.plugins.kv.paged import PagedAllocator
from quire.plugins.sched.fcfs import FCFSPolicy


class Workers:
    """Two ranks that read at once."""

    def __init__(self) -> None:
        self.held: set[int] = set()

    def collective_rpc(self, method: str, arguments: Mapping[str, Any]) -> list[Any]:
        if method == "stage_adapter":
            self.held.add(arguments["adapter_id"])
        elif method == "forget_adapter":
            self.held.discard(arguments["adapter_id"])
        return [True, True]


def test_an_adapter_is_added_though_all_in_host_memory_are_waited_for() -> None:
    """Whoever adds it may be what steps the engine: waiting for a slot to be free would be waiting for ever."""
    engine = SimulatedEngine(PagedAllocator((KVGroup(),), 32, 4), FCFSPolicy(), FCFSPolicy(), max_loras=1)
    slots, workers, clock = engine.scheduler.adapter_slots, Workers(), itertools.count(10_000_000, 10_000_000)
    assert slots is not None
    running, waiting, added = (AdapterRef(number, str(number), "/", str(number)) for number in (1, 2, 3))
    engine.add_request("running", [1, 2, 3], adapter=running, max_tokens=20)
    engine.run_step()
    engine.add_request("waiting", [1, 2, 3], adapter=waiting, max_tokens=2)
    loader = AdapterLoader(
        AdapterConfig(max_loras=1, max_lora_rank=8, max_cpu_loras=1),
        slots,
        workers,  # type: ignore[arg-type]  # all that is called of an executor
        lambda adapter_id, error: None,
        lambda: next(clock),
    )
    loader.advance()
    assert workers.held == {2}
    assert any(loader.add_adapter(added) for _ in range(5))
    assert workers.held == {3}, "no more than --max-cpu-loras"
    loader.advance()
    assert workers.held == {2}, "that which is waited for is read again"
