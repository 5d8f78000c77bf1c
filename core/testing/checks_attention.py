"""Conformance of attention backends: shapes, lengths, windows and block tables against float64.

A check skips what the backend says, by ``unsupported``, that it does not do. Checks run on the GPU where there is one
and the backend takes it, else on the CPU.
"""

from __future__ import annotations

import dataclasses
import unittest
from typing import Any

import torch

from quire.core.contracts.attention import AttentionBackend, AttentionSpec, GraphKind
from quire.core.testing.attention_capture import CapturedAttention
from quire.core.testing.attention_problem import (
    AttentionProblem,
    assert_backend_matches,
    assert_matches,
    find_device,
    make_backend,
    make_spec,
    require_device,
    run_layer,
    solve_with,
)

__all__ = [
    "check_batch_invariance",
    "check_block_sizes",
    "check_block_table_does_not_matter",
    "check_captured_steps",
    "check_chunks",
    "check_decode",
    "check_fp8_cache",
    "check_fp8_cache_of_other_shapes",
    "check_fp8_cache_with_any_scale",
    "check_fp8_cache_with_large_queries",
    "check_group_sizes",
    "check_half_precision",
    "check_head_dims",
    "check_log_sum_exp",
    "check_long_chunks",
    "check_long_decodes",
    "check_metadata_serves_every_layer_of_its_step",
    "check_mixed_steps",
    "check_prefill",
    "check_sliding_window",
    "check_softcap",
    "check_unsupported_answers_with_reasons",
    "check_unused_slots_do_not_leak",
    "check_verification",
]


def check_unsupported_answers_with_reasons(cls: type[AttentionBackend]) -> None:
    """``unsupported`` is a list of strings, for whatever specification."""
    unknown: Any = "a kind of a later version"
    odd = dataclasses.replace(make_spec(), kind=unknown, causal=False, sinks=True)
    for spec in (make_spec(), odd):
        for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
            reasons = cls.unsupported(spec, torch.device(device))
            assert isinstance(reasons, list) and all(isinstance(reason, str) for reason in reasons), reasons


def check_decode(cls: type[AttentionBackend]) -> None:
    """Requests of one query, of lengths on either side of a page."""
    assert_backend_matches(cls, make_spec(), [(1, 1), (1, 15), (1, 16), (1, 17), (1, 50)])


def check_prefill(cls: type[AttentionBackend]) -> None:
    """Whole prompts, the shortest of one token."""
    assert_backend_matches(cls, make_spec(), [(1, 1), (16, 16), (37, 37)], num_decodes=0)


def check_chunks(cls: type[AttentionBackend]) -> None:
    """Chunks that continue a prompt, on and off page boundaries."""
    assert_backend_matches(cls, make_spec(), [(3, 20), (16, 48), (2, 33)], num_decodes=0)


def check_mixed_steps(cls: type[AttentionBackend]) -> None:
    """Decodes, one-token chunks, chunks and whole prompts in one step."""
    assert_backend_matches(cls, make_spec(), [(1, 33), (1, 5), (1, 20), (7, 30), (19, 19)], num_decodes=2)


def check_group_sizes(cls: type[AttentionBackend]) -> None:
    """Query heads per KV head: one, some, a number that is no power of two, all."""
    for heads, kv_heads in ((2, 2), (8, 2), (7, 1), (6, 2)):
        assert_backend_matches(cls, make_spec(num_heads=heads, num_kv_heads=kv_heads), [(1, 21), (9, 30)])


def check_head_dims(cls: type[AttentionBackend]) -> None:
    """Heads of 64, 96, 128 and 256 features."""
    for dim in (64, 96, 128, 256):
        assert_backend_matches(
            cls, make_spec(qk_head_dim=dim, v_head_dim=dim, num_heads=2, num_kv_heads=1), [(1, 20), (5, 18)]
        )


