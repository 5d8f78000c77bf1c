"""Prompts, arguments and names as scripts for vLLM write them."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

import quire
from quire import LLM, AsyncLLM, EngineArgs, SamplingParams
from quire.core.errors import CheckpointError, InvalidRequestError, UnsupportedError

GREEDY = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)


def token_ids(llm: LLM, prompts: object, **options: object) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in llm.generate(prompts, GREEDY, **options)]


def test_prompts_in_mappings_are_what_they_hold(llm: LLM) -> None:
    ids = llm.tokenizer.encode("hello there")
    [expected] = token_ids(llm, "hello there")
    assert token_ids(llm, {"prompt": "hello there"}) == [expected]
    assert token_ids(llm, {"prompt_token_ids": ids, "multi_modal_data": None}) == [expected]
    mixed = [{"prompt_token_ids": ids}, {"prompt": "hello there", "cache_salt": "a"}, "hello there", ids]
    assert token_ids(llm, mixed) == [expected] * 4
    [output] = llm.generate([{"prompt": "hello there"}], GREEDY)
    assert output.prompt == "hello there" and output.prompt_token_ids == ids


@pytest.mark.parametrize(
    ("prompt", "error", "message"),
    [
        ({}, InvalidRequestError, "holds 'prompt' or 'prompt_token_ids'"),
        ({"prompt": 3}, InvalidRequestError, "holds 'prompt' or 'prompt_token_ids'"),
        ({"prompt": "x", "multi_modal_data": {"image": 1}}, UnsupportedError, "'multi_modal_data' is not supported"),
        ({"prompt_embeds": [0.5]}, UnsupportedError, "'prompt_embeds' is not supported"),
    ],
    ids=lambda v: ",".join(v) if isinstance(v, dict) else "",
)
def test_other_mappings_are_refused(llm: LLM, prompt: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        llm.generate([prompt], GREEDY)


def test_priorities_for_all_or_one_each(llm: LLM) -> None:
    expected = token_ids(llm, ["a", "b"])
    assert token_ids(llm, ["a", "b"], priority=[1, 0]) == expected
    assert token_ids(llm, ["a", "b"], priority=2) == token_ids(llm, ["a", "b"], priority=None) == expected
    with pytest.raises(InvalidRequestError, match="2 prompts but 1 priorities"):
        llm.generate(["a", "b"], GREEDY, priority=[1])


def test_the_tokenizer_is_transformers(llm: LLM) -> None:
    tokenizer = llm.get_tokenizer()
    assert tokenizer.decode(tokenizer.encode("hello there"), skip_special_tokens=True) == "hello there"
    assert quire.get_tokenizer(llm.config.model.tokenizer_path).encode("hello there") == tokenizer.encode("hello there")
    assert quire.get_tokenizer("quire-tiny").chat_template
    with pytest.raises(CheckpointError, match="no tokenizer that can be loaded"):
        quire.get_tokenizer("no/such/folder")


def test_calls_as_scripts_for_vllm_make_them(llm: LLM) -> None:
    """What is off asks for nothing; what asks for something is refused by name, and so is a typo."""
    [expected] = token_ids(llm, "hello there")
    off = {"lora_request": None, "prompt_adapter_request": None, "guided_options_request": None}
    assert token_ids(llm, "hello there", **off) == [expected]
    ids = llm.tokenizer.encode("hello there")
    for prompts in (ids, [ids]):
        [output] = llm.generate(prompt_token_ids=prompts, sampling_params=GREEDY)
        assert output.outputs[0].token_ids == expected and output.outputs[0].finished()
    talk = [{"role": "user", "content": "hi"}]
    assert llm.chat(talk, GREEDY, use_tqdm=False, lora_request=None, chat_template_content_format="openai")
    for call in (llm.generate, llm.chat):
        argument = talk if call == llm.chat else "x"
        with pytest.raises(UnsupportedError, match=r"prompt_adapter_request=3: prompt adapters are not supported"):
            call(argument, GREEDY, prompt_adapter_request=3)
        with pytest.raises(InvalidRequestError, match="lora_request must be a LoRARequest, got 3"):
            call(argument, GREEDY, lora_request=3)
        with pytest.raises(TypeError, match="unexpected keyword argument 'use_tdqm'"):
            call(argument, GREEDY, use_tdqm=True)
    for wrong in ({}, {"prompts": "x", "prompt_token_ids": ids}):
        with pytest.raises(InvalidRequestError, match="either prompts or prompt_token_ids"):
            llm.generate(**wrong)


def test_parameters_are_set_field_by_field(llm: LLM) -> None:
    params = llm.get_default_sampling_params()
    params.max_tokens, params.temperature, params.ignore_eos = 3, 0, True
    [output] = llm.generate("hello there", params)
    params.max_tokens = 7
    assert len(output.outputs[0].token_ids) == 3 and params.temperature == 0
    assert len(llm.generate("hello there", params)[0].outputs[0].token_ids) == 7
    other = params.clone()
    other.stop = ["x"]
    assert params.stop == [] and other.max_tokens == 7
    params.top_p = 2.0
    with pytest.raises(InvalidRequestError, match="top_p"):
        llm.generate("hello there", params)


def test_names_of_vllm() -> None:
    assert quire.AsyncLLMEngine is AsyncLLM
    assert quire.AsyncEngineArgs is EngineArgs
    assert {"LLM", "AsyncLLM", "AsyncLLMEngine", "EngineArgs", "SamplingParams"} <= set(dir(quire))
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = quire.no_such_name


def test_an_engine_from_its_arguments(tiny: Path) -> None:
    args = EngineArgs(model=str(tiny), device="cpu", num_gpu_blocks_override=64, max_model_len=64)
    for cls in (quire.LLMEngine, LLM):
        engine = cls.from_engine_args(args)
        assert engine.config.cache.num_blocks == 64
        engine.shutdown()

    async def run() -> str:
        engine = quire.AsyncLLMEngine.from_engine_args(args)
        try:
            await engine.start()
            assert (await engine.get_tokenizer()).encode("x")
            arguments = {"sampling_params": GREEDY, "request_id": "1", "lora_request": None}
            async for output in engine.generate({"prompt": "x"}, **arguments):
                last = output
            with pytest.raises(TypeError, match="unexpected keyword argument 'trace'"):
                await anext(engine.generate("x", GREEDY, trace=None))
            with pytest.raises(InvalidRequestError, match="adapters are off"):
                await anext(engine.generate("x", GREEDY, lora_request=quire.LoRARequest("a", 1, "/a")))
            return last.request_id
        finally:
            await engine.shutdown()

    assert asyncio.run(run()) == "1"
