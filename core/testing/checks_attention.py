"""Conformance of attention backends: every shape, length, window and block table against float64.

A check skips what the backend says, by ``unsupported``, that it does not do. Checks run on the GPU where there is one
and the backend takes it, else on the CPU.
"""

from __future__ import annotations

import dataclasses
import unittest
from typing import Any

import torch

from quire.core.contracts.attention import AttentionBackend, AttentionSpec
from quire.core.testing.attention_problem import (
    Problem,
    assert_close,
    attend,
    compare,
    device_for,
    expected_attention,
    make_spec,
    needed_device,
    prepared,
    run_problem,
)

__all__ = [
    "check_block_sizes",
    "check_block_table_does_not_matter",
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
    "check_mixed_steps",
    "check_one_plan_serves_every_layer_and_the_next_replaces_it",
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
    compare(cls, make_spec(), [(1, 1), (1, 15), (1, 16), (1, 17), (1, 50)])


def check_prefill(cls: type[AttentionBackend]) -> None:
    """Whole prompts, the shortest of one token."""
    compare(cls, make_spec(), [(1, 1), (16, 16), (37, 37)], num_decodes=0)


def check_chunks(cls: type[AttentionBackend]) -> None:
    """Chunks that continue a prompt, on and off page boundaries."""
    compare(cls, make_spec(), [(3, 20), (16, 48), (2, 33)], num_decodes=0)


def check_mixed_steps(cls: type[AttentionBackend]) -> None:
    """Decodes, one-token chunks, chunks and whole prompts in one step."""
    compare(cls, make_spec(), [(1, 33), (1, 5), (1, 20), (7, 30), (19, 19)], num_decodes=2)


def check_group_sizes(cls: type[AttentionBackend]) -> None:
    """Query heads per KV head: one, some, a number that is no power of two, all."""
    for heads, kv_heads in ((2, 2), (8, 2), (7, 1), (6, 2)):
        compare(cls, make_spec(num_heads=heads, num_kv_heads=kv_heads), [(1, 21), (9, 30)])


def check_head_dims(cls: type[AttentionBackend]) -> None:
    """Heads of 64, 96, 128 and 256 features."""
    for dim in (64, 96, 128, 256):
        compare(cls, make_spec(qk_head_dim=dim, v_head_dim=dim, num_heads=2, num_kv_heads=1), [(1, 20), (5, 18)])


def check_block_sizes(cls: type[AttentionBackend]) -> None:
    """Pages of other sizes."""
    for size in (1, 8, 32):
        compare(cls, make_spec(block_size=size), [(1, 21), (6, 35)])


def check_sliding_window(cls: type[AttentionBackend]) -> None:
    """Windows shorter than a page, longer than the context, and of one token."""
    for window in (1, 7, 20, 1000):
        spec = make_spec(kind="sliding", window=window)
        compare(cls, spec, [(1, 50), (1, 6), (24, 60), (30, 30)])


def check_softcap(cls: type[AttentionBackend]) -> None:
    """Scores bent by ``softcap * tanh(score / softcap)``."""
    compare(cls, make_spec(softcap=2.0, scale=1.0), [(1, 40), (20, 33)])


def check_log_sum_exp(cls: type[AttentionBackend]) -> None:
    """``lse_out`` is the natural logarithm of the sum of the exponentials of the scaled scores."""
    compare(cls, make_spec(), [(1, 40), (20, 33)], lse=True)
    compare(cls, make_spec(softcap=3.0), [(1, 18), (4, 9)], lse=True)


def check_long_decodes(cls: type[AttentionBackend]) -> None:
    """Lengths that a backend may split over several programs."""
    compare(cls, make_spec(), [(1, 255), (1, 700), (1, 3)], lse=True)
    compare(cls, make_spec(kind="sliding", window=300), [(1, 700)])


def check_long_chunks(cls: type[AttentionBackend]) -> None:
    """Chunks that a backend may cut into several tiles."""
    compare(cls, make_spec(num_heads=2, num_kv_heads=1), [(270, 290)], lse=True)
    compare(cls, make_spec(num_heads=2, num_kv_heads=1, kind="sliding", window=40), [(270, 290)])


def check_half_precision(cls: type[AttentionBackend]) -> None:
    """The same in float16 and bfloat16."""
    done = 0
    for dtype in (torch.float16, torch.bfloat16):
        spec = make_spec(dtype=dtype, kv_dtype=dtype)
        if device_for(cls, spec) is not None:
            compare(cls, spec, [(1, 33), (1, 7), (19, 40)])
            done += 1
    if not done:
        raise unittest.SkipTest("no 16-bit type is supported")


def check_fp8_cache(cls: type[AttentionBackend]) -> None:
    """Keys and values of one byte each, with a scale for the layer's keys and one for its values."""
    for spec in _fp8_specs(cls):
        compare(cls, spec, [(1, 33), (1, 300), (19, 40)], poison=True, lse=True)
        compare(cls, spec, [(3, 33), (3, 3)], num_decodes=2)


def check_fp8_cache_of_other_shapes(cls: type[AttentionBackend]) -> None:
    """The same with other heads, groups and pages, with windows and with soft-caps."""
    for spec in _fp8_specs(cls)[-2:]:
        types = {"dtype": spec.dtype, "kv_dtype": spec.kv_dtype}
        for dim in (96, 128, 256):
            of_dim = make_spec(qk_head_dim=dim, v_head_dim=dim, num_heads=2, num_kv_heads=1, **types)
            compare(cls, of_dim, [(1, 20), (5, 18)], poison=True)
        group = make_spec(num_heads=7, num_kv_heads=1, block_size=8, **types)
        compare(cls, group, [(1, 21), (6, 35)], poison=True)
        sliding = make_spec(kind="sliding", window=20, **types)
        compare(cls, sliding, [(1, 50), (1, 6), (24, 60)], poison=True)
        compare(cls, sliding, [(4, 50), (4, 6)], num_decodes=2, poison=True)
        compare(cls, make_spec(softcap=2.0, scale=1.0, **types), [(1, 40), (20, 33)], lse=True)


def check_fp8_cache_with_large_queries(cls: type[AttentionBackend]) -> None:
    """Queries of thousands, and features of ten thousand beside such of one, lose nothing beside an FP8 cache."""
    for spec in _fp8_specs(cls, (torch.bfloat16, torch.float16)):
        for feature, factor in ((slice(None), 2000.0), (3, 10_000.0)):
            problem = Problem.random(spec, [(1, 33), (1, 90), (19, 40)])
            problem.q[..., feature] *= factor
            assert_close(attend(cls, spec, problem)[0], expected_attention(spec, problem)[0], spec.dtype)


def check_fp8_cache_with_any_scale(cls: type[AttentionBackend]) -> None:
    """Keys with a scale of 1e-4, 1 or 1e4 lose nothing, beside prompts as beside decodes."""
    for spec in _fp8_specs(cls):
        for scale in (1e-4, 1.0, 1e4):
            factor = scale**0.3  # of queries, so that neither they nor their products with keys are of any one size
            scaled = dataclasses.replace(spec, scale=spec.scale / (scale * factor))
            plain = Problem.random(scaled, [(1, 33), (1, 90), (19, 40)])
            plain.q.mul_(factor)
            problem = dataclasses.replace(plain, keys=[k / plain.k_scale * scale for k in plain.keys], k_scale=scale)
            out, sums = attend(cls, scaled, problem, lse=True)
            expected, expected_sums = expected_attention(scaled, problem)
            assert_close(out, expected, spec.dtype)
            assert sums is not None
            assert_close(sums, expected_sums, spec.dtype)


def _fp8_specs(
    cls: type[AttentionBackend], dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)
) -> list[AttentionSpec]:
    """Of both types, with queries of those of ``dtypes`` that are supported; SkipTest if there are none."""
    kinds = (torch.float8_e4m3fn, torch.float8_e5m2)
    specs = [make_spec(dtype=dtype, kv_dtype=kind) for dtype in dtypes for kind in kinds]
    specs = [spec for spec in specs if device_for(cls, spec) is not None]
    if not specs:
        raise unittest.SkipTest("no FP8 type is supported")
    return specs


