"""Which specs the Hopper prefill kernel takes, and what its TMA descriptors address."""

from __future__ import annotations

import pytest
import torch

from quire.core.contracts.attention import KVLayout
from quire.core.testing.attention_problem import make_spec
from quire.plugins.attention.triton.hopper_prefill import HopperPrefill, make_page_descriptor

BFLOAT16 = {"dtype": torch.bfloat16, "kv_dtype": torch.bfloat16, "qk_head_dim": 128, "v_head_dim": 128}


@pytest.mark.parametrize(
    ("changed", "is_supported"),
    [
        ({}, True),
        ({"dtype": torch.float16, "kv_dtype": torch.float16, "qk_head_dim": 64, "v_head_dim": 64}, True),
        ({"num_heads": 7, "num_kv_heads": 1}, True),
        ({"kv_dtype": torch.float8_e4m3fn}, False),
        ({"dtype": torch.float32, "kv_dtype": torch.float32}, False),
        ({"qk_head_dim": 256, "v_head_dim": 256}, False),
        ({"v_head_dim": 64}, False),
        ({"block_size": 1}, False),
        ({"softcap": 30.0}, False),
        ({"kind": "sliding", "window": 64}, False),
    ],
)
def test_supported_specs(changed: dict, is_supported: bool) -> None:
    assert HopperPrefill.supports(make_spec(**(BFLOAT16 | changed))) is is_supported


def test_other_devices_take_the_general_kernel() -> None:
    assert HopperPrefill.create_if_supported(make_spec(**BFLOAT16), torch.device("cpu")) is None


@pytest.mark.parametrize("part", ["k", "v"])
def test_page_descriptor_addresses_every_page(part: str) -> None:
    """For the second of three layers that share each block: a box that begins at a page's first row is that page."""
    spec = make_spec(**BFLOAT16)
    layout = KVLayout(spec)
    size = layout.bytes_per_block
    pool = torch.arange(5 * 3 * size // 2, dtype=torch.int32).to(torch.bfloat16).view(torch.uint8).view(5, 3 * size)
    cache = getattr(layout.view(pool[:, size : 2 * size]), part)
    descriptor = make_page_descriptor(cache)
    assert descriptor.base.data_ptr() == cache.data_ptr() and descriptor.block_shape == [16, 128]
    slots = cache.as_strided(descriptor.shape, descriptor.strides)
    for block in range(5):
        for head in range(spec.num_kv_heads):
            first = block * (cache.stride(0) // 128) + head * 16
            assert torch.equal(slots[first : first + 16], cache[block, head])
