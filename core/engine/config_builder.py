"""From the arguments of an engine to the configuration that it is built from: names resolved, limits checked."""

from __future__ import annotations

import atexit
import logging
import math
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from quire.core.config import (
    AdapterConfig,
    CacheConfig,
    EngineConfig,
    ModelConfig,
    ParallelConfig,
    PluginChoice,
    RecordingConfig,
    SchedulerConfig,
    WatchdogConfig,
)
from quire.core.engine.adapter_registry import AdapterModule, parse_lora_modules
from quire.core.engine.args import DTYPES, KV_CACHE_DTYPES, EngineArgs
from quire.core.engine.plugin_choices import PluginChooser, replace_classes_by_names
from quire.core.engine.plugin_names import PARALLEL_SIZES, FirstChoices, translate_structured_backend
from quire.core.engine.setting import section_default, settings_of
from quire.core.engine.speculative import build_speculation_config, spread_speculative_config
from quire.core.errors import ConfigError, PluginError
from quire.core.plugin.manager import PluginManager
from quire.core.plugin.options import parse_options
from quire.core.plugin.registry import KINDS, PROJECT

__all__ = ["BuiltConfig", "build_config"]

_log = logging.getLogger("quire.config")
_GPU_BATCHED_TOKENS = section_default(SchedulerConfig, "max_num_batched_tokens")
_CPU_BATCHED_TOKENS = 2048
_STEP_TIMEOUT_S = section_default(WatchdogConfig, "step_timeout_s")
_CPU_STEP_TIMEOUT_S = 300.0
_MAX_DEFAULT_LORAS = 8
_MAX_LORA_RANK = 512


@dataclass(frozen=True, slots=True)
class BuiltConfig:
    """The final configuration, and the plugin manager of this process for hooks that are called later."""

    config: EngineConfig
    plugins: PluginManager


def build_config(args: EngineArgs) -> BuiltConfig:
    """Resolve and check ``args``. Loads no weights. Raises a ``QuireError`` that says what to change."""
    _check_supported(args)
    args, keys_without_flag = spread_speculative_config(replace_classes_by_names(args))
    asked, args = args.structured_output_backend, translate_structured_backend(args)
    # Names that need no model are resolved first: a misspelt one is refused before anything is downloaded.
    first = FirstChoices.make(args)
    plugins, chooser, context = first.plugins, first.chooser, first.context
    if args.structured_output_backend == "llguidance" != asked.partition(":")[0]:
        _log.warning("structured output backend %s: llguidance takes its place", asked)

    from quire.core.loading.chat_template import read_chat_templates
    from quire.core.loading.generation_config import read_generation_defaults
    from quire.core.loading.hf_config import get_architecture, get_context_length, read_hf_config
    from quire.core.loading.hub import resolve_model

    path = resolve_model(args.model, revision=args.revision, download_dir=args.download_dir)
    hf_config = read_hf_config(path)
    device = _resolve_device(args.device)
    parallel = _build_parallel_config(args, device, hf_config)
    architecture = get_architecture(hf_config, partial(plugins.has_plugin, "model"))
    context.update(device=device, hf_config=hf_config, architectures=[architecture])
    choices = {**first.choices, **_resolve_for_model(plugins, chooser, args, context, architecture)}
    _check_options(plugins, choices)
    max_context_len = get_context_length(hf_config)
    max_model_len = args.max_model_len or max_context_len
    if args.max_model_len is not None and not 0 < args.max_model_len <= max_context_len:
        raise ConfigError(
            f"max_model_len {args.max_model_len} is outside what {args.model} was made for; give 1 to {max_context_len}"
        )
    speculation, draft_choices = build_speculation_config(args, keys_without_flag, plugins, context, max_model_len)
    choices.update(draft_choices)
    _check_options(plugins, draft_choices)
    tokenizer = resolve_model(args.tokenizer) if args.tokenizer else path
    context["chat_template"] = read_chat_templates(tokenizer, args.chat_template)
    parsers = _resolve_parsers(chooser, args, context)
    choices.update(parsers)
    _check_options(plugins, parsers)
    generation = read_generation_defaults([path, tokenizer], args.generation_config, args.override_generation_config)
    model = ModelConfig(
        model=args.model,
        path=str(path),
        tokenizer_path=str(tokenizer),
        dtype=_resolve_dtype(args.dtype, device, hf_config),
        device=device,
        max_model_len=max_model_len,
        vocab_size=int(hf_config.get_text_config().vocab_size),
        architecture=architecture,
        load_format=args.load_format,  # type: ignore[arg-type]  # one of its choices, as checked
        seed=args.seed,
        served_names=tuple(args.served_model_name) or (args.model,),
        eos_token_ids=generation.eos_token_ids,
        sampling_defaults=generation.sampling_params,
    )
    config = EngineConfig(
        model=model,
        cache=_build_cache_config(args),
        scheduler=_build_scheduler_config(args, device, max_model_len),
        plugins=choices,
        enforce_eager=args.enforce_eager,
        cpu_threads=args.cpu_threads,
        speculation=speculation,
        adapters=_build_adapter_config(args),
        recording=_build_recording_config(args),
        capture_shapes=args.capture_shapes,
        watchdog=_build_watchdog_config(args, device),
        parallel=parallel,
        extra={
            "chat_template": args.chat_template,
            "auto_tool_choice": args.enable_auto_tool_choice,
            "lora_modules": _read_lora_modules(args),
            "download_dir": args.download_dir,
        },
    )
    if args.plugins:
        plugins.call_hook("quire_configure", config=config)
        atexit.register(plugins.unconfigure_plugins)
    return BuiltConfig(config, plugins)


