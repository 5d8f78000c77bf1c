"""Unpacking undoes what the formats' own code packs, and what their published layouts say."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quire.plugins.quant.awq import GemmFormat, GemvFastFormat, GemvFormat
from quire.plugins.quant.compressed_tensors import PackedFormat
from quire.plugins.quant.gptq import GPTQFormat
from quire.plugins.quant.grouped import GroupedFormat
from quire.plugins.quant.grouped_weights import unpack_codes

SEEDS = st.integers(0, 2**31)
quick = settings(max_examples=25, deadline=None)


def codes(seed: int, *shape: int, bits: int = 4) -> Tensor:
    return torch.randint(0, 1 << bits, shape, generator=torch.Generator().manual_seed(seed))


def scales(seed: int, *shape: int) -> Tensor:
    return (torch.rand(shape, generator=torch.Generator().manual_seed(seed)) + 0.01).half()


def stream(rows: Tensor, bits: int, width: int = 32) -> Tensor:
    """Rows of codes as rows of words, by Python's own integers."""
    packed = []
    for row in rows.tolist():
        number = sum(code << (i * bits) for i, code in enumerate(row))
        words = [(number >> at) & ((1 << width) - 1) for at in range(0, len(row) * bits, width)]
        packed.append([word - (1 << width) if word >> (width - 1) else word for word in words])
    return torch.tensor(packed, dtype=torch.int16 if width == 16 else torch.int32)


def dense(q: Tensor, z: Tensor, s: Tensor, group: Tensor) -> Tensor:
    """(codes - zeros) * scales in float64, each input by the group it is of."""
    return (q.double() - z.double()[:, group]) * s.double()[:, group]


def read(form: GroupedFormat, tensors: dict[str, Tensor], outputs: int, inputs: int) -> Tensor:
    for name, stored in form.get_stored_tensors(outputs, inputs).items():
        if name in tensors:
            stored.check(name, tensors[name])
    return form.unpack_tensors(tensors, outputs, inputs).dequantize_weights()


@quick
@given(SEEDS, st.integers(1, 8), st.integers(1, 5), st.integers(1, 80))
def test_unpack_undoes_compressed_tensors_packing(seed: int, bits: int, rows: int, count: int) -> None:
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    want = codes(seed, rows, count, bits=bits)
    packed = helpers.pack_to_int32((want - (1 << (bits - 1))).to(torch.int8), bits)
    assert torch.equal(unpack_codes(packed, bits, count).long(), want)


@quick
@given(SEEDS, st.sampled_from([2, 3, 4, 8]), st.integers(1, 5), st.integers(1, 4), st.sampled_from([16, 32]))
def test_unpack_reads_a_stream_of_bits(seed: int, bits: int, rows: int, words: int, width: int) -> None:
    want = codes(seed, rows, words * 32, bits=bits)
    assert torch.equal(unpack_codes(stream(want, bits, width), bits).long(), want)


@quick
@given(SEEDS, st.integers(2, 8), st.booleans(), st.sampled_from([32, 64, -1]), st.booleans())
def test_packed_weights_are_those_compressed_tensors_dequantizes(
    seed: int, bits: int, symmetric: bool, size: int, shuffled: bool
) -> None:
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    outputs, inputs, half = 20, 128, 1 << (bits - 1)
    groups = 1 if size == -1 else inputs // size
    q, s = codes(seed, outputs, inputs, bits=bits), scales(seed, outputs, groups)
    z = torch.full((outputs, groups), half) if symmetric else codes(seed + 1, outputs, groups, bits=bits)
    group = torch.arange(inputs) // (inputs // groups)
    tensors = {
        "weight_packed": helpers.pack_to_int32((q - half).to(torch.int8), bits),
        "weight_scale": s,
        "weight_shape": torch.tensor([outputs, inputs]),
    }
    if not symmetric:
        tensors["weight_zero_point"] = helpers.pack_to_int32((z - half).to(torch.int8), bits, packed_dim=0)
    if shuffled:
        group = group[torch.randperm(inputs, generator=torch.Generator().manual_seed(seed))]
        tensors["weight_g_idx"] = group.int()
    got = read(PackedFormat(bits, size, symmetric, permuted=shuffled), tensors, outputs, inputs)
    torch.testing.assert_close(got.double(), dense(q, z, s, group), rtol=1e-6, atol=0)


