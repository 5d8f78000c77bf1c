"""Engine arguments: every setting of an engine as users give it, and the one place where each is defined."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Any

from quire.core.config import AdapterConfig, CacheConfig, ModelConfig, ParallelConfig, SchedulerConfig, WatchdogConfig
from quire.core.engine.setting import section_default, setting, settings_of
from quire.core.engine.vllm_names import translate_kwargs
from quire.core.errors import ConfigError
from quire.core.plugin.registry import suggest_names

__all__ = ["DTYPES", "KV_CACHE_DTYPES", "EngineArgs"]

_log = logging.getLogger("quire.config")

DTYPES: Mapping[str, str] = MappingProxyType(
    {"half": "float16", "float16": "float16", "bfloat16": "bfloat16", "float": "float32", "float32": "float32"}
)
"""Spellings of ``dtype`` beside ``auto``, and the torch dtype that each means."""

KV_CACHE_DTYPES: Mapping[str, str] = MappingProxyType(
    {
        "auto": "auto",
        "fp8": "float8_e4m3fn",
        "fp8_e4m3": "float8_e4m3fn",
        "fp8_e5m2": "float8_e5m2",
        "bfloat16": "bfloat16",
        "float16": "float16",
        "float32": "float32",
    }
)
"""Spellings of ``kv_cache_dtype``, and the torch dtype that each means; ``auto`` is the model's."""


