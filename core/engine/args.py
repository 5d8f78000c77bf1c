"""Engine arguments: what users set, by the names of the command line, and the configuration they become."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

__all__ = ["EngineArgs"]


@dataclass(kw_only=True)
class EngineArgs:
    """Every setting of an engine, unresolved. ``quire.core.engine.config_builder.create_config`` resolves them.

    Field names are the command line's flags with underscores; ``LLM(**kwargs)`` and ``AsyncLLM`` take the same names.
    """

    model: str = "quire-tiny"
    tokenizer: str | None = None
    revision: str | None = None
    download_dir: str | None = None
    chat_template: str | None = None
    served_model_name: Sequence[str] = ()
    dtype: str = "auto"
    """``auto`` is the checkpoint's on a GPU and float32 on a CPU."""
    device: str = "auto"
    cpu_threads: int | None = None
    """Threads for the model on a CPU; None: ``OMP_NUM_THREADS``, or all cores but one."""
    load_format: str = "auto"
    seed: int = 0
    max_model_len: int | None = None
    max_num_seqs: int = 256
    max_num_batched_tokens: int | None = None
    max_num_queued_requests: int | None = None
    enable_chunked_prefill: bool = True
    block_size: int = 16
    num_gpu_blocks_override: int | None = None
    """Blocks of the KV cache; None: as many as memory allows."""
    gpu_memory_utilization: float = 0.9
    kv_cache_dtype: str = "auto"
    enable_prefix_caching: bool = True
    tensor_parallel_size: int = 1
    trust_remote_code: bool = False
    enforce_eager: bool = False
    attention_backend: str = "auto"
    kv_allocator: str = "auto"
    scheduling_policy: str = "auto"
    quantization: str = "auto"
    sampler: str = "auto"
    logits_processors: Sequence[str] = ()
    """In addition to the bundled ones."""
    spec_method: str = "auto"
    """Who drafts tokens; ``auto``: ``speculative_model``, if it is given, else nobody."""
    speculative_model: str | None = None
    num_speculative_tokens: int | None = None
    speculative_draft_tensor_parallel_size: int | None = None
    speculative_config: str | Mapping[str, Any] | None = None
    """The same and more in one JSON object, as in vLLM."""
    executor: str = "auto"
    metrics: Sequence[str] = ("auto",)
    plugins: Sequence[str] = ()
    """Distributions whose hooks are turned on (``--plugin``)."""
    plugin_options: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """By kind: the ``key=value`` pairs of ``--<kind>-option``."""
    disable_log_requests: bool = True
