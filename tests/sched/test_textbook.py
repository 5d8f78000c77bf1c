"""What scheduling theory says of the bundled policies, over the simulated engine."""

from __future__ import annotations

import numpy as np
import pytest

from quire.core.scheduling_params import SchedulingParams
from quire.plugins.sched.edf import EDFPolicy
from quire.plugins.sched.ewsjf import EWSJFPolicy
from quire.plugins.sched.fair_share import FairSharePolicy
from quire.plugins.sched.fairbatch import FairBatchPolicy
from quire.plugins.sched.fcfs import FCFSPolicy
from quire.plugins.sched.prefix_affinity import PrefixAffinityPolicy
from quire.plugins.sched.priority import PriorityPolicy
from quire.plugins.sched.sjf import SJFPolicy

from .queueing import Arrival, serve, tokens_take_a_ms


def poisson(rate_per_ms, count, sizes, probabilities, seed=0):
    """Arrivals of an M/G/1 queue: sizes are prompt lengths."""
    rng = np.random.default_rng(seed)
    at = np.cumsum(rng.exponential(1 / rate_per_ms, count))
    return [Arrival(t, int(size)) for t, size in zip(at, rng.choice(sizes, count, p=probabilities), strict=True)]


def test_shortest_job_first_and_fcfs_wait_as_theory_says():
    """M/G/1: FCFS by Pollaczek and Khinchine, the order by size by Cobham (1954) for priorities."""
    sizes, shares, load = np.array([2, 40]), np.array([0.9, 0.1]), 0.7
    rate = load / float(sizes @ shares)
    arrivals = poisson(rate, 2500, sizes, shares)
    residual = rate * float(sizes**2 @ shares) / 2
    load_of_short = rate * sizes[0] * shares[0]
    wait_fcfs = residual / (1 - load)
    wait_short = residual / (1 - load_of_short)
    wait_long = residual / ((1 - load_of_short) * (1 - load))

    lengths = np.array([each.prompt_len for each in arrivals])
    fcfs = serve(FCFSPolicy(), arrivals, tokens_take_a_ms).response_ms - lengths
    sjf = serve(SJFPolicy(SJFPolicy.Options(aging=0)), arrivals, tokens_take_a_ms).response_ms - lengths
    theory = wait_short * shares[0] + wait_long * shares[1]
    print(f"M/G/1: FCFS waits {fcfs.mean():.1f} ms (theory {wait_fcfs:.1f}), SJF {sjf.mean():.1f} ({theory:.1f})")
    assert fcfs.mean() == pytest.approx(wait_fcfs, rel=0.2)
    assert sjf[lengths == 2].mean() == pytest.approx(wait_short, rel=0.2)
    assert sjf[lengths == 40].mean() == pytest.approx(wait_long, rel=0.3)
    assert sjf.mean() < 0.6 * fcfs.mean()


def test_aging_bounds_what_the_low_priority_waits():
    """Urgent requests keep the server busy for ever. With aging, the other is served as if it had come that much later;
    without, it is the last."""
    arrivals = [Arrival(0.0, 10), Arrival(0.1, 10, priority=1)] + [Arrival(0.2 + 9.0 * i, 10) for i in range(300)]
    for aging, expected_ms in ((0.5, 500.0), (1.0, 1000.0)):
        served = serve(PriorityPolicy(PriorityPolicy.Options(aging=aging)), arrivals, tokens_take_a_ms)
        # It queues behind all that came within its aging, which takes 10/9 of that time.
        assert served.response_ms[1] == pytest.approx(expected_ms * 10 / 9, rel=0.05)
    strict = serve(PriorityPolicy(PriorityPolicy.Options(aging=0)), arrivals, tokens_take_a_ms)
    assert strict.response_ms[1] > 3000


class WatchedShares(FairSharePolicy):
    """Keeps how far the groups ``a`` and ``b`` are apart whenever both have requests waiting."""

    def __init__(self, options, weights):
        super().__init__(options)
        self.weights, self.gaps = weights, []

    def schedule(self, view):
        groups = view.groups
        if groups.keys == ("a", "b") and groups.num_waiting.all():
            served = (groups.num_prompt_tokens + 2 * groups.num_output_tokens) / self.weights
            self.gaps.append(abs(served[0] - served[1]))
        return super().schedule(view)