@dataclass(kw_only=True)
class EngineArgs:
    """Every setting of an engine, unresolved. ``quire.core.engine.config_builder.build_config`` resolves them.

    Flags of the command line, keyword arguments of ``LLM`` and ``AsyncLLM`` and the tables of docs/cli.md are derived
    from these fields; defaults that belong to a section of the configuration are read from it.
    """

    # model
    model: str = setting(
        "quire-tiny", group="model", help="folder or Hugging Face name of the model; the same as MODEL", metavar="MODEL"
    )
    served_model_name: Sequence[str] = setting(
        (), group="model", help="name(s) by which requests call the model", metavar="NAME", several_words=True
    )
    tokenizer: str | None = setting(
        None, group="model", help="folder or name of the tokenizer, if not the model's", metavar="NAME"
    )
    chat_template: str | None = setting(
        None,
        group="model",
        help="file with the Jinja chat template, the template itself, or the name of one of the model's",
        metavar="FILE",
    )
    generation_config: str = setting(
        "auto",
        group="model",
        help="where sampling defaults of requests come from: the model's generation_config.json (auto), that of a "
        "folder, or none",
        metavar="FOLDER",
    )
    override_generation_config: str | Mapping[str, Any] | None = setting(
        None,
        group="model",
        help='sampling defaults that win over those, as a JSON object: {"temperature": 0.5, "top_k": 20}',
        metavar="JSON",
    )
    revision: str | None = setting(None, group="model", help="branch, tag or commit on the Hugging Face hub")
    download_dir: str | None = setting(
        None, group="model", help="where downloads are kept, if not the Hugging Face cache", metavar="DIR"
    )
    load_format: str = setting(
        section_default(ModelConfig, "load_format"),
        group="model",
        help="dummy: random weights",
        choices=("auto", "safetensors", "dummy"),
    )
    dtype: str = setting(
        "auto",
        group="model",
        help="precision of weights and activations; auto: the checkpoint's on a GPU, float32 on a CPU",
        choices=("auto", *DTYPES),
    )
    quantization: str = setting(
        "auto",
        group="model",
        help="quantization loader; auto reads the checkpoint",
        metavar="NAME",
        aliases=("-q",),
        plugin_kind="quant",
    )
    seed: int = setting(
        section_default(ModelConfig, "seed"), group="model", help="seed of the engine's own random choices", metavar="N"
    )
    trust_remote_code: bool = setting(
        False, group="model", help="refused: Quire never runs code that comes with a model"
    )

    # device
    device: str = setting("auto", group="device", help="where to run", choices=("auto", "cpu", "cuda"))
    cpu_threads: int | None = setting(
        None,
        group="device",
        help="threads of a model on a CPU; default: OMP_NUM_THREADS, else all cores but one",
        metavar="N",
    )
    gpu_memory_utilization: float = setting(
        section_default(CacheConfig, "gpu_memory_utilization"),
        group="device",
        help="share of the GPU's memory to use",
        metavar="SHARE",
    )
    tensor_parallel_size: int = setting(
        section_default(ParallelConfig, "tensor_parallel_size"),
        group="device",
        help="GPUs of this host that share every layer of the model, each with a process",
        metavar="N",
        aliases=("-tp",),
    )
    pipeline_parallel_size: int = setting(
        section_default(ParallelConfig, "pipeline_parallel_size"),
        group="device",
        help="stages into which the model's layers are divided, each on --tensor-parallel-size GPUs of this host",
        metavar="N",
        aliases=("-pp",),
    )
    all_reduce: str = setting(
        section_default(ParallelConfig, "all_reduce"),
        group="device",
        help="how GPUs that share a model sum: auto, by Quire's kernels where they are faster, or nccl alone",
        choices=("auto", "nccl"),
    )
    enforce_eager: bool = setting(False, group="device", help="no CUDA graphs")
    executor: str = setting(
        "auto", group="device", help="executor: how workers are run", metavar="NAME", plugin_kind="executor"
    )
    attention_backend: str = setting(
        "auto", group="device", help="attention backend: the kernels of attention", metavar="NAME",
        plugin_kind="attention",
    )  # fmt: skip

    # limits
    max_model_len: int | None = setting(
        None, group="limits", help="longest prompt plus answer, in tokens; default: the model's own", metavar="N"
    )
    max_num_seqs: int = setting(
        section_default(SchedulerConfig, "max_num_seqs"), group="limits", help="most requests in one step", metavar="N"
    )
    max_num_batched_tokens: int | None = setting(
        None, group="limits", help="most tokens in one step; default: chosen for the device", metavar="N"
    )
    max_num_queued_requests: int | None = setting(
        None,
        group="limits",
        help="requests that may wait beyond those that may run (--max-num-seqs); more get 429; default over HTTP: 16 "
        "times --max-num-seqs",
        metavar="N",
    )
    enable_chunked_prefill: bool = setting(
        section_default(SchedulerConfig, "chunked_prefill"),
        group="limits",
        help="spread long prompts over several steps",
    )
    scheduling_policy: str = setting(
        "auto",
        group="limits",
        help="scheduling policy: which requests run next",
        metavar="NAME",
        plugin_kind="policy",
    )

    # cache
    enable_prefix_caching: bool = setting(
        section_default(CacheConfig, "prefix_caching"),
        group="cache",
        help="share the KV cache of equal prompt prefixes",
    )
    block_size: int = setting(
        section_default(CacheConfig, "block_size"), group="cache", help="tokens per KV block", metavar="N"
    )
    kv_cache_dtype: str = setting(
        section_default(CacheConfig, "dtype"),
        group="cache",
        help="precision of the KV cache; fp8 (e4m3) and fp8_e5m2 take half the memory of 16 bits, so twice the tokens "
        "fit",
        choices=tuple(KV_CACHE_DTYPES),
    )
    num_gpu_blocks_override: int | None = setting(
        None, group="cache", help="KV blocks, whatever the memory; default: as many as fit", metavar="N"
    )
    kv_allocator: str = setting("auto", group="cache", help="allocator of KV blocks", metavar="NAME", plugin_kind="kv")

    # adapters
    enable_lora: bool = setting(
        False, group="adapters", help="serve LoRA adapters beside the model; --lora-modules turns it on too"
    )
    lora_modules: Sequence[str] = setting(
        (),
        group="adapters",
        help="adapters to load, by the names that requests give as their model; the path is a folder or a name on the "
        'hub; also vLLM\'s {"name": NAME, "path": PATH}',
        metavar="NAME=PATH",
        several_words=True,
    )
    max_loras: int | None = setting(
        None,
        group="adapters",
        help="adapters that one step can use, each with memory on the device; default: as many as --lora-modules "
        "names, 1 to 8",
        metavar="N",
    )
    max_lora_rank: int = setting(16, group="adapters", help="largest rank of an adapter", metavar="N")
    max_cpu_loras: int | None = setting(
        None,
        group="adapters",
        help="adapters that are kept in host memory; the least recently used make room; default: twice --max-loras",
        metavar="N",
    )
    lora_target_modules: Sequence[str] = setting(
        (),
        group="adapters",
        help="modules that adapters may change, by the last parts of their names (q_proj v_proj); the others are as "
        "fast as without adapters; default: every linear layer",
        metavar="NAME",
        several_words=True,
    )
    lora_dtype: str = setting(
        section_default(AdapterConfig, "dtype"),
        group="adapters",
        help="precision of adapters; auto: the model's",
        choices=("auto", *DTYPES),
    )

    # speculation
    spec_method: str = setting(
        "auto",
        group="speculation",
        help="how tokens are drafted; auto: by the draft model or head, if one is given",
        metavar="NAME",
        plugin_kind="spec_decode",
    )
    speculative_model: str | None = setting(
        None, group="speculation", help="folder or name of the draft model or head", metavar="MODEL"
    )
    num_speculative_tokens: int | None = setting(
        None,
        group="speculation",
        help="most draft tokens for a request in a step; default: 4, forced_tokens 8",
        metavar="N",
    )
    speculative_draft_tensor_parallel_size: int | None = setting(
        None,
        group="speculation",
        help="GPUs to split the draft model over: 1, or as many as the target, the default where they divide it",
        metavar="N",
    )
    speculative_config: str | Mapping[str, Any] | None = setting(
        None, group="speculation", help="these and more as one JSON object, as in vLLM", metavar="JSON"
    )

    # faults
    step_timeout: float | None = setting(
        None,
        group="faults",
        help="seconds after which a step of the engine is a hang; 0: never; default: 60, on a CPU 300",
        metavar="SECONDS",
    )
    on_hang: str = setting(
        section_default(WatchdogConfig, "on_hang"),
        group="faults",
        help="when the engine hangs or dies: start another one, or end the server with status 1",
        choices=("restart", "exit"),
    )
    max_engine_restarts: int = setting(
        section_default(WatchdogConfig, "max_engine_restarts"),
        group="faults",
        help="restarts of the engine in an hour; one more hang or death ends the server with status 1",
        metavar="N",
    )

    # tools and reasoning
    enable_auto_tool_choice: bool = setting(
        True, group="tools and reasoning", help="find the calls of tools that a model makes of its own accord"
    )
    tool_call_parser: str = setting(
        "auto",
        group="tools and reasoning",
        help="tool-call parser: how the model writes calls; auto: by the chat template; none: calls stay text",
        metavar="NAME",
        plugin_kind="tool_parser",
    )
    reasoning_parser: str = setting(
        "auto",
        group="tools and reasoning",
        help="reasoning parser: how the model reasons; auto: by the chat template; none: it stays in the answer",
        metavar="NAME",
        plugin_kind="reasoning_parser",
    )

    # plugins
    sampler: str = setting(
        "auto", group="plugins", help="sampler: how tokens are sampled", metavar="NAME", plugin_kind="sampler"
    )
    logits_processors: Sequence[str] = setting(
        (),
        group="plugins",
        help="logits processor in addition to the bundled ones; may repeat",
        metavar="NAME",
        plugin_kind="logits_processor",
    )
    op: Sequence[str] | Mapping[str, Any] = setting(
        (),
        group="plugins",
        help="operation (rms_norm, silu_and_mul, rope_and_cache, embedding, lm_head, or all) and the plugin that runs "
        "it; may repeat",
        metavar="NAME=PLUGIN",
        plugin_kind="op",
    )
    structured_output_backend: str = setting(
        "auto", group="plugins", help="structured output: how answers are made to match a schema or a grammar",
        metavar="NAME", plugin_kind="structured_output",
    )  # fmt: skip
    adapter_method: str = setting(
        "auto", group="plugins", help="adapter method: how adapters beside the model multiply", metavar="NAME",
        plugin_kind="adapter",
    )  # fmt: skip
    metrics: Sequence[str] = setting(
        (),
        group="plugins",
        help="metrics exporter in addition to prometheus; may repeat; none: without prometheus",
        metavar="NAME",
        plugin_kind="metrics",
    )
    plugins: Sequence[str] = setting(
        (), group="plugins", help="turn on a distribution's hooks; may repeat", metavar="DIST", flag="--plugin"
    )
    plugin_options: Mapping[str, Any] = field(default_factory=dict)
    """By kind of plugin: option to value, as ``--sampler-option`` gives them, or an object of the plugin's ``Options``.
    Of kinds of which several may be on, an option is called ``NAME.option``, or stands in a mapping under the name."""

    # logging
    disable_log_requests: bool = setting(True, group="logging", help="no line per request in the log")
    disable_log_stats: bool = setting(
        False, group="logging", help="no line of throughput in the server's log every 10 s while there is traffic"
    )
    record: str | None = setting(
        None,
        group="logging",
        help="write arrivals, lengths, outcomes and every step to a file, to replay and simulate; no text, no tokens",
        metavar="FILE",
    )
    capture_shapes: str | None = setting(
        None,
        group="logging",
        help="count the shapes of steps in a file, for quire plugins bench --shapes; no text, no tokens",
        metavar="FILE",
    )
    record_prompts: bool = setting(False, group="logging", help="with --record: the tokens of prompts as well")

    @property
    def num_workers(self) -> int:
        """Processes that share the model."""
        return self.tensor_parallel_size * self.pipeline_parallel_size

    @classmethod
    def from_kwargs(cls, **kwargs: Any) -> EngineArgs:
        """From the keyword arguments of ``LLM`` or ``AsyncLLM``. None means the default, and
        arguments of vLLM's are treated as its flags are. ConfigError for a name that is not a setting."""
        names = [each.name for each in fields(cls)]
        aliases = {_name_of_flag(alias): each.name for each in settings_of(cls) for alias in each.aliases}
        arguments = {aliases.get(name, name): value for name, value in kwargs.items()}
        settings, messages = translate_kwargs(arguments, frozenset(names))
        for name in settings:
            if name not in names:
                raise ConfigError(f"{name!r} is not a setting of the engine; {suggest_names(name, names)}")
        for message in messages:
            _log.warning("%s", message)
        return cls(**settings)


def _name_of_flag(flag: str) -> str:
    return flag.lstrip("-").replace("-", "_")
