"""A draft model reads nothing while nothing is drafted, and what it passed over before it drafts again."""

from __future__ import annotations

import itertools

import pytest

from quire import SamplingParams
from quire.core.worker import draft_runner as draft_runner_module

from .conftest import runner_of
from .test_exact import assert_same, prompts_for


@pytest.mark.parametrize("budget", [5, 1000])
@pytest.mark.parametrize("off", [1, 9])
def test_drafts_are_right_again_after_a_pause(engine, monkeypatch, budget: int, off: int) -> None:
    """The target drafts for itself, so a draft is wrong only if the proposer has not read what it should have."""
    monkeypatch.setattr(draft_runner_module, "_BACKFILL_TOKENS_PER_STEP", budget)
    sizes = {"max_num_seqs": 4, "max_num_batched_tokens": 32, "enable_prefix_caching": False}
    llm = engine("itself", **sizes)
    speculation = llm.engine_core.scheduler.debug_state().speculation
    tuner, observed, steps, times = speculation.tuner, [], itertools.count(), []
    drafting = runner_of(llm).draft_runner

    def choose(rows, available) -> int:
        tuner.run_draft_prefill = next(steps) % 20 >= off
        return 4 if tuner.run_draft_prefill else 0

    monkeypatch.setattr(tuner, "choose_length", choose)
    monkeypatch.setattr(speculation, "record_step_time", lambda step, took_us: times.append(took_us))
    monkeypatch.setattr(
        drafting,
        "run_draft_prefill",
        lambda inputs: observed.append(inputs) or type(drafting).run_draft_prefill(drafting, inputs),
    )
    params = SamplingParams(temperature=0.9, seed=1, max_tokens=60, ignore_eos=True)
    before = llm.get_stats()
    got = llm.generate(prompts_for(2, 6), params)
    for mine, theirs in zip(got, engine(**sizes).generate(prompts_for(2, 6), params), strict=True):
        assert_same(mine, theirs)
    after = llm.get_stats()
    accepted, drafted = (
        after[name] - before[name]
        for name in ("spec_decode_num_accepted_tokens_total", "spec_decode_num_draft_tokens_total")
    )
    assert accepted == drafted > 20
    assert 0.0 in times and max(times) > 0, "a step that made up for others is not timed"
    assert len(observed) < 20 - off, "prompts that came in a pause were read at once"
