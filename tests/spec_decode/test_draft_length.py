"""How many drafts are chosen, against a device whose costs and a proposer whose skill are known."""

from __future__ import annotations

import numpy as np
import pytest

from quire.core.sched.draft_length import DraftLengthTuner

MOST = 4


def serve(
    num_reqs: int, skill: float, cost: dict[int, float], steps: int = 2000, tuner: DraftLengthTuner | None = None
) -> float:
    """Tokens per microsecond with the tuner, over that without drafts. A device proposer: what is chosen is verified
    one step later."""
    rng = np.random.default_rng(0)
    tuner = tuner or DraftLengthTuner(MOST, 256, True)
    rows = np.arange(num_reqs)
    tokens = took = 0.0
    ready = 0
    for _ in range(steps):
        chosen = tuner.choose_length(rows, np.full(num_reqs, MOST))
        drafted = np.minimum(tuner.limit_per_request(rows), ready)
        right = (rng.random((num_reqs, MOST)) < skill).cumprod(1).astype(int)
        accepted = (right * (np.arange(MOST) < drafted[:, None])).sum(1)
        if ready:
            tuner.record_acceptance(rows, drafted, accepted)
        lasted = 0.5 * (cost[chosen] + cost[ready]) * rng.uniform(0.97, 1.03)
        if chosen == ready:
            tuner.record_step_time(num_reqs, ready, lasted)
        tokens += num_reqs + accepted.sum()
        took += lasted
        ready = chosen
    return tokens / took / (num_reqs / cost[0])


CHEAP = {0: 100.0, 1: 101.0, 2: 102.0, 4: 104.0}
DRAFTED = {0: 100.0, 1: 120.0, 2: 140.0, 4: 175.0}
DEAR = {0: 100.0, 1: 190.0, 2: 260.0, 4: 420.0}


@pytest.mark.parametrize("num_reqs", [1, 8, 256])
@pytest.mark.parametrize("skill", [0.0, 0.3, 0.75, 0.95])
@pytest.mark.parametrize("cost", [CHEAP, DRAFTED, DEAR], ids=["cheap", "drafted", "dear"])
def test_never_two_percent_slower(num_reqs: int, skill: float, cost: dict[int, float]) -> None:
    assert serve(num_reqs, skill, cost) > 0.98


@pytest.mark.parametrize(("skill", "cost", "least"), [(0.75, CHEAP, 2.8), (0.75, DRAFTED, 1.65), (0.95, DRAFTED, 2.4)])
def test_faster_where_it_pays(skill: float, cost: dict[int, float], least: float) -> None:
    assert serve(1, skill, cost) > least


def test_runs_of_sure_drafts_are_drafted_whole() -> None:
    """What a grammar forces: now and then, of any length, and always right."""
    tuner, rng, rows = DraftLengthTuner(8, 8, True), np.random.default_rng(0), np.array([3])
    available, chosen = [], []
    for step in range(1200):
        num_drafts = int(rng.integers(3, 9)) if step % 12 == 0 else 0
        verified = min(num_drafts, tuner.choose_length(rows, np.array([num_drafts])))
        if verified:
            tuner.record_acceptance(rows, np.array([verified]), np.array([verified]))
        tuner.record_step_time(1, verified, 100.0 + 0.5 * verified)
        available.append(num_drafts)
        chosen.append(verified)
    assert sum(chosen[:120]) > 0.4 * sum(available[:120])
    assert sum(chosen[120:]) > 0.97 * sum(available[120:])


def test_what_reads_prompts_must_gain_more() -> None:
    slight = {0: 100.0, 1: 165.0, 2: 230.0, 4: 400.0}  # of 1.75 tokens: 6 % faster
    host, device = DraftLengthTuner(MOST, 256, True), DraftLengthTuner(MOST, 256, True, on_device=True)
    assert serve(64, 0.75, slight, tuner=host) > 1.02 and host.last_length == 1
    assert serve(64, 0.75, slight, tuner=device) > 0.98 and device.last_length == 0


