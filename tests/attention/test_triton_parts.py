"""How the Triton decode splits a request: parts that grow, an ordered merge, nothing learnt from the neighbours."""

from __future__ import annotations

import itertools

import pytest
import torch

from quire.core.contracts.attention import AttentionLimits, KVLayout
from quire.core.testing.attention_problem import Problem, attend, compare, make_spec
from quire.plugins.attention.triton.backend import TritonBackend
from quire.plugins.attention.triton.decode_work_list import DecodeWorkList

pytestmark = pytest.mark.skipif(
    bool(TritonBackend.unsupported(make_spec(), torch.device("cuda" if torch.cuda.is_available() else "cpu"))),
    reason="neither a GPU nor TRITON_INTERPRET=1",
)


class Split(TritonBackend):
    """Parts of 16 keys, at most 32 of them."""

    def __init__(self, spec, device, options=None) -> None:
        super().__init__(spec, device, TritonBackend.Options(fixed_split_size=16))


def test_parts_grow_when_there_are_no_more() -> None:
    """Lengths of 1, 3, 4 and 38 times the smallest part."""
    compare(Split, make_spec(), [(1, 16), (1, 48), (1, 49), (1, 600), (1, 1)], lse=True)
    compare(Split, make_spec(kind="sliding", window=70), [(1, 110), (1, 80), (1, 20)], lse=True)


@pytest.mark.parametrize("kv_dtype", [torch.float16, torch.float8_e4m3fn])
def test_many_requests_of_half_precision(kv_dtype: torch.dtype) -> None:
    """The tile for steps that fill the GPU, with lengths on either side of it."""
    shape = {"dtype": torch.float16, "kv_dtype": kv_dtype, "qk_head_dim": 128, "v_head_dim": 128}
    lengths = [1, 31, 32, 33, 70, 2, 65, 40, 64, 96]
    compare(TritonBackend, make_spec(**shape), [(1, length) for length in lengths], poison=True)
    compare(TritonBackend, make_spec(num_heads=8, **shape), [(3, length + 2) for length in lengths], num_decodes=10)


def test_neighbours_change_no_bit_of_equal_parts() -> None:
    spec = make_spec()
    requests = [(1, 140), (1, 20), (9, 70)]
    together = Problem.random(spec, requests)
    outs = attend(Split, spec, together)[0].split([1, 1, 9])
    for i, start in enumerate((0, 1, 2)):
        alone = Problem(
            spec=spec,
            requests=[requests[i]],
            num_decodes=int(requests[i][0] == 1),
            q=together.q[start : start + requests[i][0]],
            keys=[together.keys[i]],
            values=[together.values[i]],
            table=together.table[i : i + 1],
        )
        assert torch.equal(attend(Split, spec, alone)[0], outs[i])


@pytest.mark.parametrize("lengths", [[1], [64], [65, 1, 700], [5000, 1], [3000] * 5, [40] * 60])
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("split", [0, 64])
def test_parts_cover_each_request_once(lengths: list[int], window: int | None, split: int) -> None:
    """The list holds every key that is seen, a request's in order, long ones first, and fits its room."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    spec = make_spec(window=window, kind="sliding" if window else "full")
    work_list = DecodeWorkList(spec, AttentionLimits(64, 8192, device), split)
    work_list.build(Problem.random(spec, [(1, length) for length in lengths]).batch(device))
    items = work_list.entries[: int(work_list.num_entries)].tolist()
    for request, length in enumerate(lengths):
        mine = [item for item in items if item[0] == request]
        begin = max(0, length - (window or length))
        assert [low for _, low, _, _ in mine] == [begin, *(high for _, _, high, _ in mine[:-1])]
        assert mine[-1][2] == length and all(low < high for _, low, high, _ in mine)
        assert [(packed & 0xFFFF, packed >> 16) for *_, packed in mine] == [(i, len(mine)) for i in range(len(mine))]
    longest = [lengths[request] - begin for request, begin, _, packed in items if packed & 0xFFFF == 0]
    assert longest == sorted(longest, reverse=True)
    order = [item[0] for item in items]
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
def test_one_block_lies_as_many_do(order: str) -> None:
    """Kernels are compiled for strides, and the warm-up has a cache of one block."""
    layout = KVLayout(make_spec(), order)
    one, many = (
        layout.view(torch.zeros(blocks, 3 * layout.bytes_per_block, dtype=torch.uint8)[:, : layout.bytes_per_block])
        for blocks in (1, 4)
    )
    assert one.k.stride() == many.k.stride() and one.v.stride() == many.v.stride()
    assert many.v.data_ptr() - many.k.data_ptr() == 16 * 2 * 64 * 4
