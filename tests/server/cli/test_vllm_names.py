"""What users bring from vLLM: flags, environment variables, keyword arguments and the way the server is started."""

from __future__ import annotations

import argparse
import logging
import subprocess
import sys
from collections.abc import Callable

import httpx
import pytest

from quire.core.engine.args import EngineArgs
from quire.core.engine.vllm_names import ABSENT_FLAGS, VLLM_FLAGS, VLLM_VARIABLES
from quire.core.env import child_environment
from quire.core.errors import ConfigError
from quire.server.cli.flags import ENGINE_FLAGS, SERVER_FLAGS
from quire.server.cli.main import main
from quire.server.cli.vllm_flags import apply_vllm_variables

from ..conftest import RunningServer


def test_no_flag_is_both_there_and_absent() -> None:
    names = {name for flag in (*ENGINE_FLAGS, *SERVER_FLAGS) for name in (flag.flag, *flag.aliases)}
    assert not set(ABSENT_FLAGS) & (names | {flag.name for flag in VLLM_FLAGS})
    assert not {flag.name for flag in VLLM_FLAGS} & names


@pytest.mark.parametrize(
    ("words", "fate"),
    [
        (["--limit-mm-per-prompt", "image=2"], "--limit-mm-per-prompt: images, audio and video are not supported yet"),
        (["--scheduler_cls=x:Y"], "--scheduler-cls: now --scheduling-policy MODULE:CLASS"),
        (["--ssl-keyfile", "key.pem"], "--ssl-keyfile: not supported: let a proxy in front speak TLS"),
    ],
    ids=lambda v: v[0] if isinstance(v, list) else "",
)
def test_an_absent_flag_says_what_became_of_it(words: list[str], fate: str, capsys: pytest.CaptureFixture[str]) -> None:
    """And not which flag is spelt alike."""
    with pytest.raises(SystemExit, match="2"):
        main(["serve", "m", *words])
    assert capsys.readouterr().err.startswith(f"quire: error: {fate}; see ")


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
