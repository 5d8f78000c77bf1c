"""What a caller of ``LLM`` notices: each sampling parameter, n, log-probabilities, errors."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from quire import LLM, Logprob, SamplingParams, SchedulingParams
from quire.core.errors import ConfigError, InvalidRequestError, PluginError

PROMPT = list(range(5, 25))


def tokens(llm: LLM, **fields) -> list[int]:
    params = SamplingParams(**{"temperature": 0, "max_tokens": 12, "ignore_eos": True, **fields})
    return llm.generate([PROMPT], params)[0].outputs[0].token_ids


def test_output_has_what_users_read(llm: LLM) -> None:
    [output] = llm.generate("hello there", SamplingParams(temperature=0, max_tokens=5, ignore_eos=True))
    assert output.prompt == "hello there"
    assert output.finished
    [completion] = output.outputs
    assert completion.finish_reason == "length"
    assert len(completion.token_ids) == 5
    assert completion.text == llm.tokenizer.decode(completion.token_ids, skip_special_tokens=True)


def test_seed_reproduces_and_no_seed_varies(llm: LLM) -> None:
    seeded = {"temperature": 1.0, "seed": 42, "max_tokens": 20}
    assert tokens(llm, **seeded) == tokens(llm, **seeded)
    assert tokens(llm, **{**seeded, "seed": None}) != tokens(llm, **{**seeded, "seed": None})


def test_n_continuations_draw_with_consecutive_seeds(llm: LLM) -> None:
    params = SamplingParams(n=4, temperature=1.0, seed=7, max_tokens=10, ignore_eos=True)
    [output] = llm.generate([PROMPT], params)
    assert [c.index for c in output.outputs] == [0, 1, 2, 3]
    for i, completion in enumerate(output.outputs):
        assert completion.token_ids == tokens(llm, temperature=1.0, seed=7 + i, max_tokens=10)


def test_logprobs_are_the_models(llm: LLM, reference: PreTrainedModel) -> None:
    params = SamplingParams(temperature=0, max_tokens=6, logprobs=3, ignore_eos=True)
    [completion] = llm.generate([PROMPT], params)[0].outputs
    with torch.inference_mode():
        logits = reference(torch.tensor([[*PROMPT, *completion.token_ids]])).logits[0, len(PROMPT) - 1 : -1]
    expected = logits.float().log_softmax(-1)
    assert completion.logprobs is not None
    chosen = []
    for token, position, row in zip(completion.token_ids, completion.logprobs, expected, strict=True):
        best = row.topk(3)
        assert list(position) == best.indices.tolist(), "the chosen token comes first, and greedy chooses the best"
        assert [each.logprob for each in position.values()] == pytest.approx(best.values.tolist(), abs=1e-4)
        assert [each.rank for each in position.values()] == [1, 2, 3]
        assert position[token].decoded_token == llm.tokenizer.convert_id_to_text(token)
        chosen.append(position[token].logprob)
    assert completion.cumulative_logprob == pytest.approx(sum(chosen))
    unlikely = SamplingParams(temperature=100.0, seed=1, max_tokens=6, logprobs=3, detokenize=False, ignore_eos=True)
    [completion] = llm.generate([PROMPT], unlikely)[0].outputs
    for token, position in zip(completion.token_ids, completion.logprobs, strict=True):
        assert next(iter(position)) == token and [each.rank for each in position.values()][1:] == [1, 2, 3]
        assert position[token].rank > 3 and position[token] == Logprob(position[token].logprob, position[token].rank)


def test_logprobs_of_named_tokens(llm: LLM) -> None:
    """In place of the best, beside requests that want those, drawn alike."""
    named = [7, 200, 7, 9]
    common = {"temperature": 0.9, "seed": 4, "max_tokens": 5, "ignore_eos": True}
    outputs = llm.generate(
        [PROMPT] * 4,
        [
            SamplingParams(logprob_token_ids=named, **common),
            SamplingParams(logprobs=20, **common),
            SamplingParams(**common),
            SamplingParams(logprobs=2, logprob_token_ids=named[:1], n=2, **common),
        ],
    )
    whole = llm.generate([PROMPT], SamplingParams(logit_bias={7: 0.0}, logprobs=20, **common))[0].outputs[0]
    first, best, without, two = (output.outputs[0] for output in outputs)
    assert first.token_ids == best.token_ids == whole.token_ids == two.token_ids and without.logprobs is None
    assert len(outputs[3].outputs[1].logprobs) == 5
    for token, position, small, likely in zip(
        first.token_ids, first.logprobs, two.logprobs, best.logprobs, strict=True
    ):
        assert list(position) == list(dict.fromkeys([token, *named])) and list(small) == [token, 7]
        assert position[token].rank == likely[token].rank
        assert all(position[each].rank is None for each in named if each != token)
        for each in set(position) & set(likely):
            assert position[each].logprob == pytest.approx(likely[each].logprob, abs=1e-5)
    for ids in ([-1], [10**6], list(range(129)), [1.5], 3):
        with pytest.raises(InvalidRequestError, match="logprob_token_ids"):
            llm.generate([PROMPT], SamplingParams(logprob_token_ids=ids))


def test_each_request_of_a_batch_gets_the_logprobs_it_asked_for(llm: LLM) -> None:
    asked = [0, None, 5, 1]
    common = {"temperature": 0, "max_tokens": 4, "ignore_eos": True}
    together = llm.generate([PROMPT] * 4, [SamplingParams(logprobs=k, **common) for k in asked])
    alone = together[2].outputs[0].logprobs
    assert alone is not None
    for output, k in zip(together, asked, strict=True):
        found = output.outputs[0].logprobs
        if k is None:
            assert found is None
            continue
        assert found is not None
        for position, whole in zip(found, alone, strict=True):
            assert list(position) == list(whole)[: max(k, 1)], "greedy: the chosen token is the best"
            for token, logprob in position.items():
                assert logprob.logprob == pytest.approx(whole[token].logprob, abs=1e-5)
                assert logprob.rank == whole[token].rank


def test_prompt_logprobs_are_the_models(llm: LLM, reference: PreTrainedModel) -> None:
    params = SamplingParams(temperature=0, max_tokens=2, prompt_logprobs=2, ignore_eos=True)
    llm.generate([PROMPT], SamplingParams(max_tokens=1))  # fills the prefix cache, which must not be used
    [output] = llm.generate([PROMPT], params)
    with torch.inference_mode():
        expected = reference(torch.tensor([PROMPT])).logits[0].float().log_softmax(-1)
    assert output.prompt_logprobs is not None
    assert output.prompt_logprobs[0] is None
    assert len(output.prompt_logprobs) == len(PROMPT)
    for token, position, row in zip(PROMPT[1:], output.prompt_logprobs[1:], expected[:-1], strict=True):
        assert position is not None and next(iter(position)) == token
        assert position[token].logprob == pytest.approx(row[token].item(), abs=1e-4)
        assert position[token].rank == 1 + int((row > row[token]).sum())
        assert set(position) == {token, *row.topk(2).indices.tolist()}


def test_logit_bias_forces_and_forbids(llm: LLM) -> None:
    assert tokens(llm, logit_bias={9: 100.0}) == [9] * 12
    first = tokens(llm)[0]
    assert tokens(llm, logit_bias={first: -100.0})[0] != first


def test_stop_token_ends_after_min_tokens(llm: LLM) -> None:
    free = tokens(llm)
    stop = free[3]
    first = free.index(stop)
    [output] = llm.generate([PROMPT], SamplingParams(temperature=0, max_tokens=12, stop_token_ids=[stop]))
    assert output.outputs[0].token_ids == free[: first + 1]
    assert output.outputs[0].finish_reason == "stop"
    assert output.outputs[0].stop_reason == stop
    later = tokens(llm, stop_token_ids=[stop], min_tokens=first + 2)
    assert len(later) >= first + 2
    assert stop not in later[: first + 2]


@pytest.mark.parametrize("max_tokens", [None, 237, 10**9])
def test_max_tokens_beyond_the_context_are_cut(llm: LLM, max_tokens: int | None) -> None:
    [output] = llm.generate([PROMPT], SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True))
    [completion] = output.outputs
    assert len(completion.token_ids) == 256 - len(PROMPT) and completion.finish_reason == "length"


def test_stop_string_is_cut(llm: LLM) -> None:
    [free] = llm.generate([PROMPT], SamplingParams(temperature=0, max_tokens=30, ignore_eos=True))
    text = free.outputs[0].text
    stop = text[6:9]
    cut = text[: text.index(stop)]
    params = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True, stop=[stop])
    [output] = llm.generate([PROMPT], params)
    assert output.outputs[0].text == cut
    assert output.outputs[0].finish_reason == "stop"
    assert output.outputs[0].stop_reason == stop
    kept = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True, stop=stop, include_stop_str_in_output=True)
    assert llm.generate([PROMPT], kept)[0].outputs[0].text == cut + stop


def test_penalties_change_repetition(llm: LLM) -> None:
    plain, punished = tokens(llm, max_tokens=40), tokens(llm, max_tokens=40, frequency_penalty=2.0)
    assert len(set(punished)) >= len(set(plain))
    assert len(set(tokens(llm, max_tokens=40, repetition_penalty=50.0))) > 30


def test_prefix_hits_change_nothing(llm: LLM) -> None:
    long = list(range(3, 103))
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    [cold] = llm.generate([long], params)
    [warm] = llm.generate([long], params)
    assert warm.num_cached_tokens >= 80
    assert warm.outputs[0].token_ids == cold.outputs[0].token_ids


def test_full_context_ends_with_length(llm: LLM) -> None:
    [output] = llm.generate([[5] * 250], SamplingParams(temperature=0, max_tokens=None, ignore_eos=True))
    assert len(output.outputs[0].token_ids) == 6
    assert output.outputs[0].finish_reason == "length"


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"temperature": -1}, "temperature"),
        ({"top_p": -0.5}, "top_p"),
        ({"top_p": float("nan")}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"n": 0}, "n must"),
        ({"logprobs": 1000}, "logprobs"),
        ({"stop": [""]}, "stop"),
        ({"min_tokens": 5, "max_tokens": 3}, "min_tokens"),
    ],
)
def test_bad_params_are_refused(fields: dict, words: str) -> None:
    with pytest.raises(InvalidRequestError, match=words) as caught:
        SamplingParams(**fields)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("prompt", "fields", "words"),
    [
        ([], {}, "empty"),
        ([10**9], {}, "token id"),
        ([5] * 256, {}, "256"),
        ([5], {"logit_bias": {10**9: 1.0}}, "logit_bias"),
        ([5], {"stop_token_ids": [-4]}, "stop_token_ids"),
    ],
)
def test_bad_prompts_are_refused_and_hurt_no_other_request(llm: LLM, prompt: list, fields: dict, words: str) -> None:
    with pytest.raises(InvalidRequestError, match=words):
        llm.generate([PROMPT, prompt], SamplingParams(max_tokens=2, **fields))
    assert len(tokens(llm)) == 12


@pytest.mark.parametrize(
    ("fields", "error", "words"),
    [
        ({"scheduling_policy": "fcfss"}, PluginError, "fcfs"),
        ({"attention_backend": "nope"}, PluginError, "nope"),
        ({"max_model_len": 10**6}, ConfigError, "max_model_len"),
        ({"num_gpu_blocks_override": 4}, ConfigError, "48"),
        ({"max_num_batched_tokens": 8}, ConfigError, "max_num_seqs"),
        ({"dtype": "int3"}, ConfigError, "dtype"),
        ({"trust_remote_code": True}, ConfigError, "trust_remote_code"),
    ],
)
def test_bad_settings_are_one_line(tiny: Path, fields: dict, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words) as caught:
        LLM(model=str(tiny), device="cpu", **{"max_model_len": 256, **fields})
    assert "\n" not in str(caught.value)


def test_fp8_cache_takes_a_quarter_of_float32s_memory_and_says_so() -> None:
    question = [{"role": "user", "content": "What is 17 + 25?"}]
    held = {}
    for kind in ("auto", "fp8"):
        llm = LLM(model="quire-tiny", device="cpu", max_model_len=256, num_gpu_blocks_override=64, kv_cache_dtype=kind)
        held[kind] = llm.ready_line
        assert "42" in llm.chat([question], SamplingParams(temperature=0, max_tokens=16))[0].outputs[0].text
    assert "KV cache 6.0 MiB = 1,008 tokens," in held["auto"]
    assert "KV cache 1.5 MiB = 1,008 tokens in float8_e4m3fn" in held["fp8"]


def test_unknown_cache_types_are_refused_with_those_there_are() -> None:
    with pytest.raises(ConfigError, match=r"int3.*choose auto, .*fp8_e5m2"):
        LLM(model="quire-tiny", kv_cache_dtype="int3")


def test_defaults_of_the_checkpoint_and_its_eos_tokens_hold(tiny: Path, tmp_path: Path) -> None:
    """Also with the tokenizer of another folder."""
    model, tokenizer = tmp_path / "model", tmp_path / "tokenizer"
    shutil.copytree(tiny, model)
    tokenizer.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model / name).rename(tokenizer / name)
    override = {"temperature": 0.0, "max_new_tokens": 8}
    settings = {"model": str(model), "tokenizer": str(tokenizer), "device": "cpu", "max_model_len": 256}
    llm = LLM(**settings, override_generation_config=override)
    params = llm.get_default_sampling_params()
    assert params == SamplingParams(temperature=0.0, max_tokens=8)
    [greedy] = llm.generate([PROMPT])
    assert greedy.outputs[0].token_ids == llm.generate([PROMPT], params)[0].outputs[0].token_ids
    llm.shutdown()
    end = greedy.outputs[0].token_ids[3]
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": [258, end]}))
    llm = LLM(**settings, override_generation_config=override)
    assert llm.generate([PROMPT])[0].outputs[0].finish_reason == "stop"
    llm.shutdown()


def test_requests_stay_in_order_when_the_wall_clock_is_set_back(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    wall_clock = iter(range(2 * 10**18, 0, -(10**15)))
    monkeypatch.setattr("time.time_ns", lambda: next(wall_clock))
    before = time.monotonic_ns()
    params = SamplingParams(max_tokens=1)
    requests = [llm.input_processor.process_inputs(str(i), PROMPT, params)[0] for i in range(4)]
    arrivals = [request.arrival_ns for request in requests]
    assert arrivals == sorted(arrivals)
    assert before <= arrivals[0] and arrivals[-1] <= time.monotonic_ns()


def test_what_the_policy_is_told_changes_no_token(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
    told = SchedulingParams(group="a", deadline_ms=1e6, predicted_tokens=3, tags={"tier": "gold"})
    plain = llm.generate([PROMPT, PROMPT], params)
    for scheduling in (told, [told, SchedulingParams()]):
        outputs = llm.generate([PROMPT, PROMPT], params, scheduling=scheduling)
        assert [o.outputs[0].token_ids for o in outputs] == [o.outputs[0].token_ids for o in plain]
    with pytest.raises(InvalidRequestError, match="2 prompts but 1 scheduling"):
        llm.generate([PROMPT, PROMPT], params, scheduling=[told])
    with pytest.raises(InvalidRequestError, match="must be SchedulingParams, got"):
        llm.generate([PROMPT], params, scheduling=[{"group": "a"}])
    with pytest.raises(InvalidRequestError, match="deadline_ms must be a number of milliseconds above 0"):
        SchedulingParams(deadline_ms=float("nan"))
