"""On a GPU: graphs, eager steps and transformers agree; the embedded model answers as it does on a CPU."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from quire import LLM, SamplingParams
from quire.core.testing.oracle import compute_worst_gap

pytestmark = pytest.mark.gpu

MODEL = Path(__file__).resolve().parents[2] / "core" / "assets" / "quire-tiny"
GREEDY = SamplingParams(temperature=0, max_tokens=48, ignore_eos=True)


def prompts(count: int) -> list[list[int]]:
    rng = random.Random(7)
    return [[rng.randrange(300, 4000) for _ in range(rng.randrange(1, 300))] for _ in range(count)]


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 2e-3), ("bfloat16", 0.5)])
@pytest.mark.parametrize("eager", [False, True], ids=["graphs", "eager"])
def test_tokens_follow_the_reference(dtype: str, tolerance: float, eager: bool, waiting_forbidden: None) -> None:
    reference = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).cuda().eval()
    llm = LLM(
        model=str(MODEL),
        dtype=dtype,
        enforce_eager=eager,
        num_gpu_blocks_override=2000,
        max_num_seqs=24,
        max_num_batched_tokens=256,
    )
    sampled = SamplingParams(temperature=0.8, top_p=0.9, seed=3, max_tokens=48, ignore_eos=True)
    batch = prompts(40)
    for params in (GREEDY, sampled):
        for prompt, output in zip(batch, llm.generate(batch, params), strict=True):
            tokens = output.outputs[0].token_ids
            assert len(tokens) == 48
            # In scaled logits; in bf16 a token at the border of the nucleus may be in it or not.
            scaled, slack = tolerance / (params.temperature or 1), 0.1 if dtype == "bfloat16" else 0.0
            assert compute_worst_gap(reference, prompt, tokens, params, seed=3, filter_slack=slack) <= scaled
    llm.shutdown()


def test_graphs_change_nothing() -> None:
    """One request at a time, so that batch sizes are the same: then even the bits are."""
    answers = []
    for eager in (False, True):
        llm = LLM(model=str(MODEL), enforce_eager=eager, num_gpu_blocks_override=2000, max_num_seqs=8)
        answers.append([llm.generate([p], GREEDY)[0].outputs[0].token_ids for p in prompts(6)])
        llm.shutdown()
    assert answers[0] == answers[1]


def test_whatever_is_asked_no_launch_waits_for_the_device(waiting_forbidden: None) -> None:
    """What entering, sharing and leaving requests bring is queued behind the steps under way."""
    llm = LLM(model=str(MODEL), num_gpu_blocks_override=2000, max_num_seqs=8, max_num_batched_tokens=256)
    field_sets = [
        {},
        {"temperature": 0},
        {"temperature": 0.5, "top_k": 20, "min_p": 0.1, "seed": 5},
        {"n": 3},
        {"logprobs": 2, "prompt_logprobs": 1},
        {"frequency_penalty": 0.5, "repetition_penalty": 1.2},
        {"min_tokens": 5, "stop_token_ids": [7], "logit_bias": {8: 3.0}},
        {"bad_words_token_ids": [[7], [8, 9], [10, 9]], "logprob_token_ids": [3, 4]},
        {"allowed_token_ids": [300, 301, 302], "bad_words_token_ids": [[300, 301], [302]]},
    ]
    batch = [prompt for prompt in prompts(4) for _ in field_sets]
    asked = [SamplingParams(max_tokens=20, **fields) for _ in range(4) for fields in field_sets]
    for _ in range(2):  # the second time prompts are cached
        for output, params in zip(llm.generate(batch, asked), asked, strict=True):
            assert len(output.outputs) == params.n
            assert all(choice.token_ids for choice in output.outputs)
    stats = llm.get_stats()
    assert stats["prefix_cache_hits_total"] > 0
    assert stats["plugin_quarantines_total"] == stats["kernels_compiled_total"] == 0
    llm.shutdown()
