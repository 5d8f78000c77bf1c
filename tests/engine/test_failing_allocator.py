"""A KV allocator that raises costs the request for which it was called, or the prefix cache: never the engine."""

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
PARAMS = SamplingParams(temperature=0.8, seed=3, max_tokens=40, ignore_eos=True)


class Raises(PagedAllocator):
    """Once, in one method, before it changes anything."""

    method, countdown = "", 0

    def _count(self, method: str) -> None:
        if method == Raises.method:
            Raises.countdown -= 1
            if Raises.countdown == 0:
                raise KeyError("a bug of the allocator")

    def match_prefix(self, *args: Any, **options: Any) -> Any:
        self._count("match_prefix")
        return super().match_prefix(*args, **options)

    def allocate(self, *args: Any, **options: Any) -> Any:
        self._count("allocate")
        return super().allocate(*args, **options)

    def cache_full_blocks(self, *args: Any, **options: Any) -> Any:
        self._count("cache_full_blocks")
        return super().cache_full_blocks(*args, **options)

    def num_free_blocks(self) -> int:
        self._count("num_free_blocks")
        return super().num_free_blocks()

    def stats(self) -> Any:
        self._count("stats")
        return super().stats()


@pytest.fixture
def engine(tiny: Path) -> Iterator[LLM]:
    made = LLM(model=str(tiny), device="cpu", max_model_len=256, kv_allocator=f"{__name__}:Raises")
    yield made
    made.shutdown()


@pytest.mark.parametrize("method", ["match_prefix", "cache_full_blocks", "stats"])
def test_what_requests_do_not_need_costs_none(
    engine: LLM, llm: LLM, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, method: str
) -> None:
    monkeypatch.setattr(Raises, "method", method)
    monkeypatch.setattr(Raises, "countdown", 2)
    expected = [output.outputs[0].token_ids for output in llm.generate(PROMPTS, PARAMS)]
    with caplog.at_level(logging.ERROR, "quire.plugin"):
        for _ in range(3):
            assert [output.outputs[0].token_ids for output in engine.generate(PROMPTS, PARAMS)] == expected
            engine.get_stats()
    stats = engine.get_stats()
    assert Raises.countdown <= 0 and stats["kv_cache_usage_perc"] == 0
    assert stats["plugin_quarantines_total"] == (method != "stats")
    assert f"{method} raised KeyError" in caplog.text


@pytest.mark.parametrize("countdown", [1, 2, 5, 6])
@pytest.mark.parametrize("method", ["allocate", "num_free_blocks"])
def test_one_call_that_raises_ends_its_requests_alone(
    engine: LLM, llm: LLM, monkeypatch: pytest.MonkeyPatch, method: str, countdown: int
) -> None:
    expected = [output.outputs[0].token_ids for output in llm.generate(PROMPTS, PARAMS)]
    monkeypatch.setattr(Raises, "method", method)
    monkeypatch.setattr(Raises, "countdown", countdown)
    core, tokens, errors = engine.engine_core, dict[int, list[int]](), []
    for prompt in PROMPTS:
        [request] = engine.input_processor.process_inputs("r", prompt, PARAMS)
        tokens[request.request_id] = []
        core.add_request(request)
    while core.has_work:
        for output in core.step().expand_outputs():
            tokens[output.request_id] += output.new_token_ids
            if output.finish_reason == "error":
                errors.append(output.request_id)
                assert output.error is not None and f"kv/{__name__}:Raises: {method} raised" in output.error
    assert Raises.countdown <= 0
    assert len(errors) == 1 if method == "allocate" else len(PROMPTS) >= len(errors) >= 1
    for request_id, answer in zip(tokens, expected, strict=True):
        assert tokens[request_id] == (answer[: len(tokens[request_id])] if request_id in errors else answer)
    monkeypatch.setattr(Raises, "method", "")
    assert [output.outputs[0].token_ids for output in engine.generate(PROMPTS, PARAMS)] == expected
    core.scheduler.debug_state().allocator.check_integrity()
    assert engine.get_stats()["kv_cache_usage_perc"] == 0


def test_a_caller_learns_why_its_request_ended(engine: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Raises, "method", "allocate")
    monkeypatch.setattr(Raises, "countdown", 1)
    with pytest.raises(RequestFailedError, match="allocate raised KeyError: 'a bug of the allocator'"):
        engine.generate(PROMPTS[:1], PARAMS)
