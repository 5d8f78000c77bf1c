"""Masks in captured steps, without a GPU: a graph is replayed by calling its launch function again, and the kernels run
in the interpreter, so that this is the code of the GPU but for the capture itself (see ``test_gpu.py``)."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from tests.spec_decode.captured_steps import RepeatingCapturer, capture_steps
from tests.spec_decode.conftest import PROPOSERS

from quire import LLM, SamplingParams, StructuredOutputsParams
from quire.core.testing.tiny_models import make_tiny_model

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 1}
EXPRESSIONS = ["[0-9]{3}-[a-f]{4}", "(ab|cd){2,4}", r"\{ ?\"k\": ?(true|null) ?\}"]


def make_params() -> list[SamplingParams]:
    fields = [{"temperature": 0}, {"temperature": 1.0, "seed": 3, "top_p": 0.9}, {"temperature": 0, "logprobs": 1}]
    return [
        SamplingParams(max_tokens=24, structured_outputs=StructuredOutputsParams(regex=expression), **more)
        for expression, more in zip(EXPRESSIONS, fields, strict=True)
    ]


def assert_match(outputs) -> None:
    for output, expression in zip(outputs, EXPRESSIONS, strict=True):
        [completion] = output.outputs
        if completion.finish_reason == "stop":
            assert re.fullmatch(expression, completion.text), completion.text
        else:
            assert completion.finish_reason == "length"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_tiny_model("llama", tmp_path_factory.mktemp("captured") / "model", **SIZES))


@pytest.fixture(params=[None, "itself", "ngram"])
def captured(model: str, request) -> Iterator[tuple[LLM, RepeatingCapturer]]:
    settings = dict(PROPOSERS[request.param]) if request.param else {}
    if "speculative_model" in settings:
        settings["speculative_model"] = model
    if settings:
        settings |= {"speculative_config": {"adaptive": False}, "num_speculative_tokens": 2}
    llm = LLM(model, device="cpu", max_model_len=96, max_num_seqs=3, block_size=4, **settings)
    yield llm, capture_steps(llm)
    llm.shutdown()


def test_graphs_apply_masks(model: str, captured) -> None:
    plain = LLM(model, device="cpu", max_model_len=96, max_num_seqs=3, block_size=4)
    llm, capturer = captured
    prompts = [[5, 6, 7, 8] * 3, [9, 10, 11] * 4, [12, 13] * 5]
    expected = plain.generate(prompts, make_params())
    plain.shutdown()
    assert_match(expected)
    before = sum(graph.count for graph in capturer.graphs)
    for params in (
        make_params(),
        make_params()[:2],
    ):  # with log-probabilities sampling is launched, without it replayed
        outputs = llm.generate(prompts[: len(params)], params)
        for output, reference in zip(outputs, expected, strict=False):
            assert output.outputs[0].token_ids == reference.outputs[0].token_ids
    assert sum(graph.count for graph in capturer.graphs) > before + 6
    if llm.config.speculation is not None:
        assert llm.get_stats()["spec_decode_num_draft_tokens_total"] > 0
