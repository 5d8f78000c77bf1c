"""On a GPU: both backends against float64, over shapes, lengths, windows and block tables that are too slow in the
interpreter, and in the types that it computes wrongly."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.core.contracts.attention import AttentionBackend, AttentionBatch, AttentionLimits, AttentionSpec, LayerKV
from quire.core.testing.attention_problem import (
    AttentionProblem,
    assert_backend_matches,
    assert_matches,
    make_spec,
    run_layer,
)
from quire.core.testing.checks_attention import check_fp8_cache_with_any_scale
from quire.plugins.attention.torch_sdpa import TorchSDPABackend
from quire.plugins.attention.triton.backend import TritonBackend

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

HALF = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
FP8 = pytest.mark.parametrize("kv_dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=["e4m3", "e5m2"])
BACKENDS = pytest.mark.parametrize("backend", [TritonBackend, TorchSDPABackend])


@BACKENDS
@HALF
@pytest.mark.parametrize("dim", [64, 96, 128, 256])
@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 8), (32, 8), (28, 4), (16, 1)])
def test_shapes(backend: type[AttentionBackend], dtype: torch.dtype, dim: int, heads: int, kv_heads: int) -> None:
    spec = make_half_spec(dtype, qk_head_dim=dim, v_head_dim=dim, num_heads=heads, num_kv_heads=kv_heads)
    assert_backend_matches(
        backend, spec, [(1, 1), (1, 63), (1, 1025), (1, 4000), (130, 130), (257, 900), (1, 40)], num_decodes=4
    )


@BACKENDS
@HALF
@pytest.mark.parametrize("window", [1, 17, 128, 1000])
def test_windows(backend: type[AttentionBackend], dtype: torch.dtype, window: int) -> None:
    spec = make_half_spec(dtype, kind="sliding", window=window)
    assert_backend_matches(backend, spec, [(1, 3), (1, 3000), (300, 300), (200, 1500)], lse=True)
    assert_backend_matches(backend, spec, [(1, 3000), (200, 1500)], fill_unused_with_nan=True)


@BACKENDS
@HALF
def test_softcap(backend: type[AttentionBackend], dtype: torch.dtype) -> None:
    assert_backend_matches(backend, make_half_spec(dtype, softcap=5.0, scale=0.5), [(1, 700), (200, 500)], lse=True)


@BACKENDS
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_float32_is_exact(backend: type[AttentionBackend], dim: int) -> None:
    """No tensor-core rounding of inputs."""
    assert_backend_matches(backend, make_spec(qk_head_dim=dim, v_head_dim=dim), [(1, 1000), (100, 400)], lse=True)


@HALF
@pytest.mark.parametrize("block_size", [1, 8, 32, 64])
def test_block_sizes(dtype: torch.dtype, block_size: int) -> None:
    assert_backend_matches(
        TritonBackend, make_half_spec(dtype, block_size=block_size), [(1, 333), (100, 250)], fill_unused_with_nan=True
    )


@HALF
@pytest.mark.parametrize("heads", [16, 32])
def test_many_decodes(dtype: torch.dtype, heads: int) -> None:
    """As many as change the tile, of very different lengths."""
    lengths = [1, 5, 1500, 31, 32, 33, 64, 65, 700, 129] * 6
    spec = make_half_spec(dtype, num_heads=heads, num_kv_heads=8)
    assert_backend_matches(TritonBackend, spec, [(1, length) for length in lengths], lse=True)


@HALF
def test_context_of_more_than_32_splits(dtype: torch.dtype) -> None:
    """Splits longer than the smallest, and a request of one split beside them."""
    spec = make_half_spec(dtype, num_heads=2, num_kv_heads=1)
    problem = AttentionProblem.random(spec, [(1, 40_000), (1, 30)])
    got = solve(problem, max_model_len=40_000)
    assert_matches(problem, got)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_random_steps(data: st.DataObject) -> None:
    """Requests of any lengths, in any mixture."""
    kv_heads = data.draw(st.sampled_from([1, 2, 4]))
    window = data.draw(st.sampled_from([None, 5, 100]))
    spec = make_half_spec(
        torch.bfloat16,
        num_heads=kv_heads * data.draw(st.sampled_from([1, 3, 4, 8])),
        num_kv_heads=kv_heads,
        kind="full" if window is None else "sliding",
        window=window,
    )
    decodes = data.draw(st.lists(st.integers(1, 1200), max_size=6))
    chunks = data.draw(st.lists(st.tuples(st.integers(1, 300), st.integers(0, 700)), max_size=4))
    requests = [(1, length) for length in decodes] + [(count, before + count) for count, before in chunks]
    if requests:
        assert_backend_matches(
            TritonBackend, spec, requests, num_decodes=len(decodes), fill_unused_with_nan=True, seed=len(requests)
        )


@HALF
def test_a_request_does_not_depend_on_its_neighbours(dtype: torch.dtype) -> None:
    """Bit for bit, alone or among others, for decodes with a fixed split size and for chunks."""
    spec = make_half_spec(dtype)
    for requests in ([(1, 777), (1, 20), (1, 3000)], [(37, 400), (200, 200)]):
        together = AttentionProblem.random(spec, requests)
        outs = solve(together, fixed_split_size=256).split([queries for queries, _ in requests])
        for i, (queries, _) in enumerate(requests):
            start = sum(count for count, _ in requests[:i])
            alone = AttentionProblem(
                spec=spec,
                requests=[requests[i]],
                num_decodes=int(queries == 1),
                q=together.q[start : start + queries],
                keys=[together.keys[i]],
                values=[together.values[i]],
                block_table=together.block_table[i : i + 1],
            )
            assert torch.equal(solve(alone, fixed_split_size=256), outs[i])


@pytest.mark.parametrize("queries", [1, 5])
def test_decode_replays_in_a_graph(queries: int) -> None:
    """Captured once at its upper bound, replayed after lengths, blocks and queries changed in place."""
    spec, device = make_half_spec(torch.bfloat16), torch.device("cuda")
    first = AttentionProblem.random(spec, [(queries, n) for n in (100, 2000, 7)], num_decodes=3, seed=1)
    second = AttentionProblem.random(spec, [(queries, n) for n in (1990, 5, 600)], num_decodes=3, seed=2, table_seed=5)
    backend = TritonBackend(spec, device)
    backend.allocate_workspaces(AttentionLimits(8, 4096, device, queries))
    batch = first.make_batch(device)
    batch.max_seq_len = 4096
    q, kv = first.q.cuda(), first.make_kv_cache(backend, device)
    out, graph = capture_graph(backend, batch, q, kv)
    for problem in (second, first):
        new_batch = problem.make_batch(device)
        batch.seq_lens.copy_(new_batch.seq_lens)
        batch.block_table.copy_(new_batch.block_table)
        q.copy_(problem.q)
        replay_graph(graph, backend, kv, problem)
        assert_matches(problem, out.cpu())


@HALF
@pytest.mark.parametrize("queries", [2, 5, 9])
@pytest.mark.parametrize(("heads", "kv_heads"), [(16, 8), (32, 8), (28, 4)])
def test_verification(dtype: torch.dtype, queries: int, heads: int, kv_heads: int) -> None:
    """Few requests, which are split, and so many that the tile changes, each with several queries."""
    spec = make_half_spec(dtype, num_heads=heads, num_kv_heads=kv_heads)
    some = [(queries, length) for length in (queries, 31, 64, 700, 2000)]
    assert_backend_matches(TritonBackend, spec, [*some, (300, 400)], num_decodes=5, lse=True, fill_unused_with_nan=True)
    assert_backend_matches(TritonBackend, spec, some * 12, num_decodes=60)


@HALF
@FP8
@pytest.mark.parametrize("dim", [64, 96, 128, 256])
@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 8), (32, 8), (28, 4)])
def test_fp8_cache_shapes(dtype: torch.dtype, kv_dtype: torch.dtype, dim: int, heads: int, kv_heads: int) -> None:
    spec = make_half_spec(dtype, kv_dtype, qk_head_dim=dim, v_head_dim=dim, num_heads=heads, num_kv_heads=kv_heads)
    assert_backend_matches(
        TritonBackend,
        spec,
        [(1, 1), (1, 63), (1, 1025), (130, 130), (1, 40)],
        num_decodes=3,
        fill_unused_with_nan=True,
        lse=True,
    )


@BACKENDS
def test_fp8_cache_with_any_scale(backend: type[AttentionBackend]) -> None:
    """Of prompts and of decodes: what a scale does to scores, float16 cannot hold."""
    check_fp8_cache_with_any_scale(backend)


@HALF
@FP8
def test_fp8_cache_of_many_decodes(dtype: torch.dtype, kv_dtype: torch.dtype) -> None:
    """As many as change the tile; several queries each; with a window and a soft-cap."""
    lengths = [9, 31, 32, 33, 64, 65, 700, 129] * 8
    for queries in (1, 2, 5, 9):
        spec = make_half_spec(dtype, kv_dtype, num_heads=32, num_kv_heads=8)
        requests = [(queries, length) for length in lengths]
        assert_backend_matches(TritonBackend, spec, requests, num_decodes=len(lengths), fill_unused_with_nan=True)
    assert_backend_matches(
        TritonBackend,
        make_half_spec(dtype, kv_dtype, kind="sliding", window=50),
        [(1, n) for n in lengths],
        fill_unused_with_nan=True,
    )
    assert_backend_matches(
        TritonBackend, make_half_spec(dtype, kv_dtype, softcap=5.0, scale=0.5), [(1, n) for n in lengths], lse=True
    )


@pytest.mark.parametrize(
    ("dtype", "dim", "block_size"),
    [(torch.bfloat16, 128, 16), (torch.bfloat16, 64, 128), (torch.float16, 128, 64), (torch.float16, 64, 8)],
)
def test_more_query_tiles_than_sms(dtype: torch.dtype, dim: int, block_size: int) -> None:
    """Chunks short and long, with and without tokens before them, and ends in the middle of a block."""
    spec = make_half_spec(dtype, qk_head_dim=dim, v_head_dim=dim, num_heads=32, num_kv_heads=8, block_size=block_size)
    some = [(700, 700), (1, 1), (33, 1500), (129, 129), (300, 1301), (5, 2000)]
    assert_backend_matches(TritonBackend, spec, some, num_decodes=0, lse=True)
    assert_backend_matches(
        TritonBackend, spec, [(60, 333), (250, 257)], num_decodes=0, lse=True, fill_unused_with_nan=True
    )


def test_prompts_replay_in_a_graph() -> None:
    """Captured for three prompts and 400 tokens, replayed with fewer of both, many times over."""
    spec, device = make_half_spec(torch.bfloat16), torch.device("cuda")
    problems = [
        AttentionProblem.random(spec, some, num_decodes=0) for some in ([(200, 500), (150, 150), (50, 60)], [(90, 410)])
    ]
    backend = TritonBackend(spec, device)
    backend.allocate_workspaces(AttentionLimits(8, 1024, device))
    batch = problems[0].make_batch(device)
    q, kv = problems[0].q.cuda(), problems[0].make_kv_cache(backend, device)
    out, graph = capture_graph(backend, batch, q, kv)
    for problem in problems * 3:
        new_batch, num_tokens = problem.make_batch(device), len(problem.q)
        batch.query_start_loc.fill_(num_tokens)
        batch.query_start_loc[: new_batch.num_reqs + 1] = new_batch.query_start_loc
        batch.seq_lens.zero_()
        batch.seq_lens[: new_batch.num_reqs] = new_batch.seq_lens
        batch.block_table[: new_batch.num_reqs, : new_batch.block_table.shape[1]] = new_batch.block_table
        q[:num_tokens] = problem.q.cuda()
        replay_graph(graph, backend, kv, problem)
        assert_matches(problem, out[:num_tokens].cpu())


def capture_graph(
    backend: TritonBackend, batch: AttentionBatch, q: torch.Tensor, kv: LayerKV
) -> tuple[torch.Tensor, torch.cuda.CUDAGraph]:
    """The output of a step, and its CUDA graph: run once, then captured."""
    out = torch.empty_like(q)
    backend.prepare_metadata(batch)
    backend.run(0, q, kv, out)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        backend.prepare_metadata(batch)
        backend.run(0, q, kv, out)
    return out, graph


def replay_graph(graph: torch.cuda.CUDAGraph, backend: TritonBackend, kv: LayerKV, problem: AttentionProblem) -> None:
    """With the keys and values of another problem in place of those it was captured with."""
    source = problem.make_kv_cache(backend, kv.k.device)
    kv.k[: len(source.k)].copy_(source.k)
    kv.v[: len(source.v)].copy_(source.v)
    graph.replay()
    torch.cuda.synchronize()


def make_half_spec(dtype: torch.dtype, kv_dtype: torch.dtype | None = None, **fields) -> AttentionSpec:
    shape = {"num_heads": 8, "num_kv_heads": 2, "qk_head_dim": 128, "v_head_dim": 128, "scale": 128**-0.5}
    return make_spec(dtype=dtype, kv_dtype=kv_dtype or dtype, **(shape | fields))


def solve(problem: AttentionProblem, max_model_len: int = 8192, fixed_split_size: int = 0) -> torch.Tensor:
    """The Triton backend's output, on the CPU."""
    spec, device = problem.spec, torch.device("cuda")
    backend = TritonBackend(spec, device, TritonBackend.Options(fixed_split_size=fixed_split_size))
    backend.allocate_workspaces(AttentionLimits(64, max_model_len, device))
    backend.prepare_metadata(problem.make_batch(device))
    return run_layer(backend, 0, problem, device)[0]