def check_block_sizes(cls: type[AttentionBackend]) -> None:
    """Pages of other sizes."""
    for size in (1, 8, 32):
        assert_backend_matches(cls, make_spec(block_size=size), [(1, 21), (6, 35)])


def check_sliding_window(cls: type[AttentionBackend]) -> None:
    """Windows shorter than a page, longer than the context, and of one token."""
    for window in (1, 7, 20, 1000):
        spec = make_spec(kind="sliding", window=window)
        assert_backend_matches(cls, spec, [(1, 50), (1, 6), (24, 60), (30, 30)])


def check_softcap(cls: type[AttentionBackend]) -> None:
    """Scores bent by ``softcap * tanh(score / softcap)``."""
    assert_backend_matches(cls, make_spec(softcap=2.0, scale=1.0), [(1, 40), (20, 33)])


def check_log_sum_exp(cls: type[AttentionBackend]) -> None:
    """``lse_out`` is the natural logarithm of the sum of the exponentials of the scaled scores."""
    assert_backend_matches(cls, make_spec(), [(1, 40), (20, 33)], lse=True)
    assert_backend_matches(cls, make_spec(softcap=3.0), [(1, 18), (4, 9)], lse=True)


def check_long_decodes(cls: type[AttentionBackend]) -> None:
    """Lengths that a backend may split over several programs."""
    assert_backend_matches(cls, make_spec(), [(1, 255), (1, 700), (1, 3)], lse=True)
    assert_backend_matches(cls, make_spec(kind="sliding", window=300), [(1, 700)])


def check_long_chunks(cls: type[AttentionBackend]) -> None:
    """Chunks that a backend may cut into several tiles."""
    assert_backend_matches(cls, make_spec(num_heads=2, num_kv_heads=1), [(270, 290)], lse=True)
    assert_backend_matches(cls, make_spec(num_heads=2, num_kv_heads=1, kind="sliding", window=40), [(270, 290)])


def check_half_precision(cls: type[AttentionBackend]) -> None:
    """The same in float16 and bfloat16."""
    num_supported = 0
    for dtype in (torch.float16, torch.bfloat16):
        spec = make_spec(dtype=dtype, kv_dtype=dtype)
        if find_device(cls, spec) is not None:
            assert_backend_matches(cls, spec, [(1, 33), (1, 7), (19, 40)])
            num_supported += 1
    if not num_supported:
        raise unittest.SkipTest("no 16-bit type is supported")


def check_fp8_cache(cls: type[AttentionBackend]) -> None:
    """Keys and values of one byte each, with a scale for the layer's keys and one for its values."""
    for spec in _fp8_specs(cls):
        assert_backend_matches(cls, spec, [(1, 33), (1, 300), (19, 40)], fill_unused_with_nan=True, lse=True)
        assert_backend_matches(cls, spec, [(3, 33), (3, 3)], num_decodes=2)


def check_fp8_cache_of_other_shapes(cls: type[AttentionBackend]) -> None:
    """The same with other heads, groups and pages, with windows and with soft-caps."""
    for spec in _fp8_specs(cls)[-2:]:
        types = {"dtype": spec.dtype, "kv_dtype": spec.kv_dtype}
        for dim in (96, 128, 256):
            of_dim = make_spec(qk_head_dim=dim, v_head_dim=dim, num_heads=2, num_kv_heads=1, **types)
            assert_backend_matches(cls, of_dim, [(1, 20), (5, 18)], fill_unused_with_nan=True)
        group = make_spec(num_heads=7, num_kv_heads=1, block_size=8, **types)
        assert_backend_matches(cls, group, [(1, 21), (6, 35)], fill_unused_with_nan=True)
        sliding = make_spec(kind="sliding", window=20, **types)
        assert_backend_matches(cls, sliding, [(1, 50), (1, 6), (24, 60)], fill_unused_with_nan=True)
        assert_backend_matches(cls, sliding, [(4, 50), (4, 6)], num_decodes=2, fill_unused_with_nan=True)
        assert_backend_matches(cls, make_spec(softcap=2.0, scale=1.0, **types), [(1, 40), (20, 33)], lse=True)