def test_load_changes_its_mind_and_back() -> None:
    """Off while many run, on again when few do."""
    tuner = DraftLengthTuner(MOST, 256, True)
    assert serve(2, 0.8, DRAFTED, 600, tuner) > 1.4 and tuner.last_length == MOST
    assert serve(256, 0.8, DEAR, 3000, tuner) > 0.97 and tuner.last_length == 0
    assert serve(2, 0.8, DRAFTED, 600, tuner) > 1.4 and tuner.last_length == MOST


def test_a_request_whose_drafts_are_wrong_gets_fewer() -> None:
    tuner = DraftLengthTuner(MOST, 8, True)
    rows = np.array([0, 1])
    for _ in range(30):
        tuner.record_acceptance(rows, np.array([4, 4]), np.array([4, 0]))
    assert tuner.limit_per_request(rows).tolist() == [4, 1]
    tuner.reset_row(1)
    assert tuner.limit_per_request(rows)[1] > 1
    assert DraftLengthTuner(3, 8, False).limit_per_request(rows).tolist() == [3, 3]


def trials(tuner: DraftLengthTuner, num_reqs: int, cost: dict[int, float], steps: int) -> list[int]:
    """What it chooses while every step takes what it costs."""
    rows, chosen = np.arange(num_reqs), []
    for _ in range(steps):
        chosen.append(tuner.choose_length(rows, np.full(num_reqs, MOST)))
        tuner.record_step_time(num_reqs, chosen[-1], cost[chosen[-1]])
        tuner.record_acceptance(rows[:0], rows[:0], rows[:0])  # the proposer has read nothing: drafts are withdrawn
    return chosen


def known(skill: float, tuner: DraftLengthTuner | None = None) -> DraftLengthTuner:
    """A tuner that has seen the proposer's acceptance."""
    tuner, rng = tuner or DraftLengthTuner(MOST, 256, True, on_device=True), np.random.default_rng(1)
    for _ in range(60):
        right = (rng.random((8, MOST)) < skill).cumprod(1).sum(1)
        tuner.record_acceptance(np.arange(8), np.full(8, MOST), right)
    return tuner


def test_prompts_are_read_until_acceptance_is_known_and_while_drafts_pay() -> None:
    new = DraftLengthTuner(MOST, 256, True, on_device=True)
    trials(new, 4, DEAR, 20)
    assert new.run_draft_prefill, "nothing was verified yet"
    tuner = known(0.75, new)
    trials(tuner, 256, DEAR, 30)
    for num_reqs in (128, 64, 32):
        assert not tuner.run_draft_prefill
        for _ in range(30):
            trials(tuner, num_reqs, DEAR, 1)
            assert not tuner.run_draft_prefill, "how long drafts take shows without reading"
    trials(tuner, 2, CHEAP, 40)
    assert tuner.run_draft_prefill and tuner.last_length == MOST


def test_more_drafts_are_not_tried_where_fewer_show_that_they_cannot_pay() -> None:
    assert set(trials(known(0.75), 256, DEAR, 400)) == {0, 1}
    measured = {0: 9650.0, 1: 16900.0, 2: 25500.0, 4: 41000.0}  # an 8B with a 1B draft on an H200
    assert set(trials(known(0.75), 256, measured, 400)) == {0, 1}
    assert set(trials(known(0.75), 1, DRAFTED, 400)) == {0, 1, 2, 4}


def test_what_does_not_pay_is_tried_more_and_more_rarely() -> None:
    tuner = known(0.75)
    chosen = np.array(trials(tuner, 256, {0: 100.0, 1: 155.0, 2: 210.0, 4: 330.0}, 20_000))
    assert not tuner.run_draft_prefill, "what was learnt of the proposer is kept"
    starts = np.flatnonzero((chosen[1:] > 0) & (chosen[:-1] == 0))
    assert 3 <= len(starts) <= 8 and (chosen > 0).mean() < 0.002
    assert np.diff(starts[1:]).min() > 900
    assert set(trials(tuner, 64, DEAR, 5_000)[10:]) == {0}, "even if all drafts were right"


def test_prompts_of_one_request_at_a_time_are_not_read_for_a_proposer_that_is_always_wrong() -> None:
    tuner = DraftLengthTuner(MOST, 256, True, on_device=True)
    serve(1, 0.0, DRAFTED, 100, tuner)
    assert tuner.last_length == 0 and not tuner.run_draft_prefill
