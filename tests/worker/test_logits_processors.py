"""A logits processor that fails: its requests end, or go on without it where it says so, and others never notice."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from quire import SamplingParams
from quire.core.engine.args import EngineArgs
from quire.core.engine.llm_engine import LLMEngine
from quire.sdk import LogitsBatch, LogitsProcessor, NewRequest

GREEDY = {"temperature": 0, "max_tokens": 6, "ignore_eos": True}
PROMPTS = [[5, 6, 7, 8] * (2 + i) for i in range(3)]


class Misbehaves(LogitsProcessor):
    """Does what a request says in ``logit_bias`` of token 3; of all others it is not told."""

    num_endless = 0

    def add_row(self, request: NewRequest) -> Any:
        mode = (request.params.logit_bias or {}).get(3)
        if mode == 9:
            self.never_return()
        if mode == 1:
            raise RuntimeError("the secret is 4711")
        if mode == 2:
            return None
        self.modes: dict[int, float | None] = {**getattr(self, "modes", {}), request.row: mode}
        return mode is not None

    def remove_row(self, row: int) -> None:
        if self.modes.pop(row) == 5:
            raise RuntimeError("the secret is 4711")

    def apply(self, logits: Tensor, batch: LogitsBatch) -> Any:
        modes = {self.modes.get(row) for row in batch.rows}
        if 4 in modes:
            logits.fill_(0.0)  # also those of others
            batch.rows[:] = [99] * len(batch.rows)
        if 3 in modes:
            logits.fill_(0.0)
            raise RuntimeError("the secret is 4711")
        if 6 in modes:
            return logits + 1.0  # as in vLLM
        if 7 in modes:
            logits.resize_(1, 1)
        if 8 in modes:
            logits.data = logits.clone()
        if 10 in modes:
            self.never_return()
        return None

    def never_return(self) -> None:
        type(self).num_endless += 1
        while True:
            time.sleep(0.01)


class MayBeSkipped(Misbehaves):
    on_failure = "skip"


def start(tiny: Path, processor: type[LogitsProcessor], **limits: float) -> LLMEngine:
    options = {**limits, "max_num_seqs": 6, "num_gpu_blocks_override": 64}
    args = EngineArgs(model=str(tiny), device="cpu", max_model_len=128, logits_processors=[processor], **options)  # type: ignore[list-item]
    return LLMEngine(args)


@pytest.fixture(scope="module")
def engine(tiny: Path) -> Iterator[LLMEngine]:
    engine = start(tiny, Misbehaves)
    yield engine
    engine.shutdown()


def serve(engine: LLMEngine, modes: list[float | None]) -> list[Any]:
    """Requests side by side: the tokens of each, or its error."""
    answers: dict[str, Any] = {}
    for i, mode in enumerate(modes):
        params = SamplingParams(**GREEDY, logit_bias=None if mode is None else {3: mode})
        engine.add_request(str(i), {"prompt_token_ids": PROMPTS[i]}, params, stream="final")
    while engine.has_unfinished_requests():
        processed = engine.process_step()
        answers |= {failed.request_id: failed.error for failed in processed.failed_requests}
        answers |= {output.request_id: output.outputs[0].token_ids for output in processed.request_outputs}
    return [answers[str(i)] for i in range(len(modes))]


@pytest.mark.parametrize(
    "mode",
    [1, 2, 3, 6, 7, 8],
    ids=["add_row raises", "add_row returns None", "apply raises", "apply returns", "other shape", "other memory"],
)
def test_a_constraint_is_never_lifted_in_silence(engine: LLMEngine, mode: float) -> None:
    expected = serve(engine, [None, None, None])
    for _ in range(2):  # it is called again, and fails again
        before, failed, after = serve(engine, [None, mode, None])
        assert [before, after] == [expected[0], expected[2]]
        assert failed == f"logits_processor/{__name__}:Misbehaves failed; the engine's log says why"
    assert serve(engine, [None, 5.0, None])[0] == expected[0], "remove_row raises"
    assert serve(engine, [None, None, None]) == expected
    stats = engine.get_stats()
    assert stats["plugin_quarantines_total"] == 0 and stats["kv_cache_usage_perc"] == 0


def test_what_it_does_to_the_logits_of_others_is_undone(engine: LLMEngine) -> None:
    expected = serve(engine, [None, None, None])
    before, touched, after = serve(engine, [None, 4.0, None])
    assert [before, after] == [expected[0], expected[2]] and touched != expected[1]


@pytest.mark.parametrize("mode", [1, 3])
def test_one_that_may_be_skipped_is_quarantined(tiny: Path, mode: float) -> None:
    engine = start(tiny, MayBeSkipped)
    try:
        expected = serve(engine, [None, None, None])
        answers = serve(engine, [None, mode, None])
        assert [answers[0], answers[2]] == [expected[0], expected[2]]
        assert len(answers[1]) == 6 and engine.get_stats()["plugin_quarantines_total"] == 1
    finally:
        engine.shutdown()


@pytest.mark.parametrize(("mode", "method"), [(9, "add_row"), (10, "apply")])
def test_one_that_hangs_fails_its_requests_alone(
    tiny: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, mode: float, method: str
) -> None:
    monkeypatch.setattr(Misbehaves, "num_endless", 0)
    engine = start(tiny, Misbehaves, step_timeout=1.0)
    try:
        expected = serve(engine, [None, None, None])
        for _ in range(2):
            before, failed, after = serve(engine, [None, mode, None])
            assert [before, after] == [expected[0], expected[2]]
            assert failed == f"logits_processor/{__name__}:Misbehaves failed; the engine's log says why"
        assert f"Misbehaves fails its requests (hung): {method} did not return and was interrupted" in caplog.text
        assert serve(engine, [None, None, None]) == expected
        # All wait for an ``apply`` that hangs, so that there is one; what ``add_row`` does differs by request.
        assert Misbehaves.num_endless == (1 if method == "apply" else 2)
        assert isinstance(serve(engine, [None, 1])[1], str), "add_row raises, which is no other quarantine"
        assert engine.get_stats()["plugin_quarantines_total"] == (1 if method == "apply" else 0)
    finally:
        engine.shutdown()


def test_one_that_hangs_and_may_be_skipped_is_quarantined(tiny: Path) -> None:
    engine = start(tiny, MayBeSkipped, step_timeout=1.0)
    try:
        expected = serve(engine, [None, None, None])
        answers = serve(engine, [None, 10, None])
        assert [answers[0], answers[2]] == [expected[0], expected[2]] and len(answers[1]) == 6
        assert engine.get_stats()["plugin_quarantines_total"] == 1
    finally:
        engine.shutdown()
