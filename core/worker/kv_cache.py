"""The KV cache in memory: how layers group, how many blocks fit, one allocation for all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from quire.core.config import CacheConfig
from quire.core.contracts.attention import AttentionBackend, AttentionSpec, KVLayout, LayerKV
from quire.core.contracts.kv import KVGroup
from quire.core.errors import ConfigError
from quire.core.messages import BlockCopy
from quire.core.ops.pinned import copy_to_device

__all__ = [
    "KVCache",
    "LayerGroups",
    "compute_kv_cache_bytes",
    "compute_num_blocks",
    "group_layers",
    "measure_kept_bytes",
    "measure_peak_bytes",
    "validate_max_model_len",
]


@dataclass(frozen=True, slots=True)
class LayerGroups:
    """Layers grouped by their specs: those of a group share block tables and a backend."""

    specs: list[AttentionSpec]
    """By group."""
    group_of: list[int]
    """By layer."""


def group_layers(
    layer_specs: Sequence[AttentionSpec], model_specs: Sequence[AttentionSpec] | None = None
) -> LayerGroups:
    """Layers with equal specs form a group, in the order in which they occur in the model, of which ``layer_specs`` may
    be a part: a group may have no layer here."""
    specs = list(dict.fromkeys(layer_specs if model_specs is None else model_specs))
    return LayerGroups(specs, [specs.index(spec) for spec in layer_specs])


class KVCache:
    """Every layer's cache, cut from one allocation; within a group a block's layers lie side by side."""

    def __init__(self, backends: Sequence[AttentionBackend], group_of: Sequence[int], device: torch.device) -> None:
        self.group_of = list(group_of)
        self.layouts: list[KVLayout] = [backend.kv_layout() for backend in backends]
        self.device = device
        self.layers: list[LayerKV] = []
        self._group_pools: list[torch.Tensor] = []

    @property
    def groups(self) -> tuple[KVGroup, ...]:
        """What the allocator is told."""
        return tuple(KVGroup(layout.spec.window) for layout in self.layouts)

    @property
    def bytes_per_block(self) -> int:
        """One block of every group, all layers."""
        return sum(self.layouts[g].bytes_per_block for g in self.group_of)

    def allocate(self, num_blocks: int) -> None:
        """Allocate ``num_blocks`` blocks in each group, in place of what was allocated before."""
        self.layers.clear()  # the old pool is freed before the new one is allocated, and the list stays the same object
        self._group_pools = []
        if not self.layouts:
            return
        pool = torch.zeros(num_blocks * self.bytes_per_block, dtype=torch.uint8, device=self.device)
        offset = 0
        for g, layout in enumerate(self.layouts):
            block_bytes = self.group_of.count(g) * layout.bytes_per_block
            group_pool = pool[offset : offset + num_blocks * block_bytes]
            self._group_pools.append(group_pool.view(num_blocks, block_bytes))
            offset += num_blocks * block_bytes
        # A layer is a slice of columns, so that a block of all its layers is contiguous and copied as one row.
        next_layer = [0] * len(self.layouts)
        for g in self.group_of:
            size = self.layouts[g].bytes_per_block
            columns = slice(next_layer[g] * size, (next_layer[g] + 1) * size)
            self.layers.append(self.layouts[g].view(self._group_pools[g][:, columns]))
            next_layer[g] += 1

    def copy_blocks(self, copies: Sequence[BlockCopy], target_group: int | None = None) -> None:
        """Copy whole blocks, all layers at once. A cache whose layers all live under the
        block ids of one ``target_group`` of another cache copies what that group does."""
        for g, group_pool in enumerate(self._group_pools):
            wanted_group = g if target_group is None else target_group
            pairs = [(copy.source, copy.destination) for copy in copies if copy.group == wanted_group]
            if pairs:
                index = copy_to_device(pairs, torch.int64, self.device)  # (n, 2)
                group_pool[index[:, 1]] = group_pool[index[:, 0]]


def compute_kv_cache_bytes(config: CacheConfig, device: torch.device, weight_bytes: int, activation_bytes: int) -> int:
    """What is left for the cache, beside what is in use now and ``activation_bytes`` for the largest step. Raises
    ``ConfigError`` where that is nothing, unless the configuration gives the number of blocks."""
    if device.type == "cpu":
        return config.cpu_bytes
    free, total = torch.cuda.mem_get_info()
    used = total - free  # by other processes too: the share of memory is of the whole card
    available = int(total * config.gpu_memory_utilization) - used - activation_bytes
    if available <= 0 and config.num_blocks is None:
        gib = 2**30
        raise ConfigError(
            f"gpu_memory_utilization {config.gpu_memory_utilization} leaves nothing for the KV cache: weights take "
            f"{weight_bytes / gib:.1f} GiB, a step {activation_bytes / gib:.1f} GiB, other processes and CUDA itself "
            f"{max(0, used - weight_bytes) / gib:.1f} GiB, of {total / gib:.1f} GiB; raise it"
        )
    return max(0, available)


def compute_num_blocks(num_bytes: int, bytes_per_block: int, config: CacheConfig, max_tokens: int) -> int:
    """Blocks per group that ``num_bytes`` hold, the padding block included; no more than ``max_tokens`` tokens need.
    A number that the configuration gives is taken as it is."""
    if config.num_blocks is not None:
        return config.num_blocks
    return min(num_bytes // bytes_per_block, -(-max_tokens // config.block_size) + 1)


def validate_max_model_len(num_blocks: int, block_size: int, max_model_len: int, max_held_tokens: int) -> None:
    """Raise ``ConfigError`` for a context that the pool cannot hold, naming the largest that fits. A request holds
    blocks of ``max_held_tokens`` tokens at most: fewer than its context where every layer has a window."""
    tokens = (num_blocks - 1) * block_size
    if tokens < max_held_tokens:
        needed = "" if max_held_tokens == max_model_len else f" and takes {max_held_tokens} at a time"
        raise ConfigError(
            f"max_model_len {max_model_len} does not fit{needed}: the KV cache holds {max(tokens, 0)} tokens; "
            f"set --max-model-len {max(tokens, 0)} or less, or give the cache more with "
            "--gpu-memory-utilization, or --num-gpu-blocks-override where that is set"
        )


def measure_kept_bytes(work: Callable[[], None]) -> int:
    """Run ``work``; the bytes of the GPU that it keeps, also those that the driver takes and torch does not know of."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    free_before = torch.cuda.mem_get_info()[0]
    work()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return max(free_before - torch.cuda.mem_get_info()[0], 0)


def measure_peak_bytes(work: Callable[[], object]) -> int:
    """Run ``work``, which waits for the GPU; the most bytes that torch held for it at a time beside those before."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    work()
    peak = torch.cuda.max_memory_allocated() - before
    torch.cuda.empty_cache()
    return peak
