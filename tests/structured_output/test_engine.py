"""Structured output through the engine, and together with everything else that a request may ask for."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import jsonschema
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.spec_decode.eagle3_reference import make_eagle3_head
from tests.structured_output.conftest import TINY

from quire import LLM, SamplingParams, StructuredOutputsParams
from quire.core.errors import InvalidRequestError

SCHEMAS = [
    {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer", "maximum": 120}},
        "required": ["name", "age"],
        "additionalProperties": False,
    },
    {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "minItems": 2, "maxItems": 4},
    {
        "type": "object",
        "properties": {"ok": {"type": "boolean"}, "code": {"type": "string", "pattern": "^[A-Z]{2}[0-9]{3}$"}},
        "required": ["ok", "code"],
        "additionalProperties": False,
    },
    {"anyOf": [{"type": "integer", "minimum": 0, "maximum": 9}, {"type": "null"}]},
]
PROMPT = "The answer as JSON, with a name and an age: "
ENDS = ".(=:;"
MODEL = "quire-tiny-draft"
ENGINE = {"model": MODEL, "max_model_len": 512, "device": "cpu", "max_num_seqs": 8}
PROPOSERS = {
    "draft model": {"speculative_model": "BLURRED"},
    "eagle3": {"spec_method": "eagle3", "speculative_model": "HEAD"},
    "ngram": {"spec_method": "ngram", "plugin_options": {"spec_decode": {"prompt_lookup_min": "1"}}},
    "suffix": {"spec_method": "suffix"},
    "forced tokens": {"spec_method": "forced_tokens", "num_speculative_tokens": 8},
    "random on the device": {"spec_method": "quire.core.testing.proposers:AdversarialDeviceProposer"},
    "random on the host": {"spec_method": "quire.core.testing.proposers:AdversarialHostProposer"},
}


def make_params(count: int = 8, **fields) -> list[SamplingParams]:
    return [
        SamplingParams(
            **{"temperature": 0.7 * (i % 3), "seed": i, "max_tokens": 120} | fields,
            structured_outputs=StructuredOutputsParams(json=SCHEMAS[i % 4], disable_any_whitespace=i % 2 == 0),
        )
        for i in range(count)
    ]


def make_reasoned_params() -> list[SamplingParams]:
    """Free text comes first, up to one of several signs."""
    constraints = [
        StructuredOutputsParams(json=schema, disable_any_whitespace=True, reasoning_end=list(ENDS))
        for schema in SCHEMAS
    ]
    return [
        SamplingParams(temperature=0.7, seed=i, max_tokens=250, structured_outputs=constraint)
        for i, constraint in enumerate(constraints)
    ]


def make_prompts(count: int) -> list[str]:
    return [PROMPT + "x" * (i % 4) for i in range(count)]


def make_blurred_copy(folder: Path) -> Path:
    """The model, with weights so changed that it drafts much that is wrong."""
    shutil.copytree(TINY.with_name(MODEL), folder)
    [path] = folder.glob("*.safetensors")
    random = torch.Generator().manual_seed(0)
    tensors = {
        name: (weight + 0.3 * weight.float().std() * torch.randn(weight.shape, generator=random)).to(weight.dtype)
        for name, weight in load_file(path).items()
    }
    save_file(tensors, path, metadata={"format": "pt"})
    return folder


def assert_valid(outputs) -> None:
    for i, output in enumerate(outputs):
        for completion in output.outputs:
            assert completion.finish_reason == "stop", completion
            jsonschema.validate(json.loads(completion.text), SCHEMAS[i % 4])


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    llm = LLM(**ENGINE)
    yield llm
    llm.shutdown()


@pytest.fixture(scope="module")
def expected(llm: LLM):
    """Token ids without drafts, of ``make_params(8)``."""
    outputs = llm.generate(make_prompts(8), make_params())
    assert_valid(outputs)
    reasoned = llm.generate(make_prompts(4), make_reasoned_params())
    for i, output in enumerate(reasoned):
        thought, answer = re.split(f"[{ENDS}]", output.outputs[0].text, maxsplit=1)
        assert thought and output.outputs[0].finish_reason == "stop"
        jsonschema.validate(json.loads(answer), SCHEMAS[i])
    return [output.outputs[0].token_ids for output in (*outputs, *reasoned)]


@pytest.mark.parametrize("proposer", PROPOSERS)
def test_drafts_change_no_token_and_none_is_invalid(proposer, expected, tmp_path) -> None:
    settings = dict(PROPOSERS[proposer])
    if settings.get("speculative_model") == "HEAD":
        settings["speculative_model"] = str(
            make_eagle3_head(tmp_path / "head", TINY.with_name(MODEL), [[5, 6, 7, 8] * 8])
        )
    elif settings.get("speculative_model") == "BLURRED":
        settings["speculative_model"] = str(make_blurred_copy(tmp_path / "blurred"))
    llm = LLM(**ENGINE, speculative_config={"adaptive": False}, **settings)
    try:
        outputs = llm.generate(make_prompts(8), make_params())
        assert_valid(outputs)
        # Drafts reach over the end of the reasoning: what follows it in the same step is held to the schema as well.
        reasoned = llm.generate(make_prompts(4), make_reasoned_params())
        assert [output.outputs[0].token_ids for output in (*outputs, *reasoned)] == expected
        stats = llm.get_stats()
        assert stats["spec_decode_num_draft_tokens_total"] > 0
        if proposer == "draft model":
            assert 0.1 < stats["spec_decode_draft_acceptance_rate"] < 0.9
    finally:
        llm.shutdown()


def test_forced_tokens_save_steps(expected) -> None:
    steps = {}
    for method in ({}, {"spec_method": "forced_tokens", "num_speculative_tokens": 8}):
        config = {"speculative_config": {"adaptive": False}} if method else {}
        llm = LLM(**ENGINE, **method, **config)
        llm.generate(PROMPT, make_params()[0])
        stats = llm.get_stats()
        steps[bool(method)] = stats["steps_total"]
        llm.shutdown()
    assert stats["spec_decode_draft_acceptance_rate"] > 0.6
    assert steps[True] < steps[False]


@pytest.mark.parametrize(
    "settings",
    [
        {"num_gpu_blocks_override": 12, "block_size": 8, "max_model_len": 88},
        {"max_num_batched_tokens": 8, "max_num_seqs": 8},
        {"max_num_seqs": 1, "max_num_batched_tokens": 4},
        {"enable_prefix_caching": False},
        {"spec_method": "ngram", "num_gpu_blocks_override": 14, "block_size": 8, "max_model_len": 88},
    ],
    ids=["preemption", "chunks", "one by one", "no prefix cache", "preemption with drafts"],
)  # fmt: skip
def test_the_engine_may_do_as_it_likes(settings, expected) -> None:
    limit = {"max_tokens": 40} if "max_model_len" in settings else {}
    llm = LLM(**(ENGINE | settings))
    try:
        for _ in range(2):  # the second time prefixes are cached
            outputs = llm.generate(make_prompts(8), make_params(**limit))
            for output, token_ids in zip(outputs, expected[:8], strict=True):
                assert output.outputs[0].token_ids == token_ids[: limit.get("max_tokens")]
        if "num_gpu_blocks_override" in settings:
            assert llm.get_stats()["num_preemptions_total"] > 0
    finally:
        llm.shutdown()


def test_several_answers_differ_and_all_match(llm: LLM) -> None:
    outputs = llm.generate(make_prompts(4), make_params(4, n=4, temperature=1.2))
    assert_valid(outputs)
    assert len({completion.text for completion in outputs[0].outputs}) > 1


@pytest.mark.parametrize(
    "fields",
    [
        {"repetition_penalty": 1.3, "frequency_penalty": 0.5},
        {"logprobs": 3, "prompt_logprobs": 1},
        {"logit_bias": {93: -100.0, 5: 50.0}},
        {"top_k": 3, "top_p": 0.5, "min_p": 0.01, "temperature": 1.5},
    ],
    ids=["penalties", "logprobs", "logit_bias", "filters"],
)
def test_other_parameters_apply_beside_it(llm: LLM, fields) -> None:
    outputs = llm.generate(make_prompts(4), make_params(4, **fields))
    assert_valid(outputs)
    if "logprobs" in fields:
        assert all(len(o.outputs[0].logprobs) == len(o.outputs[0].token_ids) for o in outputs)


def test_requests_without_a_grammar_are_not_touched(llm: LLM) -> None:
    plain = SamplingParams(temperature=0.8, seed=3, max_tokens=24)
    [alone] = llm.generate("The weather", plain)
    beside = llm.generate(["The weather", *make_prompts(4)], [plain, *make_params(4)])
    assert beside[0].outputs[0].token_ids == alone.outputs[0].token_ids


def test_each_kind_of_constraint(llm: LLM) -> None:
    def answer(**fields) -> str:
        params = SamplingParams(
            temperature=1, seed=1, max_tokens=80, structured_outputs=StructuredOutputsParams(**fields)
        )
        [completion] = llm.generate(PROMPT, params)[0].outputs
        assert completion.finish_reason == "stop"
        return completion.text

    assert answer(choice=["yes", "no"]) in ("yes", "no")
    assert re.fullmatch(r"\d{3}-[a-f]{4}", answer(regex=r"\d{3}-[a-f]{4}"))
    assert re.fullmatch(r"a\d{1,3}", answer(grammar='root ::= "a" [0-9] [0-9]? [0-9]?'))
    assert re.fullmatch(r"[ab]{4}", answer(grammar="start: LETTER LETTER LETTER LETTER\nLETTER: /[ab]/"))
    tag = {
        "structures": [{"begin": "<f>", "schema": SCHEMAS[3], "end": "</f>"}],
        "triggers": ["<f>"],
        "free_text": False,
    }
    assert re.fullmatch(r"(<f>(\d|null)</f>)", answer(structural_tag={**tag, "stop_after_first": True}))


def test_an_answer_cut_by_the_limit_says_so(llm: LLM) -> None:
    [output] = llm.generate(PROMPT, make_params(1, max_tokens=5))
    assert output.outputs[0].finish_reason == "length"
    assert len(output.outputs[0].token_ids) == 5


def test_min_tokens_holds_while_the_grammar_can_go_on(llm: LLM) -> None:
    digits = StructuredOutputsParams(regex=r"\d{1,40}")
    params = SamplingParams(temperature=1, seed=1, max_tokens=60, min_tokens=9, structured_outputs=digits)
    assert 9 <= len(llm.generate(PROMPT, params)[0].outputs[0].token_ids) <= 41
    choice = StructuredOutputsParams(choice=["yes"])
    params = SamplingParams(max_tokens=60, min_tokens=50, ignore_eos=True, structured_outputs=choice)
    assert llm.generate(PROMPT, params)[0].outputs[0].text == "yes"


def test_free_text_passes_until_reasoning_ends(llm: LLM) -> None:
    constraint = StructuredOutputsParams(choice=["yes", "no"], reasoning_end="</think>")
    params = SamplingParams(temperature=1, seed=5, max_tokens=30, structured_outputs=constraint)
    text = llm.generate(PROMPT, params)[0].outputs[0].text
    assert text and text not in ("yes", "no")  # free, as this model does not write </think>
    constraint = StructuredOutputsParams(choice=["yes", "no"], reasoning_start="<think>", reasoning_end="</think>")
    params = SamplingParams(temperature=0, max_tokens=30, structured_outputs=constraint, logit_bias={90: 0.0})
    text = llm.generate(PROMPT, params)[0].outputs[0].text
    assert text in ("yes", "no") or text.startswith("<think>")


def test_what_cannot_be_enforced_is_refused_before_anything_runs(llm: LLM) -> None:
    steps = llm.get_stats()["steps_total"]
    for fields, message in (
        ({"structured_outputs": {"json": {"not": {}}}}, "'not'"),
        ({"structured_outputs": {"regex": "(a"}}, "regex"),
        ({"structured_outputs": {"choice": ["a"]}, "allowed_token_ids": [1]}, "allowed_token_ids"),
    ):
        with pytest.raises(InvalidRequestError, match=message):
            llm.generate([PROMPT, PROMPT], [SamplingParams(), SamplingParams(**fields)])
    assert llm.get_stats()["steps_total"] == steps
    assert llm.get_stats()["structured_output_refused_total"] >= 2


def test_equal_constraints_are_compiled_once(llm: LLM) -> None:
    before = llm.get_stats()
    params = SamplingParams(max_tokens=4, n=3, structured_outputs=StructuredOutputsParams(regex="[xyz]{2}"))
    llm.generate([PROMPT] * 3, params)
    after = llm.get_stats()
    key = "structured_output_compilations_total"
    assert after[key] - before[key] == 1
    assert after["structured_output_cache_hits_total"] - before["structured_output_cache_hits_total"] >= 8
    assert after["structured_output_masks_total"] > before["structured_output_masks_total"]


def test_the_names_of_vllm() -> None:
    import quire.sampling_params
    from quire import GuidedDecodingParams  # type: ignore[attr-defined]

    assert quire.sampling_params.GuidedDecodingParams is GuidedDecodingParams
    params = SamplingParams(guided_decoding=GuidedDecodingParams(choice=["a"], backend="xgrammar"))
    assert params.guided_decoding is None
    assert params.structured_outputs == StructuredOutputsParams(choice=["a"], backend="xgrammar")
    with pytest.raises(InvalidRequestError, match="give one"):
        SamplingParams(guided_decoding={"choice": ["a"]}, structured_outputs={"choice": ["a"]})