def check_fp8_cache_with_large_queries(cls: type[AttentionBackend]) -> None:
    """Queries of thousands, and features of ten thousand beside such of one, lose nothing beside an FP8 cache."""
    for spec in _fp8_specs(cls, (torch.bfloat16, torch.float16)):
        for feature, factor in ((slice(None), 2000.0), (3, 10_000.0)):
            problem = AttentionProblem.random(spec, [(1, 33), (1, 90), (19, 40)])
            problem.q[..., feature] *= factor
            assert_matches(problem, *solve_with(cls, problem))


def check_fp8_cache_with_any_scale(cls: type[AttentionBackend]) -> None:
    """Keys with a scale of 1e-4, 1 or 1e4 lose nothing, beside prompts as beside decodes."""
    for spec in _fp8_specs(cls):
        for scale in (1e-4, 1.0, 1e4):
            factor = scale**0.3  # of queries, so that neither they nor their products with keys are of any one size
            scaled = dataclasses.replace(spec, scale=spec.scale / (scale * factor))
            plain = AttentionProblem.random(scaled, [(1, 33), (1, 90), (19, 40)])
            plain.q.mul_(factor)
            problem = dataclasses.replace(plain, keys=[k / plain.k_scale * scale for k in plain.keys], k_scale=scale)
            out, lse_out = solve_with(cls, problem, lse=True)
            assert lse_out is not None
            assert_matches(problem, out, lse_out)


def _fp8_specs(
    cls: type[AttentionBackend], dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)
) -> list[AttentionSpec]:
    """Of both types, with queries of those of ``dtypes`` that are supported; SkipTest if there are none."""
    kinds = (torch.float8_e4m3fn, torch.float8_e5m2)
    specs = [make_spec(dtype=dtype, kv_dtype=kind) for dtype in dtypes for kind in kinds]
    specs = [spec for spec in specs if find_device(cls, spec) is not None]
    if not specs:
        raise unittest.SkipTest("no FP8 type is supported")
    return specs


def check_unused_slots_do_not_leak(cls: type[AttentionBackend]) -> None:
    """NaN in every slot that no request owns, block 0 included, changes nothing."""
    assert_backend_matches(cls, make_spec(), [(1, 18), (1, 40), (9, 21)], fill_unused_with_nan=True)
    assert_backend_matches(cls, make_spec(kind="sliding", window=5), [(1, 40), (9, 41)], fill_unused_with_nan=True)


def check_block_table_does_not_matter(cls: type[AttentionBackend]) -> None:
    """The same tokens in other blocks give the same bits."""
    spec = make_spec()
    first, _ = solve_with(cls, AttentionProblem.random(spec, [(1, 40), (9, 21)], table_seed=1))
    second, _ = solve_with(cls, AttentionProblem.random(spec, [(1, 40), (9, 21)], table_seed=2))
    assert torch.equal(first, second), "the result depends on which blocks hold a request"


def check_metadata_serves_every_layer_of_its_step(cls: type[AttentionBackend]) -> None:
    """``prepare_metadata`` once, ``run`` for each layer; then the same for other steps."""
    spec = make_spec()
    device = require_device(cls, spec)
    backend = make_backend(cls, spec, device)
    for seed, requests in enumerate(([(1, 30), (4, 12)], [(8, 24)], [(1, 2), (1, 3)])):
        problems = [AttentionProblem.random(spec, requests, seed=seed * 7 + layer) for layer in range(2)]
        backend.prepare_metadata(problems[0].make_batch(device))
        for layer, problem in enumerate(problems):
            assert_matches(problem, *run_layer(backend, layer, problem, device))


