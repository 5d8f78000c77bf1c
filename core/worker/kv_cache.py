"""The KV cache in memory: how layers group, how many blocks fit, one allocation for all."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from quire.core.config import CacheConfig
from quire.core.contracts.attention import AttentionBackend, AttentionSpec, KVLayout, LayerKV
from quire.core.contracts.kv import KVGroup
from quire.core.errors import ConfigError
from quire.core.ops.pinned import copy_to_device

__all__ = ["KVCache", "compute_num_blocks", "group_layers", "measure_device_bytes", "validate_max_model_len"]


def group_layers(specs: Sequence[AttentionSpec]) -> tuple[list[AttentionSpec], list[int]]:
    """Layers with equal specs form a group: (the groups' specs, the group of each layer)."""
    groups = list(dict.fromkeys(specs))
    return groups, [groups.index(spec) for spec in specs]


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
        """One block of every group."""
        return sum(self.layouts[g].bytes_per_block for g in self.group_of)

    def allocate(self, num_blocks: int) -> None:
        """Make the pool: ``num_blocks`` blocks in each group. Replaces the pool before it."""
        self.layers.clear()
        self._group_pools = []
        if not self.layouts:
            return
        pool = torch.zeros(num_blocks * self.bytes_per_block, dtype=torch.uint8, device=self.device)
        at = 0
        for g, layout in enumerate(self.layouts):
            width = self.group_of.count(g) * layout.bytes_per_block
            self._group_pools.append(pool[at : at + num_blocks * width].view(num_blocks, width))
            at += num_blocks * width
        seen = [0] * len(self.layouts)
        for g in self.group_of:
            size = self.layouts[g].bytes_per_block
            self.layers.append(self.layouts[g].view(self._group_pools[g][:, seen[g] * size : (seen[g] + 1) * size]))
            seen[g] += 1

    def copy_blocks(self, copies: Sequence[tuple[int, int, int]], target_group: int | None = None) -> None:
        """Copy whole blocks, all layers at once: (group, source, destination). A cache whose layers all ``follow`` one
        group of another cache lives under that group's block ids."""
        for g, raw in enumerate(self._group_pools):
            pairs = [(s, d) for group, s, d in copies if group == (g if target_group is None else target_group)]
            if pairs:
                index = copy_to_device(pairs, torch.int64, self.device)
                raw[index[:, 1]] = raw[index[:, 0]]


def compute_num_blocks(num_bytes: int, bytes_per_block: int, config: CacheConfig, max_tokens: int) -> int:
    """Blocks per group that ``num_bytes`` hold, the sink included; no more than ``most_tokens`` tokens need."""
    if config.num_blocks is not None:
        return config.num_blocks
    return min(num_bytes // bytes_per_block, -(-max_tokens // config.block_size) + 1)


def measure_device_bytes(work: Callable[[], None]) -> int:
    """Run ``work``; the bytes of the GPU that it keeps, also those that the driver takes and torch does not know of."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.mem_get_info()[0]
    work()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return max(before - torch.cuda.mem_get_info()[0], 0)


def validate_max_model_len(num_blocks: int, block_size: int, max_model_len: int) -> None:
    """Refuse a context that the pool cannot hold, naming the largest that fits."""
    tokens = (num_blocks - 1) * block_size
    if tokens < max_model_len:
        raise ConfigError(
            f"max_model_len {max_model_len} does not fit: the KV cache holds {max(tokens, 0)} tokens; "
            f"set --max-model-len {max(tokens, 0)} or less, or give the cache more memory"
        )
