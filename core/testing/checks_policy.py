"""What every batching policy must do."""

from __future__ import annotations

import logging
import random
from time import perf_counter
from typing import Any

import numpy as np

from quire.core.config import SchedulerConfig
from quire.core.contracts.kv import KVAllocator, KVGroup
from quire.core.contracts.policy import (
    NO_DEADLINE,
    BatchingPolicy,
    GroupColumns,
    Reject,
    RequestColumns,
    RequestInfo,
    StepView,
    Usage,
)
from quire.core.plugin.manager import PluginManager
from quire.core.plugin.options import parse_options
from quire.core.sched.checked_plan import PlanLimits, check_grants
from quire.core.sched.policy_guard import promises_equal_plans
from quire.core.scheduling_params import SchedulingParams
from quire.core.testing.simulated_engine import SimulatedEngine

__all__ = [
    "check_an_idle_engine_is_put_to_work",
    "check_decodes_are_granted_as_promised",
    "check_keys_can_be_compared",
    "check_plans_are_deterministic",
    "check_plans_are_quick",
    "check_plans_are_sound",
    "check_preempted_requests_finish",
    "check_request_finished_accepts_any_request",
    "check_requests_finish",
]


def check_keys_can_be_compared(cls: type[BatchingPolicy]) -> None:
    """Admission keys are tuples of one shape, in one order with each other, and follow from the history alone."""
    policy, other = _make(cls), _make(cls)
    keys = []
    for i in range(50):
        info = _info(i)
        key, same = policy.admission_key(info), other.admission_key(info)
        assert type(key) is type(same), "two instances with one history disagree"
        if not isinstance(key, Reject):
            group = policy.group_key(info)
            assert isinstance(group, str | int | None), f"group_key returned {group!r}"
            assert group == other.group_key(info), "two instances with one history disagree"
        if not isinstance(key, Reject):
            assert isinstance(key, tuple), f"admission_key returned {key!r}, not a tuple"
            assert key == same, "two instances with one history disagree"
            keys.append(key)
    keys.sort()
    assert len({tuple(isinstance(part, str) for part in key) for key in keys}) <= 1, "keys differ in shape"


def check_plans_are_sound(cls: type[BatchingPolicy]) -> None:
    """Grants name requests of the view, each once, are not negative, and leave the view as it is."""
    policy = _make(cls)
    for seed in range(100):
        result = check_grants(policy.schedule(_view(seed)), PlanLimits.from_view(_view(seed)))
        assert not isinstance(result, str), f"view {seed}: {result}"


def check_plans_are_deterministic(cls: type[BatchingPolicy]) -> None:
    """Two instances that see the same views return the same grants."""
    one, two = _make(cls), _make(cls)
    for seed in range(50):
        first, second = one.schedule(_view(seed)), two.schedule(_view(seed))
        same = np.array_equal(first.request_indices, second.request_indices) and np.array_equal(
            first.num_scheduled_tokens, second.num_scheduled_tokens
        )
        assert same, f"view {seed}: two instances disagree"


def check_an_idle_engine_is_put_to_work(cls: type[BatchingPolicy]) -> None:
    """With nothing in flight and something to do, the policy grants or refuses something."""
    policy = _make(cls)
    for seed in range(50):
        grants = policy.schedule(_view(seed, idle=True))
        assert grants.refusals or int(np.sum(grants.num_scheduled_tokens)) > 0, (
            f"view {seed}: nothing was granted to an idle engine"
        )


def check_decodes_are_granted_as_promised(cls: type[BatchingPolicy]) -> None:
    """With ``changes_only_at_events``, running requests that all decode get a token each, beside no waiting request."""
    policy = _make(cls)
    for seed in range(50 if promises_equal_plans(policy) else 0):
        view = _view(seed, num_running=seed % 9, num_waiting=0, only_decodes=True)
        plan = check_grants(policy.schedule(view), PlanLimits.from_view(view))
        assert not isinstance(plan, str), f"view {seed}: {plan}"
        runnable = view.running.num_remaining_tokens.nonzero()[0]
        same = np.array_equal(np.sort(plan.request_indices), runnable) and (plan.num_scheduled_tokens == 1).all()
        assert same and not plan.victims, f"view {seed}: other grants than a token for each, although it promises them"