@pytest.mark.parametrize("weights", [(1, 1), (2, 1)])
def test_the_gap_of_fair_shares_is_bounded_by_a_constant(weights):
    """Sheng et al., theorem 4.4: between two groups with requests waiting, weighted service differs by no more than
    2 max(w_p L_input, w_q M), with L_input the longest prompt and M the tokens of a full batch."""
    rows, max_tokens, longest = 4, 12, 60
    rng = np.random.default_rng(1)
    greedy = [
        Arrival(0, int(rng.integers(20, longest)), max_tokens, scheduling=SchedulingParams(group="a"))
        for _ in range(120)
    ]
    modest = [Arrival(0, int(rng.integers(4, 12)), 4, scheduling=SchedulingParams(group="b")) for _ in range(240)]
    bound = 2 * max(longest, 2 * rows * (longest + max_tokens))
    policy = WatchedShares(FairSharePolicy.Options(weights=(f"a={weights[0]}", f"b={weights[1]}")), weights)
    serve(policy, greedy + modest, tokens_take_a_ms, rows=rows, budget=128)
    print(f"fair_share {weights}: the gap is {max(policy.gaps):.0f} at most, the bound {bound}")
    assert len(policy.gaps) > 100 and max(policy.gaps) <= bound


def test_a_light_user_does_not_notice_a_greedy_one():
    light = [Arrival(200.0 * i, 20, 2, scheduling=SchedulingParams(group="light")) for i in range(20)]
    greedy = [Arrival(0.0, 40, 4, scheduling=SchedulingParams(group="greedy")) for _ in range(200)]
    alone = serve(FairSharePolicy(), light, tokens_take_a_ms, rows=4, budget=64).ttft_ms
    beside = serve(FairSharePolicy(), light + greedy, tokens_take_a_ms, rows=4, budget=64).ttft_ms[: len(light)]
    fcfs = serve(FCFSPolicy(), light + greedy, tokens_take_a_ms, rows=4, budget=64).ttft_ms[: len(light)]
    print(f"light user beside a greedy one: {beside.mean():.1f} ms to first token, under FCFS {fcfs.mean():.1f}")
    assert beside.max() < alone.max() + 2 * 64 + 4 * 4, "two steps, and what is running"
    assert fcfs.mean() > 10 * beside.mean()


def test_nobody_saves_up_credit():
    """A group that was away is lifted to the others: it gets its half from now on, not all that it missed."""
    stays = [Arrival(0.0, 20, scheduling=SchedulingParams(group="stays")) for _ in range(300)]
    comes = [Arrival(2000.0, 20, scheduling=SchedulingParams(group="comes")) for _ in range(100)]
    served = serve(FairSharePolicy(), stays + comes, tokens_take_a_ms)
    ends = np.sort(served.response_ms[300:]) + 2000.0
    assert ends[49] == pytest.approx(2000 + 2 * 50 * 20, rel=0.05), "every second one is its"


def test_earliest_deadline_first_meets_what_fcfs_misses():
    """A set of jobs that can be met: then this order meets all (Liu and Layland)."""
    rng = np.random.default_rng(3)
    lengths = rng.integers(5, 30, 60)
    ends = np.cumsum(lengths)  # some order that meets all, by construction of the deadlines
    jobs = [
        Arrival(0.0, int(n), scheduling=SchedulingParams(deadline_ms=float(e) + 1))
        for n, e in zip(lengths, ends, strict=True)
    ]
    rng.shuffle(jobs)
    deadlines = np.array([job.scheduling.deadline_ms for job in jobs])
    assert (serve(EDFPolicy(), jobs, tokens_take_a_ms).response_ms <= deadlines).all()
    assert (serve(FCFSPolicy(), jobs, tokens_take_a_ms).response_ms > deadlines).sum() > 10


def test_dropping_what_cannot_be_met_meets_more_under_overload():
    rng = np.random.default_rng(4)
    jobs = [
        Arrival(float(t), int(rng.integers(5, 30)), scheduling=SchedulingParams(deadline_ms=60))
        for t in np.arange(0, 2000, 12)
    ]
    kept = serve(EDFPolicy(), jobs, tokens_take_a_ms)
    dropping = serve(EDFPolicy(EDFPolicy.Options(drop=True)), jobs, tokens_take_a_ms)
    met = [int(np.nansum(served.response_ms <= 60)) for served in (kept, dropping)]
    print(f"overload: of {len(jobs)} deadlines EDF meets {met[0]}, with drop {met[1]}")
    assert np.nansum(dropping.response_ms <= 60) > 2 * np.nansum(kept.response_ms <= 60)
    refused = np.isnan(dropping.response_ms)
    assert refused.any() and (dropping.response_ms[~refused] <= 60).mean() > 0.9, "what is begun is met"


def fixed_and_per_token(step):
    """5 ms for the weights, and 0.05 ms a token."""
    return 5 + 0.05 * step.total_num_scheduled_tokens


