"""Masks in captured graphs, and copies that nothing waits for."""

from __future__ import annotations

import json

import jsonschema
import pytest
import torch

from quire import LLM, SamplingParams, StructuredOutputsParams

pytestmark = pytest.mark.gpu

SCHEMAS = [
    {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer", "maximum": 120}},
        "required": ["name", "age"],
        "additionalProperties": False,
    },
    {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "minItems": 2, "maxItems": 4},
]
PROMPTS = [f"The answer as JSON, number {i}: " for i in range(24)]
SETTINGS = {
    "graphs": {},
    "ngram": {"spec_method": "ngram", "plugin_options": {"spec_decode": {"prompt_lookup_min": "1"}}},
    "forced tokens": {"spec_method": "forced_tokens", "num_speculative_tokens": 8},
    "draft model": {"speculative_model": "quire-tiny-draft", "num_speculative_tokens": 3},
}


def make_params() -> list[SamplingParams]:
    """Greedy and random requests, some without a grammar, some with log-probabilities or penalties."""
    params = []
    for i in range(len(PROMPTS)):
        fields = [{}, {"temperature": 0.8, "top_p": 0.9}, {"logprobs": 2}, {"frequency_penalty": 0.3}][i // 2 % 4]
        constraint = None if i % 5 == 4 else StructuredOutputsParams(json=SCHEMAS[i % 2], disable_any_whitespace=True)
        fields = {"temperature": 0, "seed": i, "max_tokens": 96} | fields
        params.append(SamplingParams(**fields, structured_outputs=constraint))
    return params


def make_llm(**settings) -> LLM:
    # In float32 graphs and single launches sum alike: the same tokens to the last.
    return LLM(
        "quire-tiny", dtype="float32", max_model_len=512, max_num_seqs=32, num_gpu_blocks_override=2000, **settings
    )


@pytest.fixture(scope="module")
def expected() -> list[list[int]]:
    llm = make_llm(enforce_eager=True)
    outputs = llm.generate(PROMPTS, make_params())
    llm.shutdown()
    return [output.outputs[0].token_ids for output in outputs]


@pytest.mark.parametrize("name", SETTINGS)
def test_graphs_with_masks_give_the_tokens_of_single_launches(name, expected, waiting_forbidden) -> None:
    speculation = {"speculative_config": {"adaptive": False}} if SETTINGS[name] else {}
    llm = make_llm(**SETTINGS[name], **speculation)
    try:
        outputs = llm.generate(PROMPTS, make_params())
        for i, (output, params) in enumerate(zip(outputs, make_params(), strict=True)):
            if params.structured_outputs is not None:
                jsonschema.validate(json.loads(output.outputs[0].text), SCHEMAS[i % 2])
        same = sum(o.outputs[0].token_ids == token_ids for o, token_ids in zip(outputs, expected, strict=True))
        assert same >= len(PROMPTS) - 2  # near ties
        assert llm.get_stats()["kernels_compiled_total"] == 0
    finally:
        llm.shutdown()


def test_steps_without_a_grammar_are_what_they_are_without_the_feature() -> None:
    tokens = []
    for backend in ("auto", "none"):
        llm = make_llm(structured_output_backend=backend)
        params = SamplingParams(temperature=0.9, seed=1, max_tokens=48, ignore_eos=True)
        tokens.append([output.outputs[0].token_ids for output in llm.generate(PROMPTS, params)])
        llm.shutdown()
        torch.cuda.empty_cache()
    assert tokens[0] == tokens[1]
