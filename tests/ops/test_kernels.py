"""Each Triton kernel against its torch twin: in the interpreter by default, in bfloat16 on a GPU."""

from __future__ import annotations

import pytest
import torch

from quire.core.contracts.attention import AttentionSpec, KVLayout, LayerKV
from quire.core.ops import rms_norm, rope_and_cache, silu_and_mul, write_kv
from quire.core.ops.kernels import activation_kernel as activation
from quire.core.ops.kernels import decode_inputs_kernel as decode_inputs
from quire.core.ops.kernels import norm_kernel as norm
from quire.core.ops.kernels import rope_kernel as rope

PLACES = [
    pytest.param("cpu", torch.float32, 1e-6, id="interpreter"),
    pytest.param("cuda", torch.bfloat16, 1e-2, id="gpu", marks=pytest.mark.gpu),
    pytest.param("cuda", torch.float16, 2e-3, id="gpu-f16", marks=pytest.mark.gpu),
]


def close(got: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    got, expected = got.double().cpu(), expected.double()
    assert torch.isfinite(got).all()
    assert (got - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize(("device", "dtype", "tolerance"), PLACES)
@pytest.mark.parametrize("features", [64, 96, 1024])
@pytest.mark.parametrize("residual", [False, True])
def test_rms_norm(device: str, dtype: torch.dtype, tolerance: float, features: int, residual: bool) -> None:
    torch.manual_seed(features)
    x, r = torch.randn(5, features), torch.randn(5, features)
    weight = torch.rand(features) + 0.5
    moved = [t.to(device, dtype) for t in (x, r, weight)]
    exact = [t.cpu().double() for t in moved]
    out, summed = norm.launch_rms_norm(moved[0], moved[2], 1e-5, moved[1] if residual else None)
    whole = exact[0] + exact[1] if residual else exact[0]
    close(out, exact[2] * whole * torch.rsqrt(whole.pow(2).mean(-1, keepdim=True) + 1e-5), tolerance)
    close(summed, whole, tolerance)
    twin = rms_norm(moved[0].cpu(), moved[2].cpu(), 1e-5, moved[1].cpu() if residual else None)
    close(out, twin[0].double(), tolerance)


@pytest.mark.parametrize(("device", "dtype", "tolerance"), PLACES)
def test_silu_and_mul(device: str, dtype: torch.dtype, tolerance: float) -> None:
    gate_up = (torch.randn(3, 2 * 1100) * 4).to(device, dtype)
    close(activation.launch_silu_and_mul(gate_up), silu_and_mul(gate_up.cpu().double()), tolerance)


@pytest.mark.parametrize(("device", "dtype", "tolerance"), PLACES)
@pytest.mark.parametrize("order", ["head", "slot"])
@pytest.mark.parametrize(
    ("dim", "rotary", "normed"), [(64, 64, True), (80, 80, False), (64, 32, True), (96, 48, False)]
)
def test_rope_and_cache(
    device: str, dtype: torch.dtype, tolerance: float, order: str, dim: int, rotary: int, normed: bool
) -> None:
    torch.manual_seed(dim)
    heads, kv_heads, tokens = 6, 2, 7
    qkv = torch.randn(tokens, (heads + 2 * kv_heads) * dim).to(dtype)
    weights = [(torch.rand(dim) + 0.5).to(dtype) if normed else None for _ in range(2)]
    angles = torch.rand(64, rotary // 2) * 6
    cos_sin = torch.cat((angles.cos(), angles.sin()), -1)
    positions = torch.tensor([0, 1, 2, 40, 41, 63, 7])
    slots = torch.tensor([16, 17, 18, 4, 5, 31, 60])
    spec = AttentionSpec(heads, kv_heads, dim, dim, 1.0, dtype, dtype, 16)

    def cache(place: str) -> LayerKV:
        layout = KVLayout(spec, order)  # type: ignore[arg-type]
        raw = torch.zeros(4, 2 * layout.bytes_per_block, dtype=torch.uint8, device=place)
        return layout.view(raw[:, layout.bytes_per_block :])

    def parts(x: torch.Tensor) -> list[torch.Tensor]:
        q, k, v = x.split([heads * dim, kv_heads * dim, kv_heads * dim], -1)
        return [q.unflatten(1, (heads, dim)), k.unflatten(1, (kv_heads, dim)), v.unflatten(1, (kv_heads, dim))]

    theirs, ours = cache("cpu"), cache(device)
    q_norm, k_norm = weights
    expected = rope_and_cache(*parts(qkv), positions, cos_sin, theirs, slots, q_norm=q_norm, k_norm=k_norm, eps=1e-6)
    moved = [None if w is None else w.to(device) for w in weights]
    got = rope.launch_rope_and_cache(
        *parts(qkv.to(device, copy=True)),
        positions.to(device),
        cos_sin.to(device),
        ours,
        slots.to(device),
        *moved,
        1e-6,
    )
    for a, b in [*zip(got, expected, strict=True), (ours.k, theirs.k), (ours.v, theirs.v)]:
        close(a, b.double(), tolerance)


@pytest.mark.parametrize("kv_dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_an_fp8_cache_is_scaled_and_never_overflows(device: str, kv_dtype: torch.dtype) -> None:
    """What is read back is what was meant, to half a step of the type, or the largest it has."""
    torch.manual_seed(1)
    k, v = (torch.randn(5, 2, 64, device=device) * 8 for _ in range(2))
    if device == "cpu":  # the interpreter loses the carry when it rounds: 15.9 becomes 8
        k, v = (x.to(kv_dtype).float() for x in (k, v))
    v[0, 0, 0], v[1, 1, 63] = 1e6, -1e6
    layout = KVLayout(AttentionSpec(2, 2, 64, 64, 1.0, torch.float32, kv_dtype, 16))
    kv = layout.view(torch.zeros(3, layout.bytes_per_block, dtype=torch.uint8, device=device))
    kv.k_scale, kv.v_scale = (torch.tensor([x], device=device) for x in (0.25, 0.5))
    positions, slots = torch.zeros(5, dtype=torch.int64, device=device), torch.tensor([16, 3, 40, 17, 9], device=device)
    no_turn = torch.cat((torch.ones(1, 32), torch.zeros(1, 32)), -1).to(device)
    rope.launch_rope_and_cache(k.clone(), k.clone(), v, positions, no_turn, kv, slots, None, None, 1e-6)
    twin = layout.view(torch.zeros(3, layout.bytes_per_block, dtype=torch.uint8, device=device))
    twin.k_scale, twin.v_scale = kv.k_scale, kv.v_scale
    write_kv(k, v, twin, slots)
    most, step = torch.finfo(kv_dtype).max, torch.finfo(kv_dtype).eps
    for x, scale, ours, theirs in ((k, 0.25, kv.k, twin.k), (v, 0.5, kv.v, twin.v)):
        meant = (x.double() / scale).clamp(-most, most)
        for cache in (ours, theirs):
            held = cache.float().transpose(1, 2).flatten(0, 1)[slots].double()
            torch.testing.assert_close(held, meant, rtol=step / 2, atol=torch.finfo(kv_dtype).tiny)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_decode_inputs(device: str) -> None:
    rows = torch.tensor([3, 0, 5, 5, 5], device=device)  # row 5 is padding
    token_ids = torch.arange(6 * 64, dtype=torch.int32, device=device).view(6, 64)
    computed = torch.tensor([17, 9, 9, 31, 9, 9], dtype=torch.int32, device=device)
    table = torch.arange(6 * 4, dtype=torch.int32, device=device).view(6, 4)
    table[5] = 0
    ids, lens = (torch.full((5,), -1, dtype=torch.int32, device=device) for _ in range(2))
    positions, slots = (torch.full((5,), -1, dtype=torch.int64, device=device) for _ in range(2))
    blocks = torch.zeros(5, 4, dtype=torch.int32, device=device)
    none = torch.zeros_like(rows)
    decode_inputs.launch_decode_inputs(
        rows, none, token_ids, computed, table, ids, positions, lens, slots, blocks, 16, 60, advance=True
    )
    assert ids.tolist() == [3 * 64 + 31, 17, 5 * 64, 5 * 64, 5 * 64]
    assert positions.tolist() == [31, 17, 0, 0, 0]
    assert lens.tolist() == [32, 18, 1, 1, 1]
    assert slots.tolist() == [13 * 16 + 15, 1 * 16 + 1, 0, 0, 0]
    assert blocks[0, :2].tolist() == [12, 13]
    assert blocks[1, :2].tolist() == [0, 1]
    assert computed.tolist() == [18, 9, 9, 32, 9, 9]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_inputs_of_drafts(device: str) -> None:
    """Three queries a request, of which the drafts granted are real and the rest writes to block 0."""
    rows = torch.tensor([3, 0, 4], device=device)  # row 4 is padding
    drafts = torch.tensor([2, 1, 0], device=device)
    token_ids = torch.arange(5 * 64, dtype=torch.int32, device=device).view(5, 64)
    computed = torch.tensor([15, 9, 9, 30, 0], dtype=torch.int32, device=device)
    table = torch.arange(5 * 4, dtype=torch.int32, device=device).view(5, 4)
    table[4] = 0
    ids = torch.full((9,), -1, dtype=torch.int32, device=device)
    lens = torch.full((3,), -1, dtype=torch.int32, device=device)
    positions, slots = (torch.full((9,), -1, dtype=torch.int64, device=device) for _ in range(2))
    blocks = torch.zeros(3, 4, dtype=torch.int32, device=device)
    decode_inputs.launch_decode_inputs(
        rows, drafts, token_ids, computed, table, ids, positions, lens, slots, blocks, 16, 32, advance=False
    )
    assert ids.tolist() == [192 + 30, 192 + 31, 192 + 32, 15, 16, 0, 256, 0, 0]
    assert positions.tolist() == [30, 31, 31, 15, 16, 17, 0, 1, 2]  # none beyond the longest context
    assert lens.tolist() == [33, 18, 3]
    assert slots.tolist()[:5] == [13 * 16 + 14, 13 * 16 + 15, 14 * 16, 15, 1 * 16]
    assert all(slot < 16 for slot in slots.tolist()[5:])
    assert blocks[0, :3].tolist() == [12, 13, 14]
    assert computed.tolist() == [15, 9, 9, 30, 0]
