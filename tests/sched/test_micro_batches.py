"""With several stages the steps in flight share the decoding requests, and none waits for another's token."""

from __future__ import annotations

from collections import Counter

import pytest

from quire.core.config import SpeculationConfig


def run_steady(engine, num_stages: int, num_steps: int, max_in_flight: int) -> list[list[int]]:
    """The rows of each step while ``max_in_flight`` are in flight, as the engine core keeps them. None has a row of
    the newest ``num_stages - 1`` before it, if there are several."""
    steps: list[list[int]] = []
    while len(steps) < num_steps:
        in_flight = list(engine.in_flight)
        newest = [row for each in in_flight[1 - num_stages :] if in_flight[1:] for row in each.step.rows.tolist()]
        step = engine.launch_step()
        counts = Counter(row for each in engine.in_flight for row in each.step.rows.tolist())
        assert max(counts.values()) <= 2, "as with one stage"
        if step is not None:
            assert not set(newest) & set(step.rows.tolist()), "its token is not sampled yet"
            steps.append(step.rows.tolist())
        if step is None or len(engine.in_flight) == max_in_flight:
            engine.finish_step()
    return steps


@pytest.mark.parametrize(("num_stages", "num_requests"), [(2, 6), (2, 7), (3, 8), (4, 3)])
@pytest.mark.parametrize("drafts", [0, 2])
@pytest.mark.parametrize("spare", [1, 2])
def test_stages_are_busy_and_no_step_waits(
    make_engine, num_stages: int, num_requests: int, drafts: int, spare: int
) -> None:
    speculation = SpeculationConfig(drafts, adaptive=False) if drafts else None
    engine = make_engine(num_stages=num_stages, max_in_flight=num_stages + spare, speculation=speculation)
    for number in range(num_requests):
        engine.add_request(str(number), [number + 1] * 2, max_tokens=60)
    steps = run_steady(engine, num_stages, 12 * num_stages, num_stages + spare)[2 * num_stages :]
    share = -(-num_requests // num_stages)
    assert all(len(rows) <= share for rows in steps)
    turns = Counter(row for rows in steps for row in rows)
    assert len(turns) == num_requests and max(turns.values()) - min(turns.values()) <= 2, "all have their turn"
    engine.run_until_finished()
    assert set(engine.finished.values()) == {"length"}


def test_parts_of_a_prompt_follow_each_other_at_once(make_engine) -> None:
    engine = make_engine(num_stages=2, max_in_flight=3, budget=4)
    engine.add_request("r", [1] * 12, max_tokens=4)
    assert [engine.launch_step().total_num_scheduled_tokens for _ in range(3)] == [4, 4, 4]
    assert engine.launch_step() is None, "its first token is on the last stage yet"
    engine.finish_step()
    assert engine.launch_step() is None
    engine.finish_step()
    assert engine.launch_step().total_num_scheduled_tokens == 1, "the first stage has nothing else to wait for"
    assert engine.launch_step() is None, "its second token comes after the next"
    engine.run_until_finished()


@pytest.mark.parametrize("num_blocks", [6, 7, 8])
@pytest.mark.parametrize("length", range(1, 6))
def test_a_preempted_request_keeps_the_log_probabilities_of_its_prompt(make_engine, length, num_blocks) -> None:
    """Where all parts of its prompt are in flight when it is preempted, its token is sampled, and none is computed
    again."""
    engine = make_engine(num_stages=2, max_in_flight=3, budget=6, num_blocks=num_blocks, prefix_caching=False)
    for number, prompt_len in enumerate((length, 7, 11)):
        engine.add_request(str(number), [1] * prompt_len, max_tokens=8, prompt_logprobs=0)
    engine.run_until_finished()
    found = [output.prompt_logprobs for output in engine.outputs if output.prompt_logprobs is not None]
    assert sorted(map(len, found)) == sorted((length - 1, 6, 10))