def check_verification(cls: type[AttentionBackend]) -> None:
    """Decodes of several queries each, from the first token of a request on, alone and beside a chunk."""
    for queries in (2, 5, 9):
        assert_backend_matches(
            cls, make_spec(), [(queries, length) for length in (queries, 16, 33, 140)], num_decodes=4, lse=True
        )
    assert_backend_matches(
        cls, make_spec(), [(3, 3), (3, 20), (3, 600), (9, 30)], num_decodes=3, fill_unused_with_nan=True
    )
    assert_backend_matches(
        cls,
        make_spec(kind="sliding", window=7),
        [(4, 50), (4, 6), (4, 90), (4, 4)],
        num_decodes=4,
        fill_unused_with_nan=True,
    )


def check_captured_steps(cls: type[AttentionBackend]) -> None:
    """Steps of each kind in ``graph_support`` with other lengths, in the same tensors: replayed as one CUDA graph on a
    GPU, launched again elsewhere. Each is right. On a CPU they call nothing that a graph cannot hold; where the code
    asks for a device, that says nothing."""
    if not cls.graph_support:
        raise unittest.SkipTest("says that no step may be captured")
    steps: dict[GraphKind, tuple[list[tuple[int, int]], ...]] = {
        "decode": ([(1, 5), (1, 33), (1, 100)], [(1, 200), (1, 1), (1, 16)], [(1, 17), (1, 64), (1, 2)]),
        "verify": ([(3, 5), (3, 33), (3, 100)], [(3, 200), (3, 3), (3, 16)], [(3, 18), (3, 64), (3, 4)]),
        "mixed": ([(1, 40), (1, 3), (9, 30), (6, 6)], [(1, 7), (1, 90), (5, 50), (10, 10)]),
    }
    spec = make_spec()
    if torch.cuda.is_available() and not cls.unsupported(_of_dtype(torch.bfloat16), torch.device("cuda")):
        spec = _of_dtype(torch.bfloat16)
    for kind in sorted(cls.graph_support):
        num_decodes = 2 if kind == "mixed" else len(steps[kind][0])
        problems = [
            AttentionProblem.random(spec, requests, num_decodes=num_decodes, seed=seed, table_seed=seed)
            for seed, requests in enumerate(steps[kind])
        ]
        captured = CapturedAttention(cls, kind, problems)
        for problem in (*problems, problems[0]):
            try:
                assert_matches(problem, captured.solve(problem))
            except AssertionError as error:
                raise AssertionError(f"{kind} steps, captured with other lengths: {error}") from None
        captured.assert_can_be_captured()


def check_batch_invariance(cls: type[AttentionBackend]) -> None:
    """Where it declares itself ``batch_invariant``: a request has the same bits alone, beside others, and in chunks."""
    if not cls.batch_invariant:
        raise unittest.SkipTest("does not declare itself batch invariant")
    for spec in (make_spec(), make_spec(kind="sliding", window=20)):
        together = AttentionProblem.random(spec, [(1, 300), (1, 40), (24, 24), (9, 90)], num_decodes=2)
        expected, _ = solve_with(cls, together)
        start = 0
        for row, (queries, length) in enumerate(together.requests):
            for first, last in ((0, queries), (queries - 1, queries)):
                alone = dataclasses.replace(
                    together,
                    requests=[(last - first, length - queries + last)],
                    num_decodes=int(last - first == 1),
                    q=together.q[start + first : start + last],
                    keys=[together.keys[row][: length - queries + last]],
                    values=[together.values[row][: length - queries + last]],
                    block_table=together.block_table[row : row + 1],
                )
                out, _ = solve_with(cls, alone)
                assert torch.equal(out, expected[start + first : start + last]), (
                    f"request {row} of {together.requests}: its queries {first} to {last} have other bits alone\n{spec}"
                )
            start += queries


def _of_dtype(dtype: torch.dtype) -> AttentionSpec:
    return make_spec(dtype=dtype, kv_dtype=dtype)
