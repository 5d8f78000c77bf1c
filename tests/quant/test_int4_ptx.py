"""The instructions that unpack codes on a GPU, run one by one in Python: the interpreter has no inline assembly."""

from __future__ import annotations

import re

import pytest
import torch

from quire.plugins.quant.kernels.int4_words import build_unpack_ptx

MASK = (1 << 32) - 1


def bytes_of(value: int) -> list[int]:
    return [value >> 8 * i & 255 for i in range(4)]


def prmt(a: int, b: int, selector: int) -> int:
    both = bytes_of(a) + bytes_of(b)
    return sum(both[selector >> 4 * i & 7] << 8 * i for i in range(4))


def halves(value: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.tensor([value], dtype=torch.int64).to(torch.uint32).view(torch.uint16).view(dtype).double()


def word(pair: torch.Tensor, dtype: torch.dtype) -> int:
    return int(pair.to(dtype).view(torch.uint16).view(torch.uint32).to(torch.int64).item())


def run(text: str, inputs: dict[str, int], dtype: torch.dtype) -> dict[str, int]:
    held = dict(inputs)

    def value(name: str) -> int:
        return int(name, 0) if name[0].isdigit() else held[name]

    for line in text.strip("{}\n").splitlines():
        if line.startswith(".reg"):
            continue
        name, target, *rest = re.split(r"[ ,;]+", line.strip().rstrip(";"))
        a = [value(r) for r in rest]
        if name == "mov.b32":
            result = a[0]
        elif name == "prmt.b32":
            result = prmt(*a)
        elif name == "shr.u32":
            result = a[0] >> a[1]
        elif name == "shl.b32":
            result = a[0] << a[1] & MASK
        elif name == "and.b32":
            result = a[0] & a[1]
        elif name == "lop3.b32":
            assert a[3] == 0xEA, "(a and b) or c"
            result = a[0] & a[1] | a[2]
        else:
            assert name == f"fma.rn.{'f16x2' if dtype == torch.float16 else 'bf16x2'}"
            result = word(halves(a[0], dtype) * halves(a[1], dtype) + halves(a[2], dtype), dtype)
        held[target] = result
    return held


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_instructions(bits: int, scaled: bool, dtype: torch.dtype) -> None:
    text = build_unpack_ptx(bits, dtype == torch.float16, scaled).value
    random = torch.Generator().manual_seed(bits)
    count, most = 32 // bits, (1 << bits) - 1
    offset = 1024 if dtype == torch.float16 else 128 if bits == 4 else 0
    for turn in range(40):
        words = torch.randint(0, 1 << 32, (2,), generator=random)
        zeros = torch.randint(0, most + 1, (4 if scaled else 1, 2), generator=random)
        if turn < 2:
            words[:], zeros[:] = turn * MASK, (1 - turn) * most
        scales = (torch.rand(4, 2, generator=random, dtype=torch.float64) + 0.5).to(dtype)
        inputs = {f"${count + i}": int(words[i]) for i in range(2)}
        for i, zero in enumerate(zeros):
            inputs[f"${count + 2 + i}"] = word(-(zero.double() + offset), dtype)
        if scaled:
            inputs |= {f"${count + 6 + i}": word(scale, dtype) for i, scale in enumerate(scales)}
        held = run(text, inputs, dtype)
        for j in range(count):
            quarter = j * bits // 8 * scaled
            expected = ((words >> j * bits) & most) - zeros[quarter]
            wide = expected.double() * scales[quarter].double() if scaled else expected.double()
            assert torch.equal(halves(held[f"${j}"], dtype), wide.to(dtype).double()), (turn, j)