def check_unused_slots_do_not_leak(cls: type[AttentionBackend]) -> None:
    """NaN in every slot that no request owns, block 0 included, changes nothing."""
    compare(cls, make_spec(), [(1, 18), (1, 40), (9, 21)], poison=True)
    compare(cls, make_spec(kind="sliding", window=5), [(1, 40), (9, 41)], poison=True)


def check_block_table_does_not_matter(cls: type[AttentionBackend]) -> None:
    """The same tokens in other blocks give the same bits."""
    spec = make_spec()
    first = attend(cls, spec, Problem.random(spec, [(1, 40), (9, 21)], table_seed=1))
    second = attend(cls, spec, Problem.random(spec, [(1, 40), (9, 21)], table_seed=2))
    assert torch.equal(first[0], second[0]), "the result depends on which blocks hold a request"


def check_one_plan_serves_every_layer_and_the_next_replaces_it(cls: type[AttentionBackend]) -> None:
    """``plan`` once, ``run`` for each layer; then another step."""
    spec = make_spec()
    device = needed_device(cls, spec)
    backend = prepared(cls, spec, device)
    for seed, requests in enumerate(([(1, 30), (4, 12)], [(8, 24)], [(1, 2), (1, 3)])):
        problems = [Problem.random(spec, requests, seed=seed * 7 + layer) for layer in range(2)]
        backend.prepare_metadata(problems[0].batch(device))
        for layer, problem in enumerate(problems):
            assert_close(
                run_problem(backend, layer, problem, device)[0], expected_attention(spec, problem)[0], spec.dtype
            )


def check_verification(cls: type[AttentionBackend]) -> None:
    """Decodes of several queries each, from the first token of a request on, alone and beside a chunk."""
    for queries in (2, 5, 9):
        compare(cls, make_spec(), [(queries, length) for length in (queries, 16, 33, 140)], num_decodes=4, lse=True)
    compare(cls, make_spec(), [(3, 3), (3, 20), (3, 600), (9, 30)], num_decodes=3, poison=True)
    compare(cls, make_spec(kind="sliding", window=7), [(4, 50), (4, 6), (4, 90), (4, 4)], num_decodes=4, poison=True)
