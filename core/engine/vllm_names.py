"""What became of vLLM's environment variables, commands and keyword arguments. Flags are in ``vllm_flag_table``.

A keyword argument of ``LLM`` is looked up by its flag: ``swap_space`` is ``--swap-space``.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from quire.core.engine.vllm_flag_table import ABSENT_FLAGS, MULTIMODAL, VLLM_FLAGS
from quire.core.errors import ConfigError, UnsupportedError

__all__ = [
    "VLLM_CALL_ARGUMENTS",
    "VLLM_COMMANDS",
    "VLLM_VARIABLES",
    "check_call_arguments",
    "translate_kwargs",
]


_TIMEOUT = "not used: give --step-timeout"
_LOAD_AHEAD = "not used: name adapters in --lora-modules, or load them with /v1/load_lora_adapter"
_NO_STATS = "not needed: Quire sends nothing home"

VLLM_VARIABLES: Mapping[str, tuple[str | None, str]] = MappingProxyType({
    "VLLM_API_KEY": ("api_key", "taken as --api-key"),
    "VLLM_LOGGING_LEVEL": ("log_level", "taken as --log-level"),
    "VLLM_HOST_IP": (None, "not used: give --host"),
    "VLLM_PORT": (None, "not used: give --port"),
    "VLLM_ATTENTION_BACKEND": (None, "not used: give --attention-backend with a name of `quire plugins list`"),
    "VLLM_PLUGINS": (None, "not used: give --plugin DIST for each"),
    "VLLM_USE_V1": (None, "not needed: there is one engine"),
    "VLLM_WORKER_MULTIPROC_METHOD": (None, "not needed: the engine's process is started anew"),
    "VLLM_ENABLE_V1_MULTIPROCESSING": (None, "not needed: only a server's engine has a process of its own"),
    "VLLM_ALLOW_LONG_MAX_MODEL_LEN": (None, "not used: --max-model-len is at most what the model was made for"),
    "VLLM_CPU_OMP_THREADS_BIND": (None, "not used: give --cpu-threads"),
    "VLLM_CPU_KVCACHE_SPACE": (None, "not used: give --num-gpu-blocks-override"),
    "VLLM_CACHE_ROOT": (None, "not used: kernels are kept where Triton keeps them, downloads in --download-dir"),
    "VLLM_USE_MODELSCOPE": (None, "not supported: models come from folders and the Hugging Face hub"),
    "VLLM_TORCH_PROFILER_DIR": (None, "not used: fetch the last steps with `quire trace`"),
    "VLLM_ENGINE_ITERATION_TIMEOUT_S": (None, _TIMEOUT),
    "VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS": (None, _TIMEOUT),
    "VLLM_RPC_TIMEOUT": (None, "not used: an engine that is silent for 5 s hangs"),
    "VLLM_KEEP_ALIVE_ON_ENGINE_DEATH": (None, "not used: --on-hang says what happens then"),
    "VLLM_NO_USAGE_STATS": (None, _NO_STATS),
    "VLLM_DO_NOT_TRACK": (None, _NO_STATS),
    "VLLM_CONFIGURE_LOGGING": (None, "not used: give --log-level"),
    "VLLM_LOGGING_CONFIG_PATH": (None, "not used: give --log-level"),
    "VLLM_LOG_STATS_INTERVAL": (None, "not used: throughput is logged every 10 s"),
    "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": (None, "not used: idle connections are kept for 75 s"),
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": (None, "not used: give --admin-api-key and --lora-root"),
    "VLLM_LORA_RESOLVER_CACHE_DIR": (None, _LOAD_AHEAD),
    "VLLM_LORA_RESOLVER_HF_REPO_LIST": (None, _LOAD_AHEAD),
    "VLLM_SERVER_DEV_MODE": (None, "not used: there are no such routes"),
    "VLLM_DEBUG_LOG_API_SERVER_RESPONSE": (None, "not used: answers are never logged"),
})  # fmt: skip
"""Environment variables: the setting of ``quire serve`` that takes the value, if there is one, and the line to log."""


VLLM_COMMANDS: Mapping[str, str] = MappingProxyType({
    "chat": "ask the server with curl or any OpenAI client",
    "complete": "ask the server with curl or any OpenAI client",
    "run-batch": "not supported: send the requests to the server, or give them to LLM.chat",
    "collect-env": "now quire plugins doctor, and quire --version",
})  # fmt: skip
"""Commands of vLLM's that Quire does not have, and what to do instead."""


VLLM_CALL_ARGUMENTS: Mapping[str, tuple[str, tuple[str, ...]]] = MappingProxyType({
    "prompt_adapter_request": ("prompt adapters are not supported", ()),
    "guided_options_request": ("give structured_outputs in SamplingParams", ()),
    "mm_processor_kwargs": (MULTIMODAL, ()),
    "tokenization_kwargs": ("give add_special_tokens and truncate_prompt_tokens in SamplingParams", ()),
    "chat_template_content_format": ("the template decides how it takes content", ("auto", "string", "openai")),
})  # fmt: skip
"""Arguments of ``LLM.generate`` and ``LLM.chat`` that are not Quire's: why they are refused, and what is accepted."""


def check_call_arguments(method: str, arguments: Mapping[str, Any]) -> None:
    """Keyword arguments of a call as scripts for vLLM make it, that are not Quire's: accepted while they are off, as
    ``prompt_adapter_request=None``. Raises UnsupportedError for others, and TypeError for unknown names."""
    for name, value in arguments.items():
        if name not in VLLM_CALL_ARGUMENTS:
            raise TypeError(f"{method}() got an unexpected keyword argument {name!r}")
        reason, accepted = VLLM_CALL_ARGUMENTS[name]
        if value and value not in accepted:
            raise UnsupportedError(f"{name}={value!r:.100}: {reason}", name)


def translate_kwargs(kwargs: Mapping[str, Any], names: frozenset[str]) -> tuple[dict[str, Any], list[str]]:
    """Keyword arguments as scripts for vLLM give them: those called ``names``, and the lines to log for the others.

    None means the default. What is not a setting is accepted while it is off, as ``enable_sleep_mode=False``, and
    otherwise treated as its flag is. Raises ConfigError for what is refused; an unknown name is left in for the caller.
    """
    translated: dict[str, Any] = {}
    messages: list[str] = []
    flags = {flag.name: flag for flag in VLLM_FLAGS}
    for name, value in kwargs.items():
        flag_name = "--" + name.replace("_", "-")
        flag = flags.get(flag_name)
        if name in names:
            if value is not None:
                translated[name] = value
        elif flag is None and flag_name not in ABSENT_FLAGS:
            translated[name] = value
        elif flag is not None and flag.off_is_refused and value is not None and not value:
            raise ConfigError(f"{name}={value!r:.100}: {flag.off_reason}")
        elif not value or (flag is not None and flag.refused and flag.is_accepted(str(value))):
            continue
        elif flag is None or flag.refused:
            message = ABSENT_FLAGS[flag_name] if flag is None else flag.message
            raise ConfigError(f"{name}={value!r:.100}: {message}")
        else:
            if flag.sets is not None:
                translated.setdefault(*flag.sets)
            messages.append(f"{name}={value!r:.100}: {flag.message}")
    return translated, messages
