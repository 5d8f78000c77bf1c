"""The verdict: no difference where there is none, what is planted where it is, and intervals that hold it."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from scipy import stats

from quire.core.errors import ConfigError
from quire.server.ab.analysis import MIN_PAIRS, analyze_pairs
from quire.server.ab.observations import ArmTimes, combine_arms
from quire.server.ab.simulated import Block, plan_blocks, repeat_arrivals
from quire.server.simulate.results import Objectives, RequestTimes
from quire.server.traces.synthetic import make_arrivals, make_synthetic_trace


def make_times(rng, count, factor=1.0, groups=(), start=0.0):
    """Requests with lognormal latencies, ``factor`` times as long."""
    e2e = factor * np.exp(rng.normal(0.0, 0.5, count))
    zeros = np.zeros(count, np.int64)
    names = [groups[i % len(groups)] for i in range(count)] if groups else ()
    return RequestTimes(
        start + np.arange(count) / count, e2e / 10, e2e / 50, e2e, zeros + 100, zeros + 20, zeros, zeros,
        np.ones(count, bool), names,
    )  # fmt: skip


def observe(seed, effect=0.0, pairs=20, count=30, **options):
    """Pairs whose stretches share a drift, as traffic has it."""
    rng = np.random.default_rng(seed)
    measured = []
    for pair in range(pairs):
        drift = np.exp(rng.normal(0, 0.2))
        for arm in (0, 1):
            noise = np.exp(rng.normal(0, 0.03))
            times = make_times(rng, count, drift * noise * (1 + effect * arm), **options)
            measured.append(ArmTimes(pair, arm, 10.0, times))
    return combine_arms(measured)


def analyze(observations, objectives=None, seed=0):
    return analyze_pairs(observations, objectives or Objectives(), 20.0, seed)


def test_equal_arms_are_found_different_no_more_often_than_promised():
    """At 95 %, however many metrics there are."""
    num_wrong = sum(bool(analyze(observe(seed), seed=seed).significant) for seed in range(40))
    assert num_wrong <= stats.binom.ppf(0.999, 40, 0.05)


def test_a_large_effect_is_found_and_its_interval_holds_it():
    num_covered = 0
    for seed in range(20):
        effect = analyze(observe(seed, effect=0.3), seed=seed).get_effect("e2e_p50")
        assert effect.is_significant and not effect.is_better and effect.effect > 0
        num_covered += effect.low <= 0.3 <= effect.high
    assert num_covered >= 15  # 19 expected


def test_the_interval_is_that_of_a_paired_t_test_for_means_of_logarithms():
    """Stretches of one request each: the effect on the median is not the mean, but its error is of the same size."""
    observations = observe(3, effect=0.1, pairs=60, count=200)
    effect = analyze(observations).get_effect("e2e_p50")
    logs = np.log(observations.e2e_s)
    differences = [
        logs[(observations.pair == p) & (observations.arm == 1)].mean()
        - logs[(observations.pair == p) & (observations.arm == 0)].mean()
        for p in range(60)
    ]
    low, high = np.expm1(stats.ttest_1samp(differences, 0).confidence_interval())
    assert effect.high - effect.low == pytest.approx(high - low, rel=0.6)
    assert effect.p_value < 0.01 and stats.ttest_1samp(differences, 0).pvalue < 0.01


def test_what_a_longer_run_would_see_shrinks_with_the_root_of_its_length():
    short, long = (analyze(observe(5, pairs=pairs)).get_effect("tpot_p50") for pairs in (16, 144))
    assert long.smallest_effect == pytest.approx(short.smallest_effect / 3, rel=0.5)
    assert short.recommended_pairs == pytest.approx(long.recommended_pairs, rel=1.0)


def test_too_few_pairs_give_no_verdict():
    with pytest.raises(ConfigError, match=f"{MIN_PAIRS} are needed"):
        analyze(observe(0, pairs=MIN_PAIRS - 1))


def test_a_pair_without_requests_in_one_arm_is_left_out():
    rng = np.random.default_rng(0)
    measured = [ArmTimes(pair, arm, 1.0, make_times(rng, 5)) for pair in range(14) for arm in (0, 1)]
    measured[3] = ArmTimes(1, 1, 1.0, make_times(rng, 0))
    assert combine_arms(measured).num_pairs == 13


def test_objectives_and_groups_are_metrics_where_there_are_any():
    verdict = analyze(observe(2, effect=0.5, groups=("a", "b")), Objectives(150.0, None))
    names = [effect.metric.name for effect in verdict.effects]
    assert names[-3:] == ["throughput", "slo", "fairness"] and len(names) == 12
    slo = verdict.get_effect("slo")
    assert slo.is_significant and not slo.is_better and slo.effect < -0.1
    assert verdict.get_effect("fairness").a == pytest.approx(1.0, abs=0.05)
    with pytest.raises(ConfigError, match="was not measured; choose from ttft_p50"):
        verdict.get_effect("ttft_p90")


def test_requests_that_failed_count_against_the_objectives():
    rng = np.random.default_rng(0)
    measured = []
    for pair in range(14):
        for arm in (0, 1):
            times = make_times(rng, 40)
            if arm:
                times.is_served[::4] = False
                for column in (times.ttft_s, times.tpot_s, times.e2e_s):
                    column[::4] = np.nan
            measured.append(ArmTimes(pair, arm, 1.0, times))
    slo = analyze(combine_arms(measured), Objectives(1e9, None)).get_effect("slo")
    assert (slo.a, slo.b) == (1.0, 0.75) and slo.is_significant


def test_a_verdict_repeats_by_seed():
    assert analyze(observe(4), seed=1) == analyze(observe(4), seed=1)


def test_blocks_take_turns_in_random_order_and_are_washed_out():
    blocks = plan_blocks(200, 30.0, seed=0)
    assert [block.start_s for block in blocks] == [30.0 * i for i in range(400)]
    firsts = [block.arm for block in blocks[::2]]
    assert {(a.arm, b.arm) for a, b in zip(blocks[::2], blocks[1::2], strict=True)} == {(0, 1), (1, 0)}
    assert 70 < sum(firsts) < 130 and plan_blocks(200, 30.0, seed=0) == blocks != plan_blocks(200, 30.0, seed=1)
    assert Block(0, 0, 30.0, 60.0).get_measured(5.0) == (35.0, 55.0)


def test_a_switchback_of_equal_arms_finds_nothing_and_a_planted_effect_is_found(switchback):
    """A few of the runs of benchmarks/ab_calibration.py, which makes 100 of each."""
    verdicts = [switchback(seed) for seed in range(3)]
    assert sum(bool(verdict.significant) for verdict in verdicts) <= 1
    pairs = verdicts[0].get_effect("tpot_p50").recommended_pairs
    found = [switchback(50 + seed, pairs, 1.05).get_effect("tpot_p50") for seed in range(3)]
    assert sum(effect.is_significant and effect.effect > 0 for effect in found) >= 2
    # Slower steps also leave more requests in each.
    assert 0.04 < np.mean([effect.effect for effect in found]) < 0.08


def test_both_stretches_of_a_pair_have_the_same_arrivals_which_makes_intervals_narrow(switchback):
    trace = make_synthetic_trace("synthetic:requests=300").replace_arrivals(make_arrivals("poisson:rate=20", 300))
    blocks = plan_blocks(3, 2.0, seed=1)
    sent = repeat_arrivals(trace, blocks)
    assert [request.arrival_s for request in sent.requests] == sorted(request.arrival_s for request in sent.requests)
    for first, second in zip(blocks[::2], blocks[1::2], strict=True):
        shapes = [
            [
                (pytest.approx(r.arrival_s - block.start_s), r.prompt_len, r.output_len)
                for r in sent.requests
                if block.start_s <= r.arrival_s < block.end_s
            ]
            for block in (first, second)
        ]
        assert shapes[0] == shapes[1] and shapes[0]
    shared = dataclasses.replace(trace, hash_block_size=16)
    assert repeat_arrivals(shared, blocks) is shared  # the second stretch would find the first one's prefixes

    narrow, wide = (switchback(7, slowdown=1.05, repeats=repeats) for repeats in (True, False))
    for metric in ("ttft_p50", "tpot_p50", "e2e_p50", "e2e_p95"):
        widths = [verdict.get_effect(metric).high - verdict.get_effect(metric).low for verdict in (narrow, wide)]
        assert 2 * widths[0] < widths[1], metric
