"""Configuration: frozen sections, one per component, final before the first component is built."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

__all__ = [
    "AdapterConfig",
    "CacheConfig",
    "EngineConfig",
    "ModelConfig",
    "ParallelConfig",
    "PluginChoice",
    "RecordingConfig",
    "SchedulerConfig",
    "SpeculationConfig",
    "WatchdogConfig",
]


@dataclass(frozen=True, slots=True)
class PluginChoice:
    """A resolved plugin: what the user asked for, and the class it became."""

    kind: str
    name: str
    target: str
    """``module:Class``."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Texts of the command line, or values given in Python; the class's own ``Options`` are made of them."""
    is_bundled: bool = False
    """Whether it comes with Quire itself: what other authors wrote is watched more closely."""


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Which model, in what precision, on what device."""

    model: str
    """As the user named it."""
    path: str
    """The local folder it resolved to."""
    tokenizer_path: str
    dtype: str
    """``float32``, ``float16`` or ``bfloat16``; ``auto`` is resolved."""
    device: Literal["cpu", "cuda"]
    max_model_len: int
    vocab_size: int
    architecture: str
    load_format: Literal["auto", "safetensors", "dummy"] = "auto"
    seed: int = 0
    served_names: tuple[str, ...] = ()
    eos_token_ids: tuple[int, ...] = ()
    """As the model's files list them; the tokenizer's own is beside them."""
    sampling_defaults: Mapping[str, Any] = field(default_factory=dict)
    """Of requests that name none: by the names of ``SamplingParams``."""


@dataclass(frozen=True, slots=True)
class CacheConfig:
    """The KV cache."""

    block_size: int = 16
    """Tokens per block."""
    num_blocks: int | None = None
    """Blocks per group; None: as many as memory allows."""
    gpu_memory_utilization: float = 0.9
    cpu_bytes: int = 1 << 30
    """Size of the pool on a CPU when ``num_blocks`` is None."""
    dtype: str = "auto"
    """As torch calls it; ``auto``: the model's."""
    prefix_caching: bool = True
    watermark: float = 0.01
    """Share of the blocks that requests must leave free when they are admitted."""


@dataclass(frozen=True, slots=True)
class ParallelConfig:
    """Over how many workers a model is split. The same on every rank: which one a worker is, the executor tells it."""

    tensor_parallel_size: int = 1
    """Workers that share every layer."""
    pipeline_parallel_size: int = 1
    """Stages of layers, each on workers of its own."""
    all_reduce: Literal["auto", "nccl"] = "auto"
    """How GPUs sum: messages of the sizes for which it was measured to be faster by Quire's kernels, in memory that all
    GPUs map, or everything by the library."""

    @property
    def num_workers(self) -> int:
        """Of all stages."""
        return self.tensor_parallel_size * self.pipeline_parallel_size

    @property
    def max_in_flight_steps(self) -> int:
        """Steps that are launched and not read: one on each stage, and the next, queued behind them; of several stages
        two, where all are of decodes."""
        return self.pipeline_parallel_size + (1 if self.pipeline_parallel_size == 1 else 2)


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """Limits of a step."""

    max_num_seqs: int = 256
    max_num_batched_tokens: int = 8192
    chunked_prefill: bool = True
    max_queued: int | None = None
    """A request is refused (HTTP 429) while this many wait beyond those for which there are free rows; None: never."""


@dataclass(frozen=True, slots=True)
class SpeculationConfig:
    """Speculative decoding. The proposer is the plugin of kind ``spec_decode``."""

    num_speculative_tokens: int
    """The most draft tokens that a step verifies for a request."""
    draft_model_path: str | None = None
    """Folder of the draft model or head."""
    adaptive: bool = True
    """Draft fewer tokens, or none, where that is faster."""
    draft_tensor_parallel_size: int = 1
    """Workers that share the draft model or head: 1, where each has the whole of it, or as many as share the target."""
    forced_acceptance: float | None = None
    """For benchmarks alone, and the tokens are then wrong: accept each draft with this probability."""


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """Adapters beside the model. How they multiply is the plugin of kind ``adapter``."""

    max_loras: int
    """Adapters that one step can use, each of which has memory on the device."""
    max_lora_rank: int
    max_cpu_loras: int
    """Adapters that are kept in host memory."""
    dtype: str = "auto"
    """In which adapters are kept, as torch calls it; ``auto``: the model's."""
    target_modules: tuple[str, ...] = ()
    """Last parts of the names of the modules that adapters may change (``q_proj``); empty: every linear layer."""


@dataclass(frozen=True, slots=True)
class RecordingConfig:
    """A recording of requests and steps, to replay and to simulate."""

    path: str
    """A file; where there is one already, the next free number comes before its suffixes."""
    prompts: bool = False
    """Whether the tokens of prompts are in it."""


@dataclass(frozen=True, slots=True)
class WatchdogConfig:
    """What is done about an engine core that hangs or dies."""

    step_timeout_s: float = 60.0
    """A step that takes longer is a hang; infinite: none is."""
    on_hang: Literal["restart", "exit"] = "restart"
    """Replace the engine's process, or let the service end."""
    max_engine_restarts: int = 3
    """In an hour; one more hang ends the service."""


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Everything the engine core is built from. A component gets its section, never the whole."""

    model: ModelConfig
    cache: CacheConfig
    scheduler: SchedulerConfig
    plugins: Mapping[str, PluginChoice]
    """By kind; kinds of which several may be active are keyed ``kind:0``, ``kind:1`` ..."""
    enforce_eager: bool = False
    cpu_threads: int | None = None
    speculation: SpeculationConfig | None = None
    adapters: AdapterConfig | None = None
    """None: there are none, and nothing is spent on them."""
    recording: RecordingConfig | None = None
    capture_shapes: str | None = None
    """A file in which the shapes of steps are counted, for benchmarks of kernels."""
    watchdog: WatchdogConfig = field(default_factory=WatchdogConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    extra: Mapping[str, Any] = field(default_factory=dict)

    def plugin(self, kind: str) -> PluginChoice:
        """The one choice of ``kind``."""
        return self.plugins[kind]

    def plugins_of(self, kind: str) -> list[PluginChoice]:
        """Every choice of a kind of which several may be active."""
        return [choice for key, choice in sorted(self.plugins.items()) if key.split(":")[0] == kind]
