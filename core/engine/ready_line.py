"""What the engine holds, in one line."""

from __future__ import annotations

from quire.core.config import EngineConfig
from quire.core.contracts.executor import KVCapacity
from quire.core.engine.ipc import Ready

__all__ = ["ready_line"]


def ready_line(config: EngineConfig, capacity: KVCapacity | Ready) -> str:
    """Weights, activations, graphs, KV cache, and how many full-length requests it holds."""
    tokens = (capacity.num_blocks - 1) * config.cache.block_size
    kind = "" if config.cache.dtype == "auto" else f" in {config.cache.dtype}"
    parts = [f"weights {_size(capacity.weight_bytes)}"]
    if capacity.activation_bytes:
        parts.append(f"activations {_size(capacity.activation_bytes)}")
    if capacity.graph_bytes:
        parts.append(f"graphs {_size(capacity.graph_bytes)}")
    parts.append(f"KV cache {_size(capacity.num_blocks * capacity.bytes_per_block)} = {tokens:,} tokens{kind}")
    longest = config.model.max_model_len
    parts.append(f"{tokens / longest:.1f} requests of {longest:,} tokens at once")
    return f"{config.model.served_names[0]} ({config.model.dtype} on {config.model.device}): {', '.join(parts)}"


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.1f} MiB"
