"""Speculation is lossless: whatever a proposer drafts, every request gets the tokens that it gets without drafts."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from quire import SamplingParams
from quire.core.testing.oracle import assert_matches_reference

from .conftest import PROPOSERS, assert_same_outputs, make_prompts

SAMPLING_PARAMS = [
    {"temperature": 0},
    {"temperature": 0.9, "seed": 3},
    {"temperature": 0.7, "top_p": 0.8, "top_k": 12, "min_p": 0.02, "seed": 4},
    {"temperature": 0, "repetition_penalty": 1.4},
    {"temperature": 0.8, "seed": 5, "frequency_penalty": 0.8, "presence_penalty": 0.4, "repetition_penalty": 1.1},
    {"temperature": 0.6, "seed": 6, "logit_bias": {5: 4.0, 9: -100.0}},
    {"temperature": 1.0, "seed": 7, "min_tokens": 9, "stop_token_ids": list(range(0, 320, 3)), "max_tokens": 20},
    {"temperature": 0, "logprobs": 3, "max_tokens": 17},
    {"temperature": 0.9, "seed": 8, "prompt_logprobs": 1, "logprobs": 0, "max_tokens": 11},
    {"temperature": 0, "logprob_token_ids": [4, 90, 7], "max_tokens": 13},
    {"temperature": 0.5, "seed": 9, "max_tokens": 1},
    {"temperature": 0.9, "seed": 10, "max_tokens": 2},
    {"temperature": 0.9, "seed": 11, "n": 3, "max_tokens": 12},
]
ENGINE_ARGUMENTS = {
    "default": {},
    "tight pool, small chunks": {"num_gpu_blocks_override": 38, "max_num_batched_tokens": 16},
    "one by one": {"max_num_seqs": 1, "max_num_batched_tokens": 3, "num_speculative_tokens": 2},
    "no chunks": {"enable_chunked_prefill": False, "max_num_batched_tokens": 128, "enable_prefix_caching": False},
}


@pytest.mark.parametrize("proposer", PROPOSERS)
def test_tokens_are_the_same(engine, proposer: str) -> None:
    prompts = make_prompts(0, len(SAMPLING_PARAMS))
    params = [SamplingParams(**({"max_tokens": 24} | fields)) for fields in SAMPLING_PARAMS]
    expected = engine().generate(prompts, params)
    actual = engine(proposer).generate(prompts, params)
    for one, other in zip(actual, expected, strict=True):
        assert_same_outputs(one, other)


@pytest.mark.parametrize(
    ("proposer", "name"),
    [
        *(("itself", name) for name in ENGINE_ARGUMENTS),
        *((proposer, "tight pool, small chunks") for proposer in ("random", "ngram")),
    ],
)
def test_preemption_and_prefix_hits_beside_drafts(engine, reference, proposer: str, name: str) -> None:
    """Preemption, prefix hits, chunks of prompts beside drafts: seeded and greedy, twice, so that prefixes are hit."""
    llm = engine(proposer, **ENGINE_ARGUMENTS[name])
    count = 4 if name == "one by one" else 8
    prompts = make_prompts(1, count)
    params = [
        SamplingParams(temperature=0.8 * (i % 2), seed=i, max_tokens=20 + i, ignore_eos=True) for i in range(count)
    ]
    for _ in range(2):
        for prompt, sampling, output in zip(prompts, params, llm.generate(prompts, params), strict=True):
            token_ids = output.outputs[0].token_ids
            assert len(token_ids) == sampling.max_tokens
            assert_matches_reference(reference, prompt, token_ids, sampling, seed=sampling.seed)
    if name.startswith("tight"):
        assert llm.get_stats()["num_preemptions_total"] > 0
    assert llm.get_stats()["spec_decode_num_draft_tokens_total"] > 0
    llm.engine_core.scheduler.debug_state().allocator.check_integrity()


@settings(max_examples=2, deadline=None, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 10**6), proposer=st.sampled_from(["itself", "short", "host adversary"]))
def test_random_arrivals(engine, reference, seed: int, proposer: str) -> None:
    """Requests come at any time, some are aborted; each gets what it would get alone, and every block comes back."""
    llm = engine(proposer, **ENGINE_ARGUMENTS["tight pool, small chunks"])
    rng = random.Random(seed)
    waiting = list(enumerate(make_prompts(seed, 14)))
    expected: dict[str, tuple[list[int], SamplingParams]] = {}
    while waiting or len(llm.output_processor):
        for _ in range(rng.choice([0, 0, 1, 3])):
            if waiting:
                i, prompt = waiting.pop()
                params = SamplingParams(
                    temperature=rng.choice([0, 0.7, 1.3]),
                    top_k=rng.choice([0, 7]),
                    seed=i,
                    max_tokens=rng.randrange(1, 24),
                    ignore_eos=True,
                )
                requests = llm.input_processor.process_inputs(f"{seed}/{i}", prompt, params)
                llm.output_processor.add_request(f"{seed}/{i}", None, requests, "final")
                for request in requests:
                    llm.engine_core.add_request(request)
                expected[f"{seed}/{i}"] = (prompt, params)
        processed = llm.output_processor.process_outputs(llm.engine_core.step())
        assert not processed.failed_requests
        for output in processed.request_outputs:
            prompt, params = expected.pop(output.request_id)
            tokens = output.outputs[0].token_ids
            assert len(tokens) == params.max_tokens
            assert_matches_reference(reference, prompt, tokens, params, seed=params.seed)
        if expected and rng.random() < 0.05:
            victim = rng.choice(list(expected))
            llm.engine_core.abort_requests(llm.output_processor.remove_request(victim))
            expected.pop(victim)
    while llm.engine_core.has_work:
        llm.engine_core.step()
    allocator = llm.engine_core.scheduler.debug_state().allocator
    allocator.check_integrity()
    assert allocator.num_free_blocks() == allocator.num_blocks - 1


def test_a_stop_string_among_accepted_drafts_ends_tokens_and_logprobs_where_it_stands(engine) -> None:
    prompts = make_prompts(5, 6)
    params = [SamplingParams(temperature=0.9, seed=i, max_tokens=30, ignore_eos=True) for i in range(6)]
    texts = [output.outputs[0].text for output in engine().generate(prompts, params)]
    stops = [text[len(text) // 2 :][:1] for text in texts]
    params = [replace(one, stop=[stop], logprobs=1) for one, stop in zip(params, stops, strict=True)]
    expected = engine().generate(prompts, params)
    assert all(output.outputs[0].finish_reason == "stop" for output in expected)
    for actual, same in zip(engine("itself").generate(prompts, params), expected, strict=True):
        assert_same_outputs(actual, same)
        assert len(actual.outputs[0].logprobs) == len(actual.outputs[0].token_ids)
        assert actual.outputs[0].cumulative_logprob == pytest.approx(same.outputs[0].cumulative_logprob, abs=1e-3)


def test_a_model_that_drafts_for_itself_is_accepted(engine) -> None:
    llm = engine("itself")
    llm.generate(make_prompts(2, 6), SamplingParams(temperature=0.9, seed=1, max_tokens=41, ignore_eos=True))
    stats = llm.get_stats()
    accepted, drafted = (stats[f"spec_decode_num_{name}_tokens_total"] for name in ("accepted", "draft"))
    assert accepted > 0.9 * drafted  # not all: earlier tests had penalties, which the draft does not apply
    assert stats["spec_decode_efficiency"] > 3.5


def test_a_proposer_that_raises_is_switched_off_and_named(engine) -> None:
    llm = engine("failing")
    llm.generate(make_prompts(3, 4), SamplingParams(temperature=0, max_tokens=16, ignore_eos=True))
    before = llm.get_stats()["spec_decode_num_draft_tokens_total"]
    llm.generate(make_prompts(3, 4), SamplingParams(temperature=0, max_tokens=16, ignore_eos=True))
    assert llm.get_stats()["spec_decode_num_draft_tokens_total"] == before
    assert llm.get_stats()["plugin_quarantines_total"] == 1


def test_a_proposer_on_the_host_that_holds_up_steps_is_quarantined(engine, caplog: pytest.LogCaptureFixture) -> None:
    llm = engine(None, spec_method="quire.core.testing.proposers:SlowHostProposer")
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    [output] = llm.generate([[5, 6, 7]], params)
    assert output.outputs[0].token_ids == engine().generate([[5, 6, 7]], params)[0].outputs[0].token_ids
    stats = llm.get_stats()
    assert stats["plugin_quarantines_total"] == 1 and stats["spec_decode_num_speculative_tokens"] == 0
    assert "SlowHostProposer is quarantined (too_slow)" in caplog.text


@pytest.mark.parametrize("proposer", ["draft", "repeater"])
@pytest.mark.parametrize("fields", [{"temperature": 1.0}, {"top_p": 0.7}, {"top_k": 3}, {"min_p": 0.2}])
def test_the_distribution_is_unchanged(engine, reference, proposer: str, fields: dict) -> None:
    """Chi-square over the second token, 200 seeds: what is sampled after drafts has the target's distribution."""
    llm = engine(proposer, max_num_seqs=64)
    count = 200
    bias = dict.fromkeys(range(8), 100.0)  # a vocabulary of eight
    params = [
        SamplingParams(**({"temperature": 4.0} | fields), seed=i, max_tokens=3, ignore_eos=True, logit_bias=bias)
        for i in range(count)
    ]
    got = [output.outputs[0].token_ids for output in llm.generate([[5, 6, 7]] * count, params)]
    seconds = torch.zeros(8, 8)
    for tokens in got:
        seconds[tokens[0], tokens[1]] += 1
    first = int(seconds.sum(1).argmax())
    with torch.inference_mode():
        logits = reference(torch.tensor([[5, 6, 7, first]])).logits[0, -1].float()
    scaled = logits[:8] / params[0].temperature
    probs = scaled.softmax(-1)
    keep = torch.ones(8, dtype=torch.bool)
    if "min_p" in fields:
        keep = probs >= fields["min_p"] * probs.max()
    if "top_k" in fields:
        keep = scaled >= scaled.sort(descending=True).values[fields["top_k"] - 1]
    if "top_p" in fields:
        ordered, index = probs.sort(descending=True)
        keep = torch.zeros(8, dtype=torch.bool).scatter_(0, index, ordered.cumsum(0) - ordered < fields["top_p"])
    expected = torch.where(keep, probs, 0.0)
    expected = expected / expected.sum() * seconds[first].sum()
    assert not seconds[first][~keep].any()
    statistic = float(((seconds[first] - expected)[keep] ** 2 / expected[keep]).sum())
    assert statistic < 30  # seven degrees of freedom at most: beyond the 1 - 1e-4 quantile