def check_plans_are_quick(cls: type[BatchingPolicy]) -> None:
    """``schedule`` for 256 running and 512 waiting requests takes well under the limit of 50 ms."""
    policy = _make(cls)
    durations = []
    for seed in range(5):
        view = _view(seed, num_running=256, num_waiting=512)
        began = perf_counter()
        policy.schedule(view)
        durations.append(perf_counter() - began)
    assert min(durations) < 0.025, f"a plan took {min(durations) * 1e3:.0f} ms"


def check_requests_finish(cls: type[BatchingPolicy]) -> None:
    """Random traffic is served to its end, every token once and in order, without a quarantine."""
    for seed in range(4):
        _serve(cls, seed, num_blocks=200, chunked=seed % 2 == 0)


def check_preempted_requests_finish(cls: type[BatchingPolicy]) -> None:
    """The same on a pool so small that requests are preempted all the time."""
    for seed in range(4):
        _serve(cls, seed, num_blocks=24, chunked=True)


def check_request_finished_accepts_any_request(cls: type[BatchingPolicy]) -> None:
    """``request_finished`` may be called for any request, also one that never ran."""
    policy = _make(cls)
    for tokens in (0, 5):
        policy.request_finished(RequestInfo("r", 0, 10, 5, 0), Usage(10, 0, tokens, 0, tokens * 1000))


def _info(i: int) -> RequestInfo:
    """The ``i``-th of some requests that say much, little or nothing of themselves."""
    arrival_ns = 10**18 + i
    return RequestInfo(
        f"r{i}",
        arrival_ns,
        1 + i * 37 % 900,
        1 + i % 7,
        i % 5 - 2,
        None if i % 3 else "salt",
        request_number=i,
        group=(None, "a", "b")[i % 3],
        deadline_ns=NO_DEADLINE if i % 2 else arrival_ns + i * 10**6,
        ttft_target_ns=0 if i % 4 else 10**8,
        tpot_target_ns=0 if i % 4 else 10**7,
        predicted_tokens=i % 3,
        tags={} if i % 5 else {"tier": "gold"},
        num_cached_tokens=16 * (i % 3),
        prefix_hash=i % 4,
    )


def _make(cls: type[BatchingPolicy]) -> BatchingPolicy:
    return cls(parse_options(cls, {}))


def _serve(cls: type[BatchingPolicy], seed: int, *, num_blocks: int, chunked: bool) -> None:
    plugins = PluginManager()
    allocator_class: Any = plugins.load_class("kv", "paged")
    fallback: Any = plugins.load_class("policy", "fcfs")
    allocator: KVAllocator = allocator_class((KVGroup(),), num_blocks, 4)
    rng = random.Random(seed)
    config = SchedulerConfig(5, 20 if chunked else 80, chunked_prefill=chunked)
    engine = SimulatedEngine(allocator, _make(cls), fallback(), config=config, max_model_len=80)
    with _PluginFaults() as faults:
        for i in range(30):
            prompt = [rng.randrange(4) for _ in range(rng.randrange(1, 50))]
            scheduling = SchedulingParams(
                group=rng.choice([None, "a", "b"]),
                deadline_ms=rng.choice([None, 1e6]),
                predicted_tokens=rng.randrange(1, 9),
            )
            priority = rng.randrange(-2, 3)
            engine.add_request(
                f"r{i}", prompt, max_tokens=rng.randrange(1, 24), priority=priority, scheduling=scheduling
            )
            for _ in range(rng.randrange(4)):
                engine.run_step()
        engine.run_until_finished()
    assert len(engine.finished) == 30, "a request was lost"
    assert engine.scheduler.stats()["plugin_quarantines_total"] == 0, faults.first_line
    assert allocator.num_free_blocks() == num_blocks - 1


