"""What users bring from vLLM: flags, environment variables, keyword arguments and the way the server is started."""

from __future__ import annotations

import argparse
import json
import logging
import subprocess
import sys
from collections.abc import Callable

import httpx
import pytest

from quire.core.engine.args import EngineArgs
from quire.core.engine.vllm_flag_table import ABSENT_FLAGS, VLLM_FLAGS
from quire.core.engine.vllm_names import VLLM_VARIABLES
from quire.core.env import child_environment
from quire.core.errors import ConfigError
from quire.server.cli.flags import ENGINE_FLAGS, SERVER_FLAGS, make_engine_args
from quire.server.cli.main import main, make_parsers, parse_arguments
from quire.server.cli.vllm_flags import apply_vllm_flags, apply_vllm_variables

from ..conftest import RunningServer


def test_no_flag_is_both_there_and_absent() -> None:
    names = {name for flag in (*ENGINE_FLAGS, *SERVER_FLAGS) for name in (flag.flag, *flag.aliases)}
    assert not set(ABSENT_FLAGS) & (names | {flag.name for flag in VLLM_FLAGS})
    assert not {flag.name for flag in VLLM_FLAGS} & names


@pytest.mark.parametrize(
    ("words", "fate"),
    [
        (["--allowed-media-domains", "a.example"], "--allowed-media-domains: images, audio and video are not"),
        (["--kv-transfer-config.kv_connector", "X"], "--kv-transfer-config: not supported yet: the KV cache stays"),
        (["-dpn", "0"], "-dpn: not supported yet; the GPUs of one host share a model with --tensor-parallel-size"),
        (["--api-key", "secret", "second"], "--api-key takes one value at a time: write --api-key for each"),
        (["--named-api-key", "a=K1", "b=K2"], "--named-api-key takes one value at a time: write --named-api-key for"),
        (["--scheduling-policy-option", "x=1", "y=2"], "--scheduling-policy-option takes one value at a time"),
        (["--scheduler_cls=x:Y"], "--scheduler-cls: now --scheduling-policy MODULE:CLASS"),
        (["--enable-ssl-refresh"], "--enable-ssl-refresh: not supported: restart the server for a new certificate"),
    ],
    ids=lambda v: v[0] if isinstance(v, list) else "",
)
def test_an_absent_flag_says_what_became_of_it(words: list[str], fate: str, capsys: pytest.CaptureFixture[str]) -> None:
    """And not which flag is spelt alike."""
    with pytest.raises(SystemExit, match="2"):
        main(["serve", "m", *words])
    assert capsys.readouterr().err.startswith(f"quire: error: {fate}")


def test_a_stray_word_is_named_whole(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["serve", "m", "foo=bar"])
    assert capsys.readouterr().err.startswith("quire: error: unknown argument foo=bar")


@pytest.mark.parametrize(
    "words",
    [
        "--task generate", "--runner auto", "--max-logprobs 20", "--stream-interval 1", "--model-impl vllm", "-dp 1",
        "--cpu-offload-gb 0", "-O3", "-O 2", "-cc 3", "--compilation-config 3", "--preemption-mode recompute",
        '--limit-mm-per-prompt {"image":0,"video":0}', "--limit-mm-per-prompt.image 0", "--limit-mm-per-prompt image=0",
        "--no-enable-log-requests", "--no-disable-hybrid-kv-cache-manager", "--no-enable-expert-parallel",
        "--no-use-tqdm-on-load", "--max-log-len 100", "--show-hidden-metrics-for-version 0.9", "-asc 1",
    ],
)  # fmt: skip
def test_a_flag_that_asks_for_what_is_done_anyway_is_taken(words: str) -> None:
    parser, _ = make_parsers()
    args = parse_arguments(parser, ["serve", "m", *words.split()])
    apply_vllm_flags(args)
    assert make_engine_args(args) == EngineArgs(model="m")


@pytest.mark.parametrize(
    ("words", "fate"),
    [
        ("--task embed", "Quire generates text alone"),
        ("--max-logprobs 50", "the limit is always 20"),
        ("-dp 2", "one engine is one server"),
        ("-O0", "--enforce-eager turns CUDA graphs off"),
        ("--compilation-config.level 3", "--enforce-eager turns CUDA graphs off"),
        ("--no-async-scheduling", "scheduling is always asynchronous"),
        ("--limit-mm-per-prompt.image 1", "images, audio and video are not supported yet"),
        ("--limit-mm-per-prompt image=2", "images, audio and video are not supported yet"),
    ],
)
def test_a_value_that_asks_for_something_else_is_refused(words: str, fate: str, capsys) -> None:
    assert main(["serve", "m", *words.split()]) == 2
    assert fate in capsys.readouterr().err


