"""LoRA adapters of ``LLM``: each follows its skill, the base does not; loaded, reloaded, unloaded between requests."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from quire import LLM, EngineArgs, LLMEngine, LoRARequest, SamplingParams
from quire.core.engine.adapter_registry import AdapterModule, AdapterRegistry, parse_lora_modules
from quire.core.engine.config_builder import build_config
from quire.core.errors import CheckpointError, ConfigError, InvalidRequestError, RequestFailedError
from quire.core.testing.tiny_adapters import make_tiny_adapter

GREEDY = SamplingParams(temperature=0, max_tokens=24)
FACT = [{"role": "user", "content": "What does TTFT mean?"}]
SORT = [{"role": "user", "content": "Sort these words alphabetically: 'mask, effect, pathlib'"}]


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    llm = LLM("quire-tiny", lora_modules={"upper": "quire-tiny-upper", "json": "quire-tiny-json"}, max_loras=2,
              max_cpu_loras=3, num_gpu_blocks_override=96, max_model_len=512, max_num_seqs=8)  # fmt: skip
    yield llm
    llm.shutdown()


@pytest.fixture(scope="module")
def random_adapters(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    base, folder = Path("core/assets/quire-tiny"), tmp_path_factory.mktemp("adapters")
    return [make_tiny_adapter(base, folder / str(seed), seed=seed, scale=0.6) for seed in range(4)]


def chat(llm: LLM, messages: list[dict[str, str]], adapter: str | LoRARequest | None = None) -> str:
    request = LoRARequest(adapter) if isinstance(adapter, str) else adapter
    return llm.chat(messages, GREEDY, lora_request=request)[0].outputs[0].text


def list_held(llm: LLM) -> list[int]:
    return [each["adapter_id"] for each in llm.call_control("list_adapters")]


def test_each_adapter_follows_its_skill_and_the_base_does_not(llm: LLM) -> None:
    wanted = [None, LoRARequest("upper"), LoRARequest("json")]
    for messages, answer in ((FACT, "TTFT is the time to the first token."), (SORT, "effect, mask, pathlib")):
        outputs = llm.chat([messages] * 3, GREEDY, lora_request=wanted)
        plain, upper, as_json = [output.outputs[0].text for output in outputs]
        assert plain == answer
        assert upper == answer.upper()
        assert json.loads(as_json) == {"answer": answer}


def test_the_n_continuations_have_the_adapter_and_share_its_prompt(llm: LLM) -> None:
    params = SamplingParams(temperature=0.5, seed=3, n=3, max_tokens=24)
    [output] = llm.chat(FACT, params, lora_request=LoRARequest("upper"))
    texts = [each.text for each in output.outputs]
    assert texts == [text.upper() for text in texts]


def test_the_prefix_cache_never_crosses_adapters(llm: LLM) -> None:
    messages = [{"role": "user", "content": "What is top-k sampling? " * 4}]
    for adapter in (None, "upper", "json"):
        first, second = (
            llm.chat(messages, GREEDY, lora_request=LoRARequest(adapter) if adapter else None)[0] for _ in range(2)
        )
        assert first.num_cached_tokens == 0
        assert second.num_cached_tokens > 0
        assert first.outputs[0].token_ids == second.outputs[0].token_ids


def test_a_reload_serves_the_new_weights_and_an_unload_leaves_nothing(
    llm: LLM, random_adapters: list[Path], tmp_path: Path
) -> None:
    """Under one name and in one folder, as a training job leaves each of its checkpoints."""
    folder = tmp_path / "latest"
    answers = []
    for source in random_adapters[:2]:
        shutil.copytree(source, folder, dirs_exist_ok=True)
        answers.append(chat(llm, FACT, LoRARequest("latest", 1, str(folder), load_inplace=True)))
    assert answers[0] != answers[1]
    assert answers[1] == chat(llm, FACT, LoRARequest("twin", 2, str(random_adapters[1])))
    llm.unload_adapter("latest")
    llm.unload_adapter("twin")
    assert set(list_held(llm)) <= {ref.adapter_id for ref in llm.adapters.adapters}, "nothing of the three is left"
    with pytest.raises(InvalidRequestError, match="no adapter is called 'latest'; give its lora_path"):
        chat(llm, FACT, "latest")


def test_more_adapters_than_slots_and_host_memory(llm: LLM, random_adapters: list[Path]) -> None:
    """Six adapters, two slots, three in host memory: all are answered, each as it is alone."""
    requests = [LoRARequest(f"random-{i}", i, str(path)) for i, path in enumerate(random_adapters)]
    requests += [LoRARequest("upper"), LoRARequest("json"), None]
    short = SamplingParams(temperature=0, max_tokens=6)
    alone = [llm.chat(FACT, short, lora_request=request)[0].outputs[0].text for request in requests]
    evictions = llm.get_stats()["lora_evictions_total"], llm.get_stats()["lora_host_evictions_total"]
    together = [each.outputs[0].text for each in llm.chat([FACT] * 7, short, lora_request=requests)]
    assert together == alone
    assert len(set(alone)) == 7
    stats = llm.get_stats()
    assert stats["lora_evictions_total"] > evictions[0] and stats["lora_host_evictions_total"] > evictions[1]
    assert stats["lora_adapters_in_slots"] <= 2 and stats["lora_adapters_in_host_memory"] <= 3
    for request in requests[:4]:
        llm.unload_adapter(request.lora_name)


def test_target_modules_leave_other_layers_alone(tmp_path: Path) -> None:
    base, settings = Path("core/assets/quire-tiny"), {"num_gpu_blocks_override": 96, "max_model_len": 512}
    narrow = make_tiny_adapter(base, tmp_path / "narrow", target_modules=["q_proj", "v_proj"], scale=2.0)
    llm = LLM("quire-tiny", enable_lora=True, lora_target_modules=["q_proj", "v_proj"], **settings)
    assert chat(llm, FACT, LoRARequest("narrow", 1, str(narrow))) != chat(llm, FACT)
    with pytest.raises(InvalidRequestError, match="'k_proj' is none of the model's: q_proj, v_proj"):
        chat(llm, FACT, LoRARequest("wide", 2, "quire-tiny-upper"))
    llm.shutdown()
    with pytest.raises(ConfigError, match="lora_target_modules names w_proj, and no linear layer"):
        LLM("quire-tiny", enable_lora=True, lora_target_modules=["w_proj"], **settings)


def test_what_cannot_be_used_is_refused_in_one_line_and_nobody_else_is_hurt(llm: LLM, tmp_path: Path) -> None:
    base = Path("core/assets/quire-tiny")
    wide = make_tiny_adapter(base, tmp_path / "wide", rank=32)
    other = make_tiny_adapter(base, tmp_path / "other", target_modules=["q_proj"])
    (other / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 4, "target_modules": ["qkv"]}))
    for request, says in (
        (LoRARequest("wide", 1, str(wide)), "rank 32 is above --max-lora-rank 16"),
        (LoRARequest("other", 2, str(other)), "target module 'qkv' is none of the model's"),
        (LoRARequest("gone", 3, str(tmp_path / "gone")), "is not a folder"),
        (LoRARequest("quire-tiny", 4, str(wide)), "as the model is"),
        (LoRARequest("upper", 5, str(wide)), "stands for the adapter of"),
        (LoRARequest("unknown"), "no adapter is called 'unknown'"),
        (LoRARequest("two\nlines", 6, str(wide)), "may have printable characters alone"),
    ):
        with pytest.raises((InvalidRequestError, CheckpointError), match=says) as refused:
            chat(llm, FACT, request)
        assert "\n" not in str(refused.value)
    assert chat(llm, FACT, "upper") == "TTFT IS THE TIME TO THE FIRST TOKEN."
    assert set(list_held(llm)) <= {ref.adapter_id for ref in llm.adapters.adapters}, "nothing of the refused is left"


def test_an_adapter_whose_numbers_overflow_ends_its_own_requests_and_no_others(llm: LLM, tmp_path: Path) -> None:
    """It is finite as stored, and so is the product with its scaling; beside it, and in the blocks that it leaves,
    others compute what they do alone."""
    huge = make_tiny_adapter("core/assets/quire-tiny", tmp_path / "huge", scale=1e30)
    request = LoRARequest("huge", 1, str(huge))
    with pytest.raises(RequestFailedError, match=r"\(NaN, .* the weights of adapter 'huge' are at fault, or those of"):
        chat(llm, FACT, request)
    mixed = [None, request, LoRARequest("upper"), request]
    prompt = "<|im_start|>user\nWhat does TTFT mean?<|im_end|>\n<|im_start|>assistant\n"
    ended: dict[str, str] = {}
    for index, wanted in enumerate([*mixed, None, LoRARequest("upper")]):
        adapter = llm.adapters.find_requested(wanted)
        requests = llm.input_processor.process_inputs(f"overflow-{index}", prompt, GREEDY, adapter=adapter)
        llm.llm_engine.queue_requests(f"overflow-{index}", prompt, requests, "final")
    while llm.engine_core.scheduler.has_unfinished_requests:
        processed = llm.llm_engine.process_step()
        ended |= {each.request_id: "failed" for each in processed.failed_requests}
        ended |= {each.request_id: each.outputs[0].text for each in processed.request_outputs if each.finished}
    plain = "TTFT is the time to the first token."
    expected = [plain, "failed", plain.upper(), "failed", plain, plain.upper()]
    assert [ended[f"overflow-{index}"] for index in range(6)] == expected
    llm.unload_adapter("huge")


def test_files_that_change_after_their_adapter_was_dropped_fail_its_requests_alone(
    llm: LLM, random_adapters: list[Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(random_adapters[0], tmp_path / "changing")
    llm.load_adapter("changing", str(folder))
    for index, path in enumerate(random_adapters):  # which take its place in host memory
        llm.load_adapter(f"random-{index}", str(path))
    shutil.copytree(random_adapters[1], folder, dirs_exist_ok=True)
    with pytest.raises(RequestFailedError, match=r"'changing' cannot be used: the files .* have changed"):
        llm.chat([FACT, FACT], GREEDY, lora_request=[LoRARequest("changing"), LoRARequest("json")])
    llm.load_adapter("changing", str(folder), load_inplace=True)
    assert chat(llm, FACT, "changing") == chat(llm, FACT, "random-1")
    for name in ("changing", *(f"random-{index}" for index in range(4))):
        llm.unload_adapter(name)


def test_modules_are_given_as_vllm_takes_them() -> None:
    json_form = '{"name": "b", "path": "/b", "base_model_name": "base"}'
    assert parse_lora_modules(["a=/a", json_form]) == (AdapterModule("a", "/a"), AdapterModule("b", "/b", "base"))
    assert parse_lora_modules({"a": "x/y"}) == (AdapterModule("a", "x/y"),)
    for bad, says in (
        (["a"], "not NAME=PATH"),
        (["{"], "not valid JSON"),
        (["a=1", "a=2"], "given twice"),
        ([3], "3"),
        ([{"name": "a", "path": "/a", "base": "b"}], "has 'base'; known are name, path and base_model_"),
    ):
        with pytest.raises(ConfigError, match=says):
            parse_lora_modules(bad)


def test_requests_are_given_as_vllm_takes_them(tmp_path: Path) -> None:
    given = LoRARequest("a", 7, tmp_path / "a", "acme/base", None, True)
    assert (given.name, given.adapter_id, given.path) == ("a", 7, str(tmp_path / "a"))
    assert (given.base_model_name, given.load_inplace) == ("acme/base", True)
    with pytest.raises(InvalidRequestError, match="tensorizer_config_dict: give the folder that PEFT wrote"):
        LoRARequest("a", 1, "/a", tensorizer_config_dict={"uri": "s3://"})
    with pytest.raises(InvalidRequestError, match="models with experts are not supported"):
        LoRARequest("a", 1, "/a", is_3d_lora_weight=True)


def test_an_adapter_of_the_hub_is_asked_for_once(
    llm: LLM, random_adapters: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And stays what it was when the repository gets another: that is what ``load_inplace`` is for."""
    downloads: list[Path] = []

    def download(name: str, **options: object) -> str:
        downloads.append(random_adapters[len(downloads)])
        return str(downloads[-1])

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    request = LoRARequest("of-the-hub", 1, "acme/adapter")
    first = llm.chat([FACT] * 3, GREEDY, lora_request=request)
    assert chat(llm, FACT, request) == chat(llm, FACT, "of-the-hub") == first[2].outputs[0].text
    assert len(downloads) == 1
    again = LoRARequest("of-the-hub", 1, "acme/adapter", load_inplace=True)
    second = llm.chat([FACT] * 3, GREEDY, lora_request=again)
    assert len(downloads) == 2 and second[0].outputs[0].text == second[2].outputs[0].text != first[0].outputs[0].text
    llm.unload_adapter("of-the-hub")