class _PluginFaults(logging.Handler):
    """What the log says of plugins that are quarantined."""

    first_line = ""

    def emit(self, record: logging.LogRecord) -> None:
        self.first_line = self.first_line or record.getMessage()

    def __enter__(self) -> _PluginFaults:
        logging.getLogger("quire.plugin").addHandler(self)
        return self

    def __exit__(self, *error: object) -> None:
        logging.getLogger("quire.plugin").removeHandler(self)


def _view(
    seed: int,
    *,
    idle: bool = False,
    num_running: int | None = None,
    num_waiting: int | None = None,
    only_decodes: bool = False,
) -> StepView:
    rng = np.random.default_rng(seed)
    running = int(rng.integers(0, 9)) if num_running is None else num_running
    waiting = int(rng.integers(running == 0, 9)) if num_waiting is None else num_waiting
    free_rows = int(rng.integers(1, 9)) if waiting else int(rng.integers(0, 9))
    return StepView(
        now_ns=10**18 + seed,
        token_budget=int(rng.integers(1, 65)) if num_running is None else 8192,
        num_free_rows=free_rows,
        num_free_blocks=int(rng.integers(8, 200)),
        block_size=16,
        running=_columns(rng, running, True, idle, 1.0 if only_decodes else 0.7),
        waiting=_columns(rng, waiting, False, idle),
        step=seed,
        groups=GroupColumns(("a", None, "b", 7), **dict(zip(_GROUP_COLUMNS, rng.integers(0, 99, (4, 4)), strict=True))),
    )


_GROUP_COLUMNS = ("num_running", "num_waiting", "num_prompt_tokens", "num_output_tokens")


def _columns(
    rng: np.random.Generator, count: int, running: bool, idle: bool, decoding_share: float = 0.7
) -> RequestColumns:
    prompt_len = rng.integers(1, 60, count)
    decoding = rng.random(count) < decoding_share if running else np.zeros(count, bool)
    output_len = np.where(decoding, rng.integers(1, 20, count), 0)
    computed = np.where(decoding, prompt_len + output_len - 1, (rng.random(count) * prompt_len).astype(np.int64))
    if not running:
        computed[:] = 0
    awaits_output = decoding & (rng.random(count) < (0.0 if idle else 0.2))
    remaining = np.where(awaits_output, 0, prompt_len + output_len - computed)
    arrival_ns = 10**18 - rng.integers(0, 10**9, count)
    deadline_ns = np.where(rng.random(count) < 0.5, NO_DEADLINE, arrival_ns + rng.integers(0, 10**10, count))
    return RequestColumns(
        request_number=rng.permutation(count) + (0 if running else 1000),
        group=rng.integers(0, 4, count),
        num_cached_tokens=np.where(rng.random(count) < 0.5, 0, prompt_len - 1) * (not running),
        predicted_tokens=rng.integers(0, 3, count),
        deadline_ns=deadline_ns,
        ttft_target_ns=rng.choice([0, 10**8], count),
        tpot_target_ns=rng.choice([0, 10**7], count),
        num_computed_tokens=computed,
        min_computed_tokens=computed.copy(),
        num_remaining_tokens=remaining,
        num_in_flight_tokens=np.where(decoding & (not idle), 1, 0),
        prompt_len=prompt_len,
        output_len=output_len,
        max_tokens=output_len + rng.integers(1, 20, count),
        priority=rng.integers(-2, 3, count),
        arrival_ns=arrival_ns,
        num_held_blocks=-(-computed // 16),
        num_needed_blocks=-(-(computed + remaining) // 16) - -(-computed // 16),
    )