@pytest.mark.parametrize("proposer", ["itself", "random", "ngram", "host adversary"])
def test_banned_tokens_are_not_accepted_from_drafts(engine, proposer: str) -> None:
    """Drafts know nothing of bans: they hold at each position that a step verifies, after those accepted before it."""
    bans = [
        {"temperature": 0.9, "allowed_token_ids": [3, 9, 17, 40]},
        {"temperature": 0, "bad_words_token_ids": [[t] for t in range(3, 250, 2)] + [[6, 8], [10, 12, 14]]},
        {
            "temperature": 0.9,
            "allowed_token_ids": [4, 5, 6],
            "bad_words_token_ids": [[4, 5], [5, 5], [6, 4, 6], [6, 6, 6]],
        },
    ]
    prompts = make_prompts(6, len(bans))
    params = [SamplingParams(seed=i, n=2, max_tokens=24, ignore_eos=True, **ban) for i, ban in enumerate(bans)]
    expected = engine().generate(prompts, params)
    for actual, same, one in zip(engine(proposer).generate(prompts, params), expected, params, strict=True):
        assert_same_outputs(actual, same)
        for completion in actual.outputs:
            token_ids = completion.token_ids
            assert one.allowed_token_ids is None or set(token_ids) <= set(one.allowed_token_ids)
            for word in one.bad_words_token_ids:
                assert word not in [token_ids[i : i + len(word)] for i in range(len(token_ids))]
