"""Every family and rope variant, paged and chunked, against transformers in float32."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.models.paged import PagedRunner, load
from transformers import AutoModelForCausalLM, PreTrainedModel

from quire.core.testing.tiny_models import MODEL_FAMILIES, ROPE_VARIANTS, make_tiny_model

TOLERANCE = 5e-5
"""Of logits of magnitude 7: float32 summed in another order."""

VARIANTS: dict[str, tuple[str, dict]] = {
    "llama-bias": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-mha": ("llama", {"num_key_value_heads": 4}),
    "llama-mqa": ("llama", {"num_key_value_heads": 1}),
    "llama-three-groups": ("llama", {"num_attention_heads": 6, "hidden_size": 96}),
    "llama-yarn-mscale": (
        "llama",
        {
            "rope": {
                "rope_type": "yarn",
                "rope_theta": 5000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 64,
                "mscale": 0.7,
                "mscale_all_dim": 1.3,
                "beta_fast": 16,
                "beta_slow": 2,
                "truncate": False,
            }
        },
    ),
    "mistral-window": ("mistral", {"sliding_window": 11}),
    "mistral-full": ("mistral", {"sliding_window": None}),
    "qwen2-window": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1, "num_hidden_layers": 3},
    ),
    "qwen3-window": (
        "qwen3",
        {
            "use_sliding_window": True,
            "sliding_window": 7,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "num_hidden_layers": 3,
        },
    ),
    "qwen3-bias": ("qwen3", {"attention_bias": True, "tie_word_embeddings": True}),
} | {f"{family}-{rope}": (family, {"rope": rope}) for family in MODEL_FAMILIES for rope in ROPE_VARIANTS}


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_transformers(variant: str, tmp_path: Path) -> None:
    """Three prompts in chunks, then greedy decoding together."""
    family, overrides = VARIANTS[variant]
    path = make_tiny_model(family, tmp_path, **overrides)
    model, reference = load(path), oracle(path)
    runner = PagedRunner(model, num_seqs=3, max_len=128)
    prompts = [tokens(seed, length) for seed, length in enumerate([5, 33, 70])]
    logits = {i: [] for i in range(3)}
    for chunks in ({0: prompts[0][:4], 1: prompts[1][:17]}, {2: prompts[2], 0: prompts[0][4:]}, {1: prompts[1][17:]}):
        for i, got in runner.step(chunks).items():
            logits[i].append(got)
    for _ in range(8):
        following = {i: [int(logits[i][-1][-1].argmax())] for i in range(3)}
        for i, token in following.items():
            prompts[i] += token
        for i, got in runner.step(following).items():
            logits[i].append(got)
    for i, prompt in enumerate(prompts):
        expected = forward(reference, prompt)
        torch.testing.assert_close(torch.cat(logits[i]), expected, atol=TOLERANCE, rtol=0)


def test_dynamic_rope_past_the_trained_length(tmp_path: Path) -> None:
    """Frequencies grow token by token, as in transformers' own decoding with a cache."""
    path = make_tiny_model("llama", tmp_path, rope="dynamic", max_position_embeddings=32)
    runner, reference = PagedRunner(load(path), num_seqs=1, max_len=64), oracle(path)
    prompt = tokens(0, 30)
    mine = runner.step({0: prompt})[0]
    with torch.inference_mode():
        output = reference(torch.tensor([prompt]), use_cache=True)
        for _ in range(12):
            torch.testing.assert_close(mine[-1], output.logits[0, -1], atol=TOLERANCE, rtol=0)
            token = int(mine[-1].argmax())
            mine = runner.step({0: [token]})[0]
            output = reference(torch.tensor([[token]]), past_key_values=output.past_key_values, use_cache=True)


@pytest.fixture(scope="module")
def windowed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PreTrainedModel]:
    overrides = VARIANTS["qwen3-window"][1]
    path = make_tiny_model("qwen3", tmp_path_factory.mktemp("qwen3"), **overrides)
    return path, oracle(path)


@settings(max_examples=10)
@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=4),
    sizes=st.lists(st.integers(1, 64), min_size=1, max_size=6),
    block_size=st.sampled_from([1, 4, 16]),
)
def test_any_chunks(
    windowed: tuple[Path, PreTrainedModel], lengths: list[int], sizes: list[int], block_size: int
) -> None:
    """How prompts are cut and what runs beside them changes nothing."""
    path, reference = windowed
    runner = PagedRunner(load(path, block_size=block_size), num_seqs=len(lengths), max_len=64)
    prompts = {i: tokens(i, n) for i, n in enumerate(lengths)}
    logits: dict[int, list[torch.Tensor]] = {i: [] for i in prompts}
    turn = 0
    while left := {i: p[runner.computed[i] :] for i, p in prompts.items() if runner.computed[i] < len(p)}:
        chunks = {i: rest[: sizes[(turn + i) % len(sizes)]] for i, rest in left.items()}
        for i, got in runner.step(chunks).items():
            logits[i].append(got)
        turn += 1
    for i, prompt in prompts.items():
        torch.testing.assert_close(torch.cat(logits[i]), forward(reference, prompt), atol=TOLERANCE, rtol=0)


def oracle(path: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()


def forward(reference: PreTrainedModel, prompt: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return reference(torch.tensor([prompt])).logits[0]


def tokens(seed: int, length: int) -> list[int]:
    return torch.randint(0, 256, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