@quick
@given(
    SEEDS,
    st.sampled_from([2, 3, 4, 8]),
    st.sampled_from([16, 32, 64, 48, -1]),
    st.booleans(),
    st.sampled_from(["none", "in order", "regular", "any"]),
)
def test_gptq_weights_are_those_of_its_layout(seed: int, bits: int, size: int, old: bool, order: str) -> None:
    outputs, inputs = 32, 128
    per = inputs if size == -1 else size
    groups = -(-inputs // per)
    generator = torch.Generator().manual_seed(seed)
    q, s = codes(seed, outputs, inputs, bits=bits), scales(seed, outputs, groups)
    z = codes(seed + 1, outputs, groups, bits=bits)
    group = torch.arange(inputs) // per
    if order == "regular":
        group = group[torch.randperm(inputs, generator=generator)]
    elif order == "any":
        group = torch.randint(0, groups, (inputs,), generator=generator)
    stored = (z - 1) % (1 << bits) if old else z
    tensors = {
        "qweight": stream(q, bits).T.contiguous(),
        "qzeros": stream(stored.T.contiguous(), bits),
        "scales": s.T.contiguous(),
    }
    if order != "none":
        tensors["g_idx"] = group.int()
    got = read(GPTQFormat(bits, size, old_zeros=old), tensors, outputs, inputs)
    torch.testing.assert_close(got.double(), dense(q, z, s, group), rtol=1e-6, atol=0)


@quick
@given(SEEDS, st.sampled_from([32, 64, 128, -1]))
def test_awq_weights_are_those_of_its_layouts(seed: int, size: int) -> None:
    outputs, inputs = 16, 256
    groups = 1 if size == -1 else inputs // size
    q, s, z = codes(seed, outputs, inputs), scales(seed, outputs, groups), codes(seed + 1, outputs, groups)
    want = dense(q, z, s, torch.arange(inputs) // (inputs // groups))
    shuffled = [0, 2, 4, 6, 1, 3, 5, 7]
    columns = [word * 8 + i for word in range(outputs // 8) for i in shuffled]
    gemm = {"qweight": stream(q.T[:, columns], 4), "qzeros": stream(z.T[:, columns], 4), "scales": s.T.contiguous()}
    got = read(GemmFormat(4, size), gemm, outputs, inputs)
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=0)

    padded = GemvFormat(4, size).count_zero_words(inputs) * 8
    rows = torch.zeros(outputs, padded, dtype=torch.long)
    rows[:, :groups] = z
    wide = torch.zeros(outputs, padded, dtype=torch.float16)
    wide[:, :groups] = s
    gemv = {"qweight": stream(q, 4), "qzeros": stream(rows, 4), "scales": wide}
    got = read(GemvFormat(4, size), gemv, outputs, inputs)
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=0)

    offsets = torch.zeros(outputs, padded, dtype=torch.float16)
    offsets[:, :groups] = -(s * z)
    fast = {"qweight": fast_words(q), "qzeros": offsets.T.contiguous(), "scales": wide.T.contiguous()}
    got = read(GemvFastFormat(4, size), fast, outputs, inputs)
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=0)


def fast_words(q: Tensor) -> Tensor:
    """Of 32 inputs, input ``i`` goes to place ``p``; of four rows and 64 inputs, place ``p`` of row ``r`` to nibble
    ``(r * 64 + p) % 4`` of word ``(r * 64 + p) // 4``."""
    outputs, inputs = q.shape
    row, i = torch.meshgrid(torch.arange(outputs), torch.arange(inputs), indexing="ij")
    first = i % 8 // 2 * 8 + i % 32 // 8 * 2 + i % 2
    place = i // 32 * 32 + first // 8 * 8 + first % 2 * 4 + first % 8 // 2
    at = row // 4 * inputs * 4 + place // 64 * 256 + row % 4 * 64 + place % 64
    nibbles = torch.zeros(outputs * inputs, dtype=torch.long)
    nibbles[at.flatten()] = q.flatten()
    return stream(nibbles.view(outputs // 4, inputs * 4), 4, 16)