def test_keys_of_a_flag_may_be_given_with_dots() -> None:
    parser, _ = make_parsers()
    words = "--speculative-config.method ngram --speculative_config.num_speculative_tokens=3 --speculative-config.a.b x"
    args = parse_arguments(parser, ["serve", "m", *words.split(), "--port", "8001"])
    told = json.loads(str(make_engine_args(args).speculative_config))
    assert told == {"method": "ngram", "num_speculative_tokens": 3, "a": {"b": "x"}} and args.port == 8001
    with pytest.raises(ConfigError, match="--speculative-config is given whole and by its keys"):
        parse_arguments(parser, ["serve", "m", "--speculative-config", "{}", *words.split()])


@pytest.mark.parametrize(
    "words", ["--x.a 1 --x.a.b 2", "--x.a.b 2 --x.a 1", "--x.a.b 2 --x.a.b.c=1", "--x.a.b.c 2 --x_.a 1 --x.a.b {}"]
)
def test_a_key_is_a_value_or_holds_keys(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = words.replace("--x_", "--y").replace("--x", "--speculative-config")
    assert main(["serve", "m", *words.split()]) == 2
    message = capsys.readouterr().err
    assert message.startswith("quire: error: --speculative-config.a") and message.count("\n") == 1
    assert "is given whole and by its keys" in message


def test_a_key_in_the_environment_never_leaves_a_server_open(
    start: Callable[..., RunningServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "secret-1")
    monkeypatch.setenv("VLLM_USE_V1", "1")
    server = start()
    assert httpx.get(f"{server.url}/v1/models").status_code == 401
    assert httpx.get(f"{server.url}/v1/models", headers={"Authorization": "Bearer secret-1"}).status_code == 200
    log = server.stderr.read_text()
    assert "VLLM_API_KEY: taken as --api-key" in log and "secret-1" not in log
    assert "VLLM_USE_V1: not needed" in log


def test_variables_are_taken_or_named() -> None:
    args = argparse.Namespace(api_key=None, log_level=None)
    variables = {"VLLM_API_KEY": "k", "VLLM_LOGGING_LEVEL": "DEBUG", "VLLM_PORT": "1", "VLLM_MADE_UP": "1"}
    assert apply_vllm_variables(args, {**variables, "VLLM_HOST_IP": ""}) == [
        "VLLM_API_KEY: taken as --api-key",
        "VLLM_LOGGING_LEVEL: taken as --log-level",
        "VLLM_MADE_UP: not used: Quire has no such variable",
        "VLLM_PORT: not used: give --port",
    ]
    assert args.api_key == ["k"] and args.log_level == "debug"
    given = argparse.Namespace(api_key=["mine"], log_level="error")
    assert apply_vllm_variables(given, variables)[0] == "VLLM_API_KEY: not used: the flag wins over it"
    assert given.api_key == ["mine"] and given.log_level == "error"


def test_variables_name_settings_that_are_there() -> None:
    settings = {flag.name for flag in SERVER_FLAGS}
    assert {setting for setting, _ in VLLM_VARIABLES.values() if setting is not None} <= settings


def test_keyword_arguments_of_scripts_for_vllm(caplog: pytest.LogCaptureFixture) -> None:
    """None is the default, and what is off asks for nothing."""
    off = {"enable_sleep_mode": False, "cpu_offload_gb": 0, "rope_scaling": None, "limit_mm_per_prompt": {}}
    same = {"tokenizer_mode": "auto", "data_parallel_size": 1, "distributed_executor_backend": None}
    with caplog.at_level(logging.WARNING, "quire.config"):
        args = EngineArgs.from_kwargs(model="m", quantization=None, seed=None, dtype=None, **off, **same)
        assert args == EngineArgs(model="m") and not caplog.records
        assert EngineArgs.from_kwargs(model="m", swap_space=4, enable_prompt_tokens_details=True) == args
    named = EngineArgs.from_kwargs(tensor_parallel_size=2, distributed_executor_backend="mp")
    assert named == EngineArgs(tensor_parallel_size=2, executor="mp")
    assert [record.getMessage().partition(":")[0] for record in caplog.records] == [
        "swap_space=4",
        "enable_prompt_tokens_details=True",
    ]


@pytest.mark.parametrize(
    ("argument", "reason"),
    [
        ({"enable_lora_bias": True}, "enable_lora_bias=True: not supported: an adapter with trained biases is refused"),
        ({"data_parallel_size": 2}, "data_parallel_size=2: one engine is one server"),
        ({"async_scheduling": False}, "async_scheduling=False: not supported: scheduling is always asynchronous"),
        ({"cpu_offload_gb": 4}, "cpu_offload_gb=4: not supported"),
        ({"hf_overrides": {"a": 1}}, "change config.json"),
        ({"max_modl_len": 8}, "did you mean max_model_len"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_keyword_arguments_are_refused_as_flags_are(argument: dict[str, object], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        EngineArgs.from_kwargs(**argument)


def test_the_module_that_starts_vllms_server() -> None:
    command = [sys.executable, "-m", "quire.entrypoints.openai.api_server", "--model", "./nothing-here", "--port", "0"]
    done = subprocess.run(command, capture_output=True, text=True, env=child_environment(), timeout=60)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.splitlines()[-1].startswith("quire: error: ") and "nothing-here" in done.stderr
