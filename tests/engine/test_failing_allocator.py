"""A KV allocator that raises is replaced: no request is lost, and no block."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from quire import LLM, SamplingParams
from quire.core.errors import RequestFailedError
from quire.plugins.kv.paged import PagedAllocator

PROMPTS = [[5 + i, 6, 7, 8] * (4 + 5 * i) for i in range(4)]
PARAMS = [
    SamplingParams(temperature=0.8 * (i % 2), seed=i, n=1 + i % 3, max_tokens=40, ignore_eos=True) for i in range(4)
]
METHODS = ("match_prefix", "allocate", "cache_full_blocks", "fork_blocks", "free", "num_free_blocks", "stats")


class Raises(PagedAllocator):
    """In one method from some call on, after it has done half of its work: what it says of its blocks is wrong then."""

    method, countdown = "", 0

    def _count(self, method: str) -> None:
        if method == Raises.method:
            Raises.countdown -= 1
            if Raises.countdown <= 0:
                raise KeyError("a bug of the allocator")


def _raise_within(name: str) -> Any:
    def method(self: Raises, *args: Any, **options: Any) -> Any:
        result = getattr(PagedAllocator, name)(self, *args, **options)
        self._count(name)
        return result

    return method


for each in METHODS:
    setattr(Raises, each, _raise_within(each))


@pytest.fixture(params=[None, "ngram"], ids=["plain", "drafts"])
def engine(tiny: Path, request: pytest.FixtureRequest) -> Iterator[LLM]:
    made = LLM(
        model=str(tiny),
        device="cpu",
        max_model_len=256,
        block_size=4,
        num_gpu_blocks_override=110,
        max_num_seqs=8,
        max_num_batched_tokens=48,
        kv_allocator=f"{__name__}:Raises",
        spec_method=request.param,
    )
    yield made
    made.shutdown()


def answers(llm: LLM) -> list[list[list[int]]]:
    return [[choice.token_ids for choice in output.outputs] for output in llm.generate(PROMPTS, PARAMS)]


@pytest.fixture(scope="module")
def expected(llm: LLM) -> list[list[list[int]]]:
    """The answers over an allocator without faults."""
    return answers(llm)


@pytest.mark.parametrize("countdown", [1, 7])
@pytest.mark.parametrize("method", METHODS)
def test_no_request_and_no_block_is_lost(
    engine: LLM, expected: list[list[list[int]]], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
    method: str, countdown: int,
) -> None:  # fmt: skip
    monkeypatch.setattr(Raises, "method", method)
    monkeypatch.setattr(Raises, "countdown", min(countdown, 2) if method in ("fork_blocks", "stats") else countdown)
    with caplog.at_level(logging.ERROR, "quire.plugin"):
        for _ in range(2):
            assert answers(engine) == expected
            engine.get_stats()
    assert f"kv/{__name__}:Raises is quarantined (raised): {method} raised KeyError" in caplog.text
    assert answers(engine) == expected
    allocator = engine.engine_core.scheduler.debug_state().allocator
    allocator.check_integrity()
    assert type(allocator.allocator) is PagedAllocator and allocator.num_free_blocks() == 109
    stats = engine.get_stats()
    assert stats["kv_cache_usage_perc"] == 0 and stats["plugin_quarantines_total"] == 1
    assert stats["prefix_cache_hits_total"] > 0, "the replacement caches prefixes"


def test_counters_go_on_where_those_of_the_replaced_allocator_ended(
    engine: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers(engine)
    before = engine.get_stats()
    monkeypatch.setattr(Raises, "method", "free")
    answers(engine)
    after = engine.get_stats()
    for name in ("prefix_cache_queries_total", "prefix_cache_hits_total"):
        assert after[name] >= before[name] > 0


def test_a_request_on_which_the_replacement_fails_too_ends_alone(
    engine: LLM, llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = answers(llm)
    allocate = PagedAllocator.allocate

    def fail(self: PagedAllocator, request: Any, *args: Any, **options: Any) -> Any:
        if request.token_ids[0] == 250:
            raise KeyError("a bug of both")
        return allocate(self, request, *args, **options)

    monkeypatch.setattr(PagedAllocator, "allocate", fail)
    core, tokens, errors = engine.engine_core, dict[int, list[int]](), {}
    one_each = [SamplingParams(**{**_fields(params), "n": 1}) for params in PARAMS]
    for prompt, params in zip([*PROMPTS, [250] * 9], [*one_each, one_each[0]], strict=True):
        [request] = engine.input_processor.process_inputs("r", prompt, params)
        tokens[request.request_id] = []
        core.add_request(request)
    while core.has_work:
        for output in core.step().expand_outputs():
            tokens[output.request_id] += output.new_token_ids
            if output.finish_reason == "error":
                errors[output.request_id] = output.error
    [(failed, reason)] = errors.items()
    assert failed == list(tokens)[-1] and reason.endswith("failed; the engine's log says why") and "bug" not in reason
    assert [tokens[number] for number in list(tokens)[:-1]] == [each[0] for each in expected]
    with pytest.raises(RequestFailedError, match=r"kv/.*PagedAllocator failed; the engine"):
        engine.generate([[250] * 9], one_each[0])
    core.scheduler.debug_state().allocator.check_integrity()
    assert core.scheduler.debug_state().allocator.num_free_blocks() == 109


def _fields(params: SamplingParams) -> dict[str, Any]:
    return {name: getattr(params, name) for name in ("temperature", "seed", "max_tokens", "ignore_eos")}
