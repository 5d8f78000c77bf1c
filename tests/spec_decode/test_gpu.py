"""On a GPU: tokens with speculation match the reference, with every proposer, in CUDA graphs and eagerly."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from quire import LLM, SamplingParams
from quire.core.testing.oracle import compute_worst_gap

from .eagle3_reference import make_eagle3_head

pytestmark = pytest.mark.gpu

MODEL = Path(__file__).resolve().parents[2] / "core" / "assets" / "quire-tiny"
CONFIGS = {
    "draft": {"speculative_model": str(MODEL) + "-draft"},
    "itself": {"speculative_model": str(MODEL), "num_speculative_tokens": 3},
    "ngram": {"spec_method": "ngram"},
    "eagle3": {"spec_method": "eagle3"},
    "eagle3 eager": {"spec_method": "eagle3", "enforce_eager": True},
    "eager": {"speculative_model": str(MODEL) + "-draft", "enforce_eager": True},
}


RNG = random.Random(7)
BATCH = [[RNG.randrange(300, 4000) for _ in range(RNG.randrange(1, 300))] for _ in range(40)]


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An EAGLE-3 head that is fitted to quire-tiny's continuations of some of these prompts."""
    folder = tmp_path_factory.mktemp("head") / "head"
    training_prompts = [prompt for prompt in BATCH if len(prompt) < 150]
    return str(make_eagle3_head(folder, MODEL, training_prompts, num_heads=6, num_draftable_tokens=3000))


@pytest.mark.parametrize("config", CONFIGS)
def test_tokens_match_the_reference(config: str, head: str, waiting_forbidden: None) -> None:
    reference = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).cuda().eval()
    sizes = {"num_gpu_blocks_override": 2000, "max_num_seqs": 24, "max_num_batched_tokens": 256}
    arguments = CONFIGS[config] | ({"speculative_model": head} if config.startswith("eagle3") else {})
    llm = LLM(model=str(MODEL), dtype="float32", speculative_config={"adaptive": False}, **sizes, **arguments)
    params_of = [
        SamplingParams(temperature=0, max_tokens=48, ignore_eos=True),
        SamplingParams(temperature=0.8, top_p=0.9, seed=3, max_tokens=48, ignore_eos=True),
        SamplingParams(temperature=0.8, seed=3, max_tokens=20, ignore_eos=True, logprobs=2, min_tokens=4),
    ]
    for params in params_of:
        for prompt, output in zip(BATCH, llm.generate(BATCH, params), strict=True):
            tokens = output.outputs[0].token_ids
            assert len(tokens) == params.max_tokens
            assert compute_worst_gap(reference, prompt, tokens, params, seed=3) <= 2e-3
    stats = llm.get_stats()
    if config == "itself":
        assert stats["spec_decode_draft_acceptance_rate"] > 0.95
    assert stats["spec_decode_num_accepted_tokens_total"] > 0
    assert stats["plugin_quarantines_total"] == stats["kernels_compiled_total"] == 0
    llm.shutdown()
