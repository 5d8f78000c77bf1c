"""A draft model computes nothing while nothing is drafted, and backfills what it skipped before it drafts again."""

from __future__ import annotations

import itertools

import pytest

from quire import SamplingParams
from quire.core.worker import draft_runner as draft_runner_module

from .conftest import assert_same_outputs, get_model_runner, make_prompts


@pytest.mark.parametrize("budget", [5, 1000])
@pytest.mark.parametrize("pause", [1, 9])
def test_drafts_are_accepted_again_after_a_pause(engine, monkeypatch, budget: int, pause: int) -> None:
    """The target drafts for itself, so a draft is rejected only if the proposer has skipped tokens."""
    monkeypatch.setattr(draft_runner_module, "_BACKFILL_TOKENS_PER_STEP", budget)
    sizes = {"max_num_seqs": 4, "max_num_batched_tokens": 32, "enable_prefix_caching": False}
    llm = engine("itself", **sizes)
    speculation = llm.engine_core.scheduler.debug_state().speculation
    tuner, steps = speculation.tuner, itertools.count()
    observed_steps, step_times = [], []
    draft_runner = get_model_runner(llm).draft_runner

    def choose_length(rows, available) -> int:
        tuner.run_draft_prefill = next(steps) % 20 >= pause
        return 4 if tuner.run_draft_prefill else 0

    def run_draft_prefill(inputs) -> None:
        observed_steps.append(inputs)
        type(draft_runner).run_draft_prefill(draft_runner, inputs)

    monkeypatch.setattr(tuner, "choose_length", choose_length)
    monkeypatch.setattr(speculation, "record_step_time", lambda step, took_us: step_times.append(took_us))
    monkeypatch.setattr(draft_runner, "run_draft_prefill", run_draft_prefill)
    params = SamplingParams(temperature=0.9, seed=1, max_tokens=60, ignore_eos=True)
    before = llm.get_stats()
    actual = llm.generate(make_prompts(2, 6), params)
    expected = engine(**sizes).generate(make_prompts(2, 6), params)
    for one, other in zip(actual, expected, strict=True):
        assert_same_outputs(one, other)
    after = llm.get_stats()
    accepted, drafted = (
        after[name] - before[name]
        for name in ("spec_decode_num_accepted_tokens_total", "spec_decode_num_draft_tokens_total")
    )
    assert accepted == drafted > 20
    assert 0.0 in step_times and max(step_times) > 0, "the time of a step with a backfill is used"
    assert len(observed_steps) < 20 - pause, "prompts that came in a pause were computed at once"
