"""How the default plan divides a step: decodes go on, prompts end soon, and no request is left behind."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from quire.core.contracts.policy import RequestColumns, StepView
from quire.core.sched.default_policy_plan import MIN_PREFILL_TOKENS, make_default_plan


def view(running, waiting, budget, *, rows=256, chunked=True):
    """A step in which these numbers of tokens remain, running and waiting."""
    running, waiting = (RequestColumns(num_remaining_tokens=np.array(each, np.int64)) for each in (running, waiting))
    return StepView(0, budget, rows, 10_000, 16, running, waiting, chunked)


def granted(*args, **options):
    plan = make_default_plan(view(*args, **options))
    return dict(zip(plan.request_indices.tolist(), plan.num_scheduled_tokens.tolist(), strict=True))


def test_a_prompt_does_not_wait_for_those_behind_it():
    assert granted([1, 1], [1024, 1024, 1024], 8192) == {0: 1, 1: 1, 2: 1024}


def test_short_prompts_share_a_step():
    assert granted([1], [500, 600, 400, 300], 8192) == {0: 1, 1: 500, 2: 600, 3: 400}


def test_half_of_a_long_queue_goes_at_once():
    assert len(granted([1], [1024] * 64, 16500)) == 1 + 16
    assert len(granted([1], [1024] * 10, 16384)) == 1 + 5


def test_without_decodes_a_step_is_as_large_as_it_may_be():
    assert sum(granted([], [1024] * 64, 16384).values()) == 16384


def test_a_prompt_that_no_step_holds_is_computed_in_parts():
    assert granted([1], [9000], 2048) == {0: 1, 1: 2047}
    assert granted([1, 700], [1024], 1024) == {0: 1, 1: 700, 2: 323}, "1,024 beside a decode never fit"


tokens = st.integers(1, 3000)


@given(
    st.lists(st.one_of(st.just(0), st.just(1), tokens), max_size=20),
    st.lists(tokens, max_size=20),
    st.integers(1, 6000),
    st.integers(0, 24),
)
def test_any_step(running, waiting, budget, rows):
    plan = granted(running, waiting, budget, rows=rows)
    want = [*running, *waiting[:rows]]
    assert sum(plan.values()) <= budget
    assert all(0 < got <= want[row] for row, got in plan.items())
    assert bool(plan) == any(want), "a request goes on, if any has tokens to compute"
    decodes = [row for row, left in enumerate(running) if left == 1]
    assert [row for row in plan if row in decodes] == decodes[:budget]
    prompts = [row for row, left in enumerate(want) if left and row not in decodes]
    assert [row for row in plan if row not in decodes] == prompts[: len(plan) - len(decodes[:budget])], "in order"
    cut = [row for row, got in plan.items() if got < want[row]]
    assert len(cut) <= 1, "at most the last is cut"
    if decodes:
        assert sum(plan[row] for row in plan if want[row] > 1) <= max(MIN_PREFILL_TOKENS, sum(want) // 2)


@given(st.lists(tokens, min_size=1, max_size=12), st.integers(1, 8), st.integers(16, 4000))
def test_every_prompt_ends(prompts, decodes, budget):
    """Beside decodes that never end, and soon."""
    left, steps = list(prompts), 0
    room = min(budget - decodes, MIN_PREFILL_TOKENS)
    while any(left):
        plan = granted([1] * decodes + left, [], budget)
        for row, got in plan.items():
            if row >= decodes:
                left[row - decodes] -= got
        steps += 1
        assert steps <= 2 * sum(prompts) / room + 2 * len(prompts)
