"""Wrong models, each caught by a named check."""

from __future__ import annotations

import pytest
import torch
from tests.plugin.mutations import Mutation

from quire.core.plugin.target import load_target
from quire.core.testing.conformance import run_check

Llama = load_target("quire.plugins.models.llama:LlamaForCausalLM")
LOGITS, CHUNKS = "check_logits_are_those_of_transformers", "check_chunks_and_decodes_give_the_logits_of_transformers"


class RandomNumbers(Llama):
    """Fluent, and of no use."""

    def compute_logits(self, hidden):
        return torch.randn_like(super().compute_logits(hidden))


class NoConfig(Llama):
    """Names nothing that could be checked."""

    @classmethod
    def example_config(cls):
        return {}


class PositionsOfTheStep(Llama):
    """Right for whole prompts alone: counts positions from the step's first token."""

    def forward(self, input_ids, positions, context):
        return super().forward(input_ids, positions - positions.min(), context)


class OneSpec(Llama):
    """One layer of all."""

    def attention_specs(self):
        return super().attention_specs()[:1]


@pytest.mark.parametrize(
    ("cls", "check"),
    [
        (RandomNumbers, LOGITS),
        (NoConfig, LOGITS),
        (PositionsOfTheStep, CHUNKS),
        (OneSpec, "check_each_layer_has_a_spec"),
    ],
)
def test_a_wrong_model_is_noticed(cls, check):
    assert run_check(cls, check).outcome == "failed"


FAULTS = [
    ("Llama", "else self.norm(x, residual)[0]", "else x", LOGITS),
    ("Llama", "self.self_attn(self.input_layernorm, x, residual", "(x, residual) or (x, residual", LOGITS),
    ("Llama", "            config.num_hidden_layers,", "            config.num_hidden_layers - 1,", LOGITS),
    ("Llama", "num_kv_heads=config.num_key_value_heads", "num_kv_heads=config.num_attention_heads", LOGITS),
    ("Llama", "capture_layer(index, x, residual)", "capture_layer(index, x, None)", "check_auxiliary_hidden_states"),
    ("Llama", 'f"{name}.post_attention_layernorm"', 'f"{name}.input_layernorm"', LOGITS),
    ("Mistral", "sliding_window=config.sliding_window", "sliding_window=None", LOGITS),
    ("Mistral", "sliding_window=config.sliding_window", "sliding_window=config.sliding_window + 1", LOGITS),
    ("Qwen2", "qkv_bias=True", "qkv_bias=False", LOGITS),
    ("Qwen2", "config.layer_types[layer]", "config.layer_types[0]", LOGITS),
    ("Qwen3", "qk_norm_eps=config.rms_norm_eps", "qk_norm_eps=None", LOGITS),
]


@pytest.mark.parametrize(("family", "old", "new", "check"), FAULTS, ids=str)
def test_a_fault_in_a_bundled_model_is_noticed(family, old, new, check):
    assert Mutation(f"model/{family}ForCausalLM", old, new, check).run_check().outcome == "failed"
