"""What became of vLLM's flags, keyword arguments and environment variables: the one table of them.

A keyword argument of ``LLM`` is looked up by its flag: ``swap_space`` is ``--swap-space``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from quire.core.errors import ConfigError, UnsupportedError

__all__ = [
    "ABSENT_FLAGS",
    "VLLM_CALL_ARGUMENTS",
    "VLLM_COMMANDS",
    "VLLM_FLAGS",
    "VLLM_VARIABLES",
    "VllmFlag",
    "check_call_arguments",
    "translate_kwargs",
]


@dataclass(frozen=True, slots=True)
class VllmFlag:
    """A flag of vLLM's that Quire understands and that is not its own.

    ``message`` is logged once, or is the reason of the refusal. A refused flag is accepted with ``accepted_values``,
    which ask for what Quire does.
    """

    name: str
    message: str
    refused: bool = False
    takes_value: bool = False
    accepted_values: tuple[str, ...] = ()
    sets: tuple[str, object] | None = None


_NOT_NEEDED = "no longer needed: "

VLLM_FLAGS: tuple[VllmFlag, ...] = (
    VllmFlag("--enable-log-requests", "now --no-disable-log-requests", sets=("disable_log_requests", False)),
    VllmFlag("--enable-prometheus", _NOT_NEEDED + "metrics are always served at /metrics"),
    VllmFlag("--swap-space", _NOT_NEEDED + "preempted requests are recomputed, not swapped", takes_value=True),
    VllmFlag("--use-v2-block-manager", _NOT_NEEDED + "there is one block manager"),
    VllmFlag("--num-scheduler-steps", _NOT_NEEDED + "scheduling is always ahead of the device", takes_value=True),
    VllmFlag("--async-scheduling", _NOT_NEEDED + "scheduling is always asynchronous"),
    VllmFlag("--max-seq-len-to-capture", _NOT_NEEDED + "graphs do not depend on the context length", takes_value=True),
    VllmFlag("--disable-frontend-multiprocessing", _NOT_NEEDED + "the engine core has a process of its own"),
    VllmFlag("--disable-uvicorn-access-log", _NOT_NEEDED + "requests are logged with --no-disable-log-requests alone"),
    VllmFlag("--uvicorn-log-level", _NOT_NEEDED + "--log-level is for all of it", takes_value=True),
    VllmFlag("--disable-custom-all-reduce", "now --all-reduce nccl", sets=("all_reduce", "nccl")),
    VllmFlag("--enable-server-load-tracking", _NOT_NEEDED + "the load is always at /load"),
    VllmFlag("--enable-prompt-tokens-details", _NOT_NEEDED + "usage always has them"),
    VllmFlag(
        "--tokenizer-mode", "there is one mode: the fast tokenizer", refused=True, takes_value=True,
        accepted_values=("auto",),
    ),
    VllmFlag("--worker-use-ray", "now --executor ray", sets=("executor", "ray")),
    VllmFlag(
        "--data-parallel-size", "one engine is one server; start several behind a load balancer", refused=True,
        takes_value=True, accepted_values=("1",),
    ),
    VllmFlag(
        "--api-server-count", "a server has one API process; 1 is the only count", refused=True,
        takes_value=True, accepted_values=("1",),
    ),
    VllmFlag("--enable-reasoning", _NOT_NEEDED + "reasoning is split off by --reasoning-parser"),
)  # fmt: skip
"""Flags that are accepted, or refused for a value."""

_MULTIMODAL = "images, audio and video are not supported yet"
_HF_CONFIG = "not supported: change config.json in the model's folder"
_COMPILATION = "there is nothing to choose; --enforce-eager turns CUDA graphs off"
_TLS = "not supported: let a proxy in front speak TLS"
_POOLING = "not supported: Quire generates text alone"
_DISTRIBUTED = "not supported yet; the GPUs of one host share a model with --tensor-parallel-size"
_KV_TRANSFER = "not supported yet: the KV cache stays on the device"
_TUNED = "decided by the engine; a scheduling policy of your own can be chosen with --scheduling-policy"
_SPECULATION = "now a key of --speculative-config"
_TRACES = "not supported: fetch the last steps with `quire trace`"
_ONE_PORT = "not supported: the server listens on --host and --port"

ABSENT_FLAGS: Mapping[str, str] = MappingProxyType({
    "--allowed-local-media-path": _MULTIMODAL,
    "--limit-mm-per-prompt": _MULTIMODAL,
    "--mm-processor-kwargs": _MULTIMODAL,
    "--disable-mm-preprocessor-cache": _MULTIMODAL,
    "--mm-processor-cache-gb": _MULTIMODAL,
    "--hf-overrides": _HF_CONFIG,
    "--rope-scaling": _HF_CONFIG,
    "--rope-theta": _HF_CONFIG,
    "--hf-config-path": _HF_CONFIG,
    "--compilation-config": _COMPILATION,
    "--cuda-graph-sizes": _COMPILATION,
    "--ssl-keyfile": _TLS,
    "--ssl-certfile": _TLS,
    "--ssl-ca-certs": _TLS,
    "--uds": _ONE_PORT,
    "--headless": _ONE_PORT,
    "--task": _POOLING,
    "--runner": _POOLING,
    "--convert": _POOLING,
    "--override-pooler-config": _POOLING,
    "--pooler-config": _POOLING,
    "--enable-expert-parallel": _DISTRIBUTED,
    "--data-parallel-rank": _DISTRIBUTED,
    "--data-parallel-address": _DISTRIBUTED,
    "--data-parallel-backend": _DISTRIBUTED,
    "--max-parallel-loading-workers": _DISTRIBUTED,
    "--kv-transfer-config": _KV_TRANSFER,
    "--kv-events-config": _KV_TRANSFER,
    "--cpu-offload-gb": "not supported: the weights stay on the device; take a quantized checkpoint",
    "--kv-cache-memory-bytes": "now --gpu-memory-utilization, or --num-gpu-blocks-override",
    "--calculate-kv-scales": "not supported: scales of an FP8 cache come from the checkpoint",
    "--scheduler-cls": "now --scheduling-policy MODULE:CLASS",
    "--scheduler-delay-factor": _TUNED,
    "--preemption-mode": _TUNED,
    "--num-lookahead-slots": _TUNED,
    "--max-num-partial-prefills": _TUNED,
    "--max-long-partial-prefills": _TUNED,
    "--long-prefill-token-threshold": _TUNED,
    "--stream-interval": "not supported: a chunk is sent for every step",
    "--speculative-disable-by-batch-size": _SPECULATION,
    "--ngram-prompt-lookup-max": _SPECULATION,
    "--ngram-prompt-lookup-min": _SPECULATION,
    "--spec-decoding-acceptance-method": "not needed: speculation changes no token",
    "--otlp-traces-endpoint": _TRACES,
    "--collect-detailed-traces": _TRACES,
    "--worker-cls": "now a plugin: --executor",
    "--worker-extension-cls": "now a plugin: --executor",
    "--middleware": "now a plugin: --plugin DIST, with the hook quire_extend_app",
    "--logits-processor-pattern": "now a plugin: --logits-processor",
    "--tool-parser-plugin": "now a plugin: --tool-call-parser MODULE:CLASS",
    "--guided-decoding-disable-fallback": "not needed: there is one backend, and no fallback",
    "--guided-decoding-disable-any-whitespace": "now disable_any_whitespace of structured_outputs, in requests",
    "--guided-decoding-disable-additional-properties": "now disable_additional_properties, in requests",
    "--structured-outputs-config": "now --structured-output-backend",
    "--hf-token": "set HF_TOKEN instead",
    "--max-logprobs": "the limit is always 20",
    "--tokenizer-revision": "give a folder with --tokenizer",
    "--code-revision": "not needed: Quire never runs code that comes with a model",
    "--model-impl": "not needed: models are plugins, chosen by the checkpoint",
    "--config-format": "not needed: config.json is read",
    "--model-loader-extra-config": "not needed: weights are read from safetensors files",
    "--ignore-patterns": "not needed: only safetensors files are downloaded",
    "--enable-sleep-mode": "not supported yet",
    "--prefix-caching-hash-algo": "not needed: there is one",
    "--disable-sliding-window": "not needed: the model's own windows are used",
    "--max-log-len": "not needed: prompts are never logged",
    "--log-config-file": "now --log-level",
    "--response-role": "the role is always assistant",
    "--lora-extra-vocab-size": "not supported: an adapter changes linear layers alone, and no embedding",
    "--fully-sharded-loras": "not needed: adapters are split over GPUs as their layers are",
    "--enable-lora-bias": "not supported: an adapter with trained biases is refused",
    "--long-lora-scaling-factors": "not supported: train the adapter on a model with the longer context",
    "--default-mm-loras": _MULTIMODAL,
    "--prompt-adapter": "prompt adapters are not supported",
})  # fmt: skip
"""Flags that Quire does not take, and what became of each."""

_TIMEOUT = "not used: give --step-timeout"
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
    "mm_processor_kwargs": (_MULTIMODAL, ()),
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
        elif not value or (flag is not None and str(value) in flag.accepted_values):
            continue
        elif flag is None or flag.refused:
            message = ABSENT_FLAGS[flag_name] if flag is None else flag.message
            raise ConfigError(f"{name}={value!r:.100}: {message}")
        else:
            if flag.sets is not None:
                translated.setdefault(*flag.sets)
            messages.append(f"{name}={value!r:.100}: {flag.message}")
    return translated, messages