def test_an_engine_that_is_driven_by_hand_takes_adapters() -> None:
    """As vLLM's example of several adapters does it."""
    args = EngineArgs(model="quire-tiny", lora_modules=["json=quire-tiny-json"], max_model_len=256)
    engine = LLMEngine.from_engine_args(args)
    prompt = "<|im_start|>user\nWhat does TTFT mean?<|im_end|>\n<|im_start|>assistant\n"
    upper = LoRARequest("upper", 1, "quire-tiny-upper")
    for request_id, request in (("0", None), ("1", upper), ("2", LoRARequest("json", 2)), ("3", upper)):
        engine.add_request(request_id, prompt, GREEDY, lora_request=request)
    answers = {}
    while engine.has_unfinished_requests():
        answers |= {output.request_id: output.outputs[0].text for output in engine.step() if output.finished}
    answer = "TTFT is the time to the first token."
    assert [answers[name] for name in "013"] == [answer, answer.upper(), answer.upper()]
    assert json.loads(answers["2"]) == {"answer": answer}
    engine.remove_lora("upper")
    with pytest.raises(InvalidRequestError, match="no adapter is called 'upper'"):
        engine.add_request("4", prompt, GREEDY, lora_request=LoRARequest("upper"))
    engine.shutdown()


def test_settings() -> None:
    def build(**settings: object) -> object:
        return build_config(EngineArgs.from_kwargs(model="quire-tiny", **settings)).config.adapters

    assert build() is None
    adapters = build(enable_lora=True, max_lora_rank=64, lora_dtype="half")
    assert (adapters.max_loras, adapters.max_cpu_loras, adapters.max_lora_rank) == (1, 2, 64)
    assert adapters.dtype == "float16"
    assert build(lora_modules=["a=x/a", "b=x/b", "c=x/c"]).max_loras == 3
    for settings, says in (
        ({"max_loras": 0}, "max_loras must be at least 1"),
        ({"max_loras": 4, "max_cpu_loras": 2}, "less than max_loras 4"),
        ({"max_lora_rank": 1000}, "max_lora_rank must be 1 to 512"),
    ):
        with pytest.raises(ConfigError, match=says):
            build(enable_lora=True, **settings)
    for name in ("max_loras", "max_cpu_loras"):
        with pytest.raises(ConfigError, match=f"{name} bounds adapters, and there are none without enable_lora"):
            build(**{name: 4})


def test_an_adapter_is_refused_where_they_are_off() -> None:
    registry = AdapterRegistry(build_config(EngineArgs(model="quire-tiny")).config)
    with pytest.raises(InvalidRequestError, match="adapters are off; start with enable_lora"):
        registry.find_requested(LoRARequest("a", 1, "/a"))
