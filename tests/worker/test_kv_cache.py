"""The KV cache's memory: groups, the number of blocks, one allocation in which no two layers overlap."""

from __future__ import annotations

import pytest
import torch

from quire.core.config import CacheConfig
from quire.core.contracts.kv import KVGroup
from quire.core.errors import ConfigError
from quire.core.messages import BlockCopy
from quire.core.sched.limits import compute_max_held_tokens
from quire.core.testing.attention_problem import make_spec
from quire.core.worker.kv_cache import KVCache, compute_num_blocks, group_layers, validate_max_model_len
from quire.plugins.attention.torch_sdpa import TorchSDPABackend

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("num_bytes", "max_tokens", "expected"),
    [
        (1000, 10_000, 10),  # what memory holds
        (1099, 10_000, 10),
        (100_000, 64, 5),  # no more than all requests fill, and the padding block
        (100_000, 65, 6),
        (50, 10_000, 0),
    ],
)
def test_number_of_blocks(num_bytes: int, max_tokens: int, expected: int) -> None:
    assert compute_num_blocks(num_bytes, 100, CacheConfig(block_size=16), max_tokens) == expected


def test_a_number_of_blocks_that_is_given_is_taken() -> None:
    assert compute_num_blocks(0, 100, CacheConfig(num_blocks=7), 1) == 7


@pytest.mark.parametrize(("num_blocks", "fits"), [(5, True), (4, False), (1, False), (0, False)])
def test_one_request_of_the_maximum_length_fits(num_blocks: int, fits: bool) -> None:
    """64 tokens: four blocks of 16, beside the padding block."""
    if fits:
        validate_max_model_len(num_blocks, 16, 64, 64)
        return
    largest = max(num_blocks - 1, 0) * 16
    with pytest.raises(ConfigError, match=f"holds {largest} tokens; set --max-model-len {largest} or less"):
        validate_max_model_len(num_blocks, 16, 64, 64)


def test_a_model_whose_layers_all_have_windows_needs_room_for_these_alone() -> None:
    windows = (KVGroup(window=32), KVGroup(window=48))
    held = compute_max_held_tokens(windows, 16, 1000, max_num_batched_tokens=64, num_speculative_tokens=0)
    assert held == 48 + 64 + 16
    validate_max_model_len(9, 16, 1000, held)
    with pytest.raises(ConfigError, match="takes 128 at a time: the KV cache holds 112 tokens"):
        validate_max_model_len(8, 16, 1000, held)
    assert compute_max_held_tokens((KVGroup(), *windows), 16, 1000, 64, 0) == 1000


@pytest.fixture
def cache() -> KVCache:
    """Five layers in two groups: full, sliding, full, sliding, sliding."""
    full, sliding = make_spec(block_size=4), make_spec(block_size=4, kind="sliding", window=8)
    groups = group_layers([full, sliding, full, sliding, sliding])
    assert groups.specs == [full, sliding] and groups.group_of == [0, 1, 0, 1, 1]
    return KVCache([TorchSDPABackend(spec, CPU) for spec in groups.specs], groups.group_of, CPU)


def test_layers_do_not_overlap(cache: KVCache) -> None:
    cache.allocate(3)
    assert len(cache.layers) == 5 and [group.window for group in cache.groups] == [None, 8]
    for value, layer in enumerate(cache.layers):
        layer.k.fill_(value)
        layer.v.fill_(10 + value)
    for value, layer in enumerate(cache.layers):
        assert (layer.k == value).all() and (layer.v == 10 + value).all()


def test_a_second_allocation_replaces_the_first_in_the_same_list(cache: KVCache) -> None:
    """Whoever was given the list of layers finds the new ones in it."""
    layers = cache.layers
    cache.allocate(1)
    cache.allocate(6)
    assert cache.layers is layers and len(layers) == 5 and layers[0].k.shape[0] == 6


def test_a_block_is_copied_in_every_layer_of_its_group_alone(cache: KVCache) -> None:
    cache.allocate(4)
    for layer in cache.layers:
        for block in range(4):
            layer.k[block], layer.v[block] = block, 10 + block
    cache.copy_blocks([BlockCopy(group=1, source=2, destination=3), BlockCopy(group=1, source=1, destination=0)])
    for group, layer in zip(cache.group_of, cache.layers, strict=True):
        expected = [1, 1, 2, 2] if group == 1 else [0, 1, 2, 3]
        assert [int(layer.k[block].unique()) for block in range(4)] == expected
        assert [int(layer.v[block].unique()) - 10 for block in range(4)] == expected
