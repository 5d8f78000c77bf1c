"""How the Triton decode kernel splits a request's keys, and merges the splits."""

from __future__ import annotations

import itertools

import pytest
import torch

from quire.core.contracts.attention import AttentionLimits, KVLayout
from quire.core.testing.attention_problem import AttentionProblem, assert_backend_matches, make_spec, solve_with
from quire.plugins.attention.triton.backend import TritonBackend
from quire.plugins.attention.triton.decode_work_list import DecodeWorkList

pytestmark = pytest.mark.skipif(
    bool(TritonBackend.unsupported(make_spec(), torch.device("cuda" if torch.cuda.is_available() else "cpu"))),
    reason="neither a GPU nor TRITON_INTERPRET=1",
)


class FixedSplitBackend(TritonBackend):
    """Splits of 16 keys, at most 32 of them."""

    def __init__(self, spec, device, options=None) -> None:
        super().__init__(spec, device, TritonBackend.Options(fixed_split_size=16))


def test_fixed_splits_grow_beyond_32() -> None:
    """Lengths of 1, 3, 4 and 38 times the smallest split."""
    assert_backend_matches(FixedSplitBackend, make_spec(), [(1, 16), (1, 48), (1, 49), (1, 600), (1, 1)], lse=True)
    assert_backend_matches(
        FixedSplitBackend, make_spec(kind="sliding", window=70), [(1, 110), (1, 80), (1, 20)], lse=True
    )


@pytest.mark.parametrize("kv_dtype", [torch.float16, torch.float8_e4m3fn])
def test_many_requests_of_half_precision(kv_dtype: torch.dtype) -> None:
    """The tile for steps that fill the GPU, with lengths on either side of it."""
    shape = {"dtype": torch.float16, "kv_dtype": kv_dtype, "qk_head_dim": 128, "v_head_dim": 128}
    lengths = [1, 31, 32, 33, 70, 2, 65, 40, 64, 96]
    assert_backend_matches(
        TritonBackend, make_spec(**shape), [(1, length) for length in lengths], fill_unused_with_nan=True
    )
    assert_backend_matches(
        TritonBackend, make_spec(num_heads=8, **shape), [(3, length + 2) for length in lengths], num_decodes=10
    )


def test_fixed_splits_make_results_independent_of_the_batch() -> None:
    spec = make_spec()
    requests = [(1, 140), (1, 20), (9, 70)]
    together = AttentionProblem.random(spec, requests)
    outs = solve_with(FixedSplitBackend, together)[0].split([1, 1, 9])
    for i, start in enumerate((0, 1, 2)):
        alone = AttentionProblem(
            spec=spec,
            requests=[requests[i]],
            num_decodes=int(requests[i][0] == 1),
            q=together.q[start : start + requests[i][0]],
            keys=[together.keys[i]],
            values=[together.values[i]],
            block_table=together.block_table[i : i + 1],
        )
        assert torch.equal(solve_with(FixedSplitBackend, alone)[0], outs[i])


@pytest.mark.parametrize("lengths", [[1], [64], [65, 1, 700], [5000, 1], [3000] * 5, [40] * 60])
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("fixed_split_size", [0, 64])
def test_work_list_covers_each_request_once(lengths: list[int], window: int | None, fixed_split_size: int) -> None:
    """The list holds every key that is seen once: a request's splits in order, the longest request first."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    spec = make_spec(window=window, kind="sliding" if window else "full")
    work_list = DecodeWorkList(spec, AttentionLimits(64, 8192, device), fixed_split_size)
    work_list.build(AttentionProblem.random(spec, [(1, length) for length in lengths]).make_batch(device))
    entries = work_list.entries[: int(work_list.num_entries)].tolist()
    for request, length in enumerate(lengths):
        splits = [entry for entry in entries if entry[0] == request]
        begin = max(0, length - (window or length))
        assert [low for _, low, _, _ in splits] == [begin, *(high for _, _, high, _ in splits[:-1])]
        assert splits[-1][2] == length and all(low < high for _, low, high, _ in splits)
        assert [(packed & 0xFFFF, packed >> 16) for *_, packed in splits] == [
            (i, len(splits)) for i in range(len(splits))
        ]
    longest = [lengths[request] - begin for request, begin, _, packed in entries if packed & 0xFFFF == 0]
    assert longest == sorted(longest, reverse=True)
    order = [entry[0] for entry in entries]
    assert sum(a != b for a, b in itertools.pairwise(order)) == len(lengths) - 1


def test_fixed_split_size_is_a_multiple_of_16() -> None:
    with pytest.raises(ValueError, match="multiple of 16, got 24"):
        TritonBackend.Options(fixed_split_size=24)


def test_refusals_name_the_reason() -> None:
    cpu = torch.device("cpu")
    assert "attention sinks" in TritonBackend.unsupported(make_spec(sinks=True), cpu)
    assert any("bfloat16" in reason for reason in TritonBackend.unsupported(make_spec(dtype=torch.bfloat16), cpu))
    odd = make_spec(kv_dtype=torch.float8_e5m2, v_head_dim=65)
    assert any("odd number of features" in reason for reason in TritonBackend.unsupported(odd, cpu))
    wide = make_spec(qk_head_dim=512, v_head_dim=512)
    assert any("512 features" in reason for reason in TritonBackend.unsupported(wide, cpu))


def test_a_cpu_is_refused_without_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    import triton

    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    assert TritonBackend.unsupported(make_spec(), torch.device("cpu")) == [
        "a CPU (set TRITON_INTERPRET=1 to run kernels in the interpreter)"
    ]


@pytest.mark.parametrize("order", ["head", "slot"])
def test_strides_do_not_depend_on_the_number_of_blocks(order: str) -> None:
    """Kernels are compiled for strides, and the warm-up has a cache of one block."""
    layout = KVLayout(make_spec(), order)
    one, many = (
        layout.view(torch.zeros(blocks, 3 * layout.bytes_per_block, dtype=torch.uint8)[:, : layout.bytes_per_block])
        for blocks in (1, 4)
    )
    assert one.k.stride() == many.k.stride() and one.v.stride() == many.v.stride()
    assert many.v.data_ptr() - many.k.data_ptr() == 16 * 2 * 64 * 4