def _check_supported(args: EngineArgs) -> None:
    if args.capture_shapes is not None and not Path(args.capture_shapes).absolute().parent.is_dir():
        raise ConfigError(f"--capture-shapes {args.capture_shapes}: its folder does not exist; make it first")
    if args.trust_remote_code:
        raise ConfigError("trust_remote_code is not supported: Quire never runs code from a checkpoint; write a plugin")
    for name in PARALLEL_SIZES:
        if getattr(args, name) < 1:
            raise ConfigError(f"{name} must be at least 1, got {getattr(args, name)}")
    for setting in settings_of(EngineArgs):
        value = getattr(args, setting.name)
        if setting.choices and value not in setting.choices:
            raise ConfigError(f"{setting.name} {value!r} is not known; choose {', '.join(setting.choices)}")
    if args.cpu_threads is not None and args.cpu_threads < 1:
        raise ConfigError(f"cpu_threads must be at least 1, got {args.cpu_threads}")


def _resolve_for_model(
    plugins: PluginManager, chooser: PluginChooser, args: EngineArgs, context: dict[str, Any], architecture: str
) -> dict[str, PluginChoice]:
    """The kinds whose choice needs the model or the device, and what takes the place of another author's if that keeps
    failing: the bundled attention of the device, and the bundled loader of the checkpoint if it has one."""
    choices = {
        "attention": chooser.choose("attention", args.attention_backend, context),
        "quant": chooser.choose("quant", args.quantization, context),
        "model": chooser.choose("model", architecture, context),
    }
    bundled_attention = "triton" if context["device"] == "cuda" else "torch_sdpa"
    for kind, name in (("attention", bundled_attention), ("quant", "auto")):
        if choices[kind].is_bundled:
            continue
        with suppress(PluginError):
            found = plugins.resolve_plugin(kind, name, context, announce=False)
            if found.dist == PROJECT:
                choices[f"{kind}_fallback"] = PluginChoice(kind, found.name, found.target, is_bundled=True)
    return choices


def _resolve_parsers(chooser: PluginChooser, args: EngineArgs, context: dict[str, Any]) -> dict[str, PluginChoice]:
    """The kinds whose choice needs the chat template."""
    return {
        "tool_parser": chooser.choose("tool_parser", args.tool_call_parser, context),
        "reasoning_parser": chooser.choose("reasoning_parser", args.reasoning_parser, context),
    }


def _check_options(plugins: PluginManager, choices: dict[str, PluginChoice]) -> None:
    """Import every chosen class and parse its options, before a weight is read; what is on by default and has none is
    imported where it runs."""
    for choice in choices.values():
        if KINDS[choice.kind].several and not choice.options and choice.is_bundled:
            continue
        cls = plugins.load_class(choice.kind, choice.target)
        parse_options(cls, choice.options)


