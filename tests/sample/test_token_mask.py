"""Masks of tokens on logits: the kernel against the torch code, in the interpreter by default, and on a GPU."""

from __future__ import annotations

import pytest
import torch

from quire.core.sample.kernels.token_mask_kernel import launch_token_masks
from quire.core.sample.token_mask import apply_token_masks

DEVICES = [torch.device("cpu"), pytest.param(torch.device("cuda"), marks=pytest.mark.gpu)]


def make_case(vocab_size: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(vocab_size)
    logits = torch.randn(5, vocab_size, generator=generator).to(dtype)
    bits = torch.randint(-(2**31), 2**31, (4, -(-vocab_size // 32)), generator=generator).int()
    bits[1] = -1
    return logits, torch.tensor([2, -1, 0, 3, 1], dtype=torch.int32), bits


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("vocab_size", [61, 4096, 9001])
def test_a_token_is_forbidden_exactly_where_its_bit_is_zero(vocab_size: int, dtype: torch.dtype) -> None:
    logits, mask_rows, bits = make_case(vocab_size, dtype)
    before = logits.clone()
    apply_token_masks(logits, mask_rows, bits)
    for row, mask_row in enumerate(mask_rows.tolist()):
        for token in (*range(64), vocab_size - 1):
            if token < vocab_size:
                allowed = mask_row < 0 or bool(int(bits[mask_row, token // 32]) >> (token % 32) & 1)
                assert logits[row, token] == (before[row, token] if allowed else float("-inf"))


@pytest.mark.parametrize("device", DEVICES, ids=str)
@pytest.mark.parametrize("vocab_size", [61, 4096, 9001])
def test_the_kernel_does_what_torch_does(vocab_size: int, device: torch.device) -> None:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float16
    logits, mask_rows, bits = make_case(vocab_size, dtype)
    expected = logits.clone()
    apply_token_masks(expected, mask_rows, bits)
    actual = logits.to(device)
    launch_token_masks(actual, mask_rows.to(device), bits.to(device))
    assert torch.equal(actual.cpu(), expected)