def test_chunked_prefill_bounds_the_gaps_between_tokens():
    """Sarathi (OSDI 2024): with whole prompts a decode waits for the longest of them, with chunks for a chunk."""
    decodes = [Arrival(0.0, 8, 60) for _ in range(4)]
    prompts = [Arrival(20.0 + 60.0 * i, 900) for i in range(4)]
    gaps = {}
    for name, budget, chunked in (("chunks", 128, True), ("whole", 1024, False)):
        served = serve(
            FCFSPolicy(),
            decodes + prompts,
            fixed_and_per_token,
            rows=8,
            budget=budget,
            chunked=chunked,
            max_model_len=1000,
        )
        gaps[name] = np.percentile(np.concatenate([served.gaps_ms[i] for i in range(4)]), 99)
    print(f"p99 gap between tokens: {gaps['whole']:.1f} ms with whole prompts, {gaps['chunks']:.1f} with chunks")
    assert gaps["chunks"] <= 5 + 0.05 * 128 + 0.1 and gaps["whole"] >= 45


def test_the_longest_prefix_first_hits_more_and_overtakes_within_its_bound():
    """Four conversations take turns, and the cache holds one prefix beside the running request."""
    rng = np.random.default_rng(5)
    prefixes = [rng.integers(0, 50, 320).tolist() for _ in range(4)]
    arrivals = [Arrival(20.0 * i, 352, prefix=prefixes[i % 4]) for i in range(80)]
    hits = {}
    for name, policy in (
        ("fcfs", FCFSPolicy()),
        ("affinity", PrefixAffinityPolicy(PrefixAffinityPolicy.Options(bonus=2))),
    ):
        served = serve(policy, arrivals, tokens_take_a_ms, num_blocks=50, max_model_len=400)
        hits[name] = served.num_cached.sum()
        starts = np.array([each.at_ms for each in arrivals]) + served.ttft_ms
    print(f"prefix tokens found cached of {80 * 352}: {hits['fcfs']} under FCFS, {hits['affinity']} by affinity")
    assert hits["affinity"] > 3 * max(hits["fcfs"], 320)
    for i, start in enumerate(starts):
        overtakers = [arrivals[j].at_ms - arrivals[i].at_ms for j in range(len(starts)) if starts[j] < start]
        assert max(overtakers, default=0) <= 2000 * 0.352, (
            "no request is overtaken by one that came later than the bonus"
        )


def burst():
    """Eight answers are under way, far ahead of a reader, when eight prompts come at once."""
    decodes = [Arrival(0.0, 16, 100) for _ in range(8)]
    return decodes + [Arrival(300.0 + i, 400, 2) for i in range(8)]


def test_batches_by_slack_bring_first_tokens_sooner_and_keep_the_pace():
    """Beside chunks that are small enough for the pace of every single step, as Sarathi has them."""
    options = FairBatchPolicy.Options(ttft_target_ms=300, tpot_target_ms=12)
    p99 = {}
    for policy, budget in ((FCFSPolicy(), 128), (FairBatchPolicy(options), 2048)):
        served = serve(policy, burst(), fixed_and_per_token, rows=16, budget=budget, max_model_len=500)
        p99[type(policy)] = float(np.percentile(served.ttft_ms[8:], 99))
        # Each token is there when it is due, counted from the target of the first.
        late = [
            max(t - 300 - 12 * j for j, t in enumerate(np.cumsum([served.ttft_ms[i], *served.gaps_ms[i]])))
            for i in range(8)
        ]
        assert max(late) <= 0
    print(f"p99 of first tokens: {p99[FCFSPolicy]:.0f} ms in small chunks, {p99[FairBatchPolicy]:.0f} by slack")
    assert p99[FairBatchPolicy] * 1.5 < p99[FCFSPolicy]


def test_queues_by_length_serve_short_prompts_sooner_and_starve_none():
    arrivals = poisson(0.9 / 40.0, 600, np.array([8, 200]), np.array([5 / 6, 1 / 6]), seed=6)
    lengths = np.array([each.prompt_len for each in arrivals])
    fcfs = serve(FCFSPolicy(), arrivals, tokens_take_a_ms).ttft_ms
    ewsjf = serve(EWSJFPolicy(), arrivals, tokens_take_a_ms).ttft_ms
    short = lengths == 8
    print(f"first tokens of short prompts: FCFS {fcfs[short].mean():.0f} ms, ewsjf {ewsjf[short].mean():.0f}")
    assert ewsjf[lengths == 8].mean() * 2 < fcfs[lengths == 8].mean()
    assert ewsjf[lengths == 200].max() < 3 * fcfs[lengths == 200].max()