def _resolve_device(requested: str) -> Any:
    import torch

    if requested == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if requested == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device cuda was asked for, but torch sees no CUDA GPU; use --device cpu")
    return requested


def _resolve_dtype(requested: str, device: str, hf_config: Any) -> str:
    if requested == "auto":
        if device == "cpu":
            return "float32"
        checkpoint_dtype = str(getattr(hf_config, "dtype", None) or "bfloat16").removeprefix("torch.")
        return checkpoint_dtype if checkpoint_dtype in ("float16", "bfloat16") else "bfloat16"
    return DTYPES[requested]


def _build_parallel_config(args: EngineArgs, device: str, hf_config: Any) -> ParallelConfig:
    """Raises ``ConfigError`` where there are too few GPUs, or where ranks cannot share the model evenly."""
    import torch

    from quire.core.loading.hf_config import can_share_heads, can_share_mlp

    size, num_stages = args.tensor_parallel_size, args.pipeline_parallel_size
    is_here = args.executor != "ray"  # otherwise other hosts have GPUs as well, which the executor counts
    if is_here and device == "cuda" and size * num_stages > (num_gpus := torch.cuda.device_count()):
        names = ", ".join(dict.fromkeys(torch.cuda.get_device_name(gpu) for gpu in range(num_gpus)))
        needed = f"tensor_parallel_size {size} needs as many GPUs"
        if num_stages > 1:
            needed = f"tensor_parallel_size {size} x pipeline_parallel_size {num_stages} need {size * num_stages} GPUs"
        raise ConfigError(f"{needed}, and {num_gpus} can be seen ({names}); lower it, or look at CUDA_VISIBLE_DEVICES")
    text_config = hf_config.get_text_config()
    num_layers = int(getattr(text_config, "num_hidden_layers", num_stages))
    if num_stages > num_layers:
        raise ConfigError(
            f"pipeline_parallel_size {num_stages} is more than the {num_layers} layers of {args.model}; "
            f"give 1 to {num_layers}"
        )
    heads = int(getattr(text_config, "num_attention_heads", 0))
    kv_heads = int(getattr(text_config, "num_key_value_heads", None) or heads)
    if not can_share_heads(text_config, size):
        # A model may do without such an MLP, so that the layer refuses what does not divide it.
        sizes = [n for n in range(1, heads + 1) if can_share_heads(text_config, n) and can_share_mlp(text_config, n)]
        raise ConfigError(
            f"tensor_parallel_size {size} does not divide the {heads} attention heads and {kv_heads} KV heads of "
            f"{args.model}; give {', '.join(map(str, sizes))}"
        )
    return ParallelConfig(size, num_stages, args.all_reduce)  # type: ignore[arg-type]  # one of its choices, as checked


def _build_cache_config(args: EngineArgs) -> CacheConfig:
    if args.block_size < 1:
        raise ConfigError(f"block_size must be at least 1, got {args.block_size}")
    if not 0 < args.gpu_memory_utilization <= 1:
        raise ConfigError(f"gpu_memory_utilization must be in (0, 1], got {args.gpu_memory_utilization}")
    if args.num_gpu_blocks_override is not None and args.num_gpu_blocks_override < 2:
        raise ConfigError(f"num_gpu_blocks_override must be at least 2, got {args.num_gpu_blocks_override}")
    return CacheConfig(
        block_size=args.block_size,
        num_blocks=args.num_gpu_blocks_override,
        gpu_memory_utilization=args.gpu_memory_utilization,
        dtype=KV_CACHE_DTYPES[args.kv_cache_dtype],
        prefix_caching=args.enable_prefix_caching,
    )


def _read_lora_modules(args: EngineArgs) -> tuple[AdapterModule, ...]:
    """A path that is no folder is refused before the model is loaded."""
    from quire.core.loading.hub import check_adapter_path

    modules = parse_lora_modules(args.lora_modules)
    for module in modules:
        check_adapter_path(module.path)
    return modules


