"""Sampled tokens of bf16 logits, teacher-forced: every token against a reference of higher precision.

Triton's interpreter computes bf16 wrongly, so the kernels' part is for a GPU; see also ``tests/e2e/test_gpu.py``.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from quire import LLM, SamplingParams
from quire.core.contracts.sampler import SamplingBatch
from quire.core.sample.noise import gumbel
from quire.core.sample.sampler import GumbelSampler
from quire.core.testing.oracle import compute_worst_gap

MODEL = Path(__file__).resolve().parents[2] / "core" / "assets" / "quire-tiny"
PARAMS = [
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 0.6, "top_p": 0.9},
    {"temperature": 1.3, "top_k": 20},
    {"temperature": 0.9, "min_p": 0.1},
    {"temperature": 0.8, "top_k": 40, "top_p": 0.8, "min_p": 0.02},
]


def sample_float64(logits: Tensor, params: dict[str, float], seed: int, position: int) -> int:
    """The definition, in float64, for one row: sort, cut off, add the noise, take the largest."""
    temperature = params["temperature"]
    if temperature == 0:
        return int(logits.double().argmax())
    x = logits.double() / temperature
    x[x < x.max() + torch.tensor(params.get("min_p", 0.0), dtype=torch.float64).log()] = -torch.inf
    if top_k := int(params.get("top_k", 0)):
        x[x < x.topk(top_k).values[-1]] = -torch.inf
    p = x.softmax(-1)
    mass_above = torch.stack([p[x > value].sum() for value in x])
    x[(mass_above >= params.get("top_p", 2.0)) & (mass_above > 0)] = -torch.inf
    noise = gumbel(torch.tensor([seed]), torch.tensor([position]), len(x))[0]
    return int((x + noise.double()).argmax())


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("params", PARAMS, ids=str)
def test_tokens_of_bf16_logits_are_those_of_float64(params: dict[str, float], device: str) -> None:
    """The kernels are given bf16 as a model leaves it; the torch code the same values in float32."""
    n, vocab = 64, 300
    logits = (torch.randn(n, vocab, generator=torch.Generator().manual_seed(4)) * 2).bfloat16()
    batch = SamplingBatch(
        temperature=torch.full((n,), params["temperature"]),
        top_k=torch.full((n,), int(params.get("top_k", 0)), dtype=torch.int32),
        top_p=torch.full((n,), params.get("top_p", 1.0)),
        min_p=torch.full((n,), params.get("min_p", 0.0)),
        seed=torch.arange(n) * 7919,
        position=torch.arange(n) + 3,
        any_random=params["temperature"] > 0,
        any_top_k="top_k" in params,
        any_top_p="top_p" in params,
        any_min_p="min_p" in params,
    )
    expected = [sample_float64(logits[i], params, i * 7919, i + 3) for i in range(n)]
    if device == "cuda":
        names = ("temperature", "top_k", "top_p", "min_p", "seed", "position")
        for name in names:
            setattr(batch, name, getattr(batch, name).cuda())
        tokens = GumbelSampler(vocab, torch.device(device)).sample(logits.cuda(), batch)
    else:
        tokens = GumbelSampler(vocab, torch.device(device)).sample(logits.float(), batch)
    assert tokens.tolist() == expected


@pytest.fixture(scope="module")
def engine():
    llm = LLM(model=str(MODEL), dtype="bfloat16", device="cpu", max_model_len=192)
    yield llm
    llm.shutdown()


@pytest.fixture(scope="module")
def reference():
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()


@pytest.mark.parametrize("params", PARAMS, ids=str)
def test_a_bf16_engine_follows_the_float32_reference(engine, reference, params: dict[str, float]) -> None:
    rng = random.Random(7)
    prompts = [[rng.randrange(300, 4000) for _ in range(rng.randrange(1, 100))] for _ in range(8)]
    sampling = SamplingParams(**params, seed=3, max_tokens=24, ignore_eos=True)
    for prompt, output in zip(prompts, engine.generate(prompts, sampling), strict=True):
        tokens = output.outputs[0].token_ids
        gap = compute_worst_gap(reference, prompt, tokens, sampling, seed=3, filter_slack=0.1)
        assert gap <= 0.25 / (sampling.temperature or 1)  # scaled logits; another seed is off by more than 3
        if not sampling.greedy:
            assert compute_worst_gap(reference, prompt, tokens, sampling, seed=4, filter_slack=0.1) > 1