def _build_adapter_config(args: EngineArgs) -> AdapterConfig | None:
    num_modules = len(args.lora_modules)
    if not args.enable_lora and not num_modules:
        if args.max_loras is not None or args.max_cpu_loras is not None:
            name = "max_cpu_loras" if args.max_loras is None else "max_loras"
            raise ConfigError(
                f"{name} bounds adapters, and there are none without enable_lora or lora_modules; give one"
            )
        return None
    max_loras = min(max(num_modules, 1), _MAX_DEFAULT_LORAS) if args.max_loras is None else args.max_loras
    max_cpu_loras = max(2 * max_loras, num_modules) if args.max_cpu_loras is None else args.max_cpu_loras
    if max_loras < 1:
        raise ConfigError(f"max_loras must be at least 1, got {max_loras}")
    if max_cpu_loras < max_loras:
        raise ConfigError(f"max_cpu_loras {max_cpu_loras} is less than max_loras {max_loras}; raise the one")
    if not 1 <= args.max_lora_rank <= _MAX_LORA_RANK:
        raise ConfigError(f"max_lora_rank must be 1 to {_MAX_LORA_RANK}, got {args.max_lora_rank}")
    return AdapterConfig(
        max_loras,
        args.max_lora_rank,
        max_cpu_loras,
        DTYPES.get(args.lora_dtype, "auto"),
        tuple(args.lora_target_modules),
    )


def _build_recording_config(args: EngineArgs) -> RecordingConfig | None:
    if args.record is None:
        if args.record_prompts:
            raise ConfigError("record_prompts has nothing to add to: name a file with --record FILE")
        return None
    if args.pipeline_parallel_size > 1:
        raise ConfigError("record is not supported beside pipeline_parallel_size yet: a replay has one stage")
    from quire.core.traces.recorder import choose_recording_path

    choose_recording_path(args.record)  # raises where none can be written
    return RecordingConfig(args.record, args.record_prompts)


def _build_scheduler_config(args: EngineArgs, device: str, max_model_len: int) -> SchedulerConfig:
    num_tokens = args.max_num_batched_tokens
    if num_tokens is None:
        num_tokens = max(_CPU_BATCHED_TOKENS if device == "cpu" else _GPU_BATCHED_TOKENS, args.max_num_seqs)
        if not args.enable_chunked_prefill:
            num_tokens = max(num_tokens, max_model_len)
    if args.max_num_seqs < 1:
        raise ConfigError(f"max_num_seqs must be at least 1, got {args.max_num_seqs}")
    if args.max_num_queued_requests is not None and args.max_num_queued_requests < 1:
        raise ConfigError(
            f"max_num_queued_requests must be at least 1, got {args.max_num_queued_requests}; leave it out for no limit"
        )
    if num_tokens < args.max_num_seqs:
        raise ConfigError(
            f"max_num_batched_tokens {num_tokens} is less than max_num_seqs {args.max_num_seqs}; each running request "
            f"needs a token a step: raise the one or lower the other"
        )
    if not args.enable_chunked_prefill and num_tokens < max_model_len:
        raise ConfigError(
            f"without chunked prefill a step must hold the longest prompt: max_num_batched_tokens {num_tokens} is less "
            f"than max_model_len {max_model_len}; raise it, or leave chunked prefill on"
        )
    return SchedulerConfig(args.max_num_seqs, num_tokens, args.enable_chunked_prefill, args.max_num_queued_requests)


def _build_watchdog_config(args: EngineArgs, device: str) -> WatchdogConfig:
    seconds = args.step_timeout
    if seconds is None:
        seconds = _CPU_STEP_TIMEOUT_S if device == "cpu" else _STEP_TIMEOUT_S
    if not seconds >= 0:
        raise ConfigError(f"step_timeout must be at least 0 seconds, got {seconds}; 0 is no limit")
    if args.max_engine_restarts < 0:
        raise ConfigError(f"max_engine_restarts must be at least 0, got {args.max_engine_restarts}")
    on_hang: Literal["restart", "exit"] = "exit" if args.on_hang == "exit" else "restart"
    return WatchdogConfig(seconds or math.inf, on_hang, args.max_engine_restarts)
