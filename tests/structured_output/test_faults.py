"""A grammar that misbehaves ends its own request, and no other."""

from __future__ import annotations

import pytest

from quire import LLM, SamplingParams, StructuredOutputsParams
from quire.core.contracts.structured_output import TokenizerInfo
from quire.core.engine.engine_core import EngineCore
from quire.core.engine.input_processor import InputProcessor
from quire.core.engine.output_processor import ExporterGroup, OutputProcessor
from quire.core.structured_output import manager
from quire.core.structured_output.mask_filler import MaskFiller
from quire.core.testing.grammars import FaultyBackend

BACKEND = "quire.core.testing.grammars:FaultyBackend"
MODEL = "quire-tiny-draft"
PLAIN = SamplingParams(temperature=0.8, seed=3, max_tokens=24, ignore_eos=True)


Ends = dict[str, tuple[str | None, list[int]]]
"""How requests ended: the error or None, and the tokens."""


def make_params(choice: str) -> SamplingParams:
    constraint = StructuredOutputsParams(choice=[choice])
    return SamplingParams(temperature=0.8, seed=4, max_tokens=24, structured_outputs=constraint)


@pytest.fixture(scope="module", params=[None, "ngram"])
def llm(request):
    settings = {} if request.param is None else {"spec_method": request.param}
    llm = LLM(MODEL, device="cpu", max_model_len=128, structured_output_backend=BACKEND, **settings)
    yield llm
    llm.shutdown()


@pytest.fixture(scope="module")
def expected(llm: LLM) -> Ends:
    ends = run_together(llm, [PLAIN, make_params("ok")])
    assert ends["0"][0] is ends["1"][0] is None
    assert all(104 <= token < 200 for token in ends["1"][1])
    return ends


def run_together(llm: LLM, params: list[SamplingParams]) -> Ends:
    """How requests end that arrive together: the error or None, and the tokens."""
    core: EngineCore = llm.engine_core
    inputs: InputProcessor = llm.input_processor
    outputs = OutputProcessor(llm.tokenizer, ExporterGroup())
    for i, each in enumerate(params):
        requests = inputs.process_inputs(str(i), "Some prompt", each)
        outputs.add_request(str(i), None, requests, "final")
        for request in requests:
            core.add_request(request)
    ends: Ends = {}
    while len(ends) < len(params):
        processed = outputs.process_outputs(core.step())
        core.abort_requests(processed.requests_to_abort)
        for failed in processed.failed_requests:
            ends[failed.request_id] = (failed.error, [])
        for output in processed.request_outputs:
            ends[output.request_id] = (None, output.outputs[0].token_ids)
    return ends


@pytest.mark.parametrize(
    "fault",
    [
        "raise in compile",
        "cancel in compile",
        "raise in start",
        "raise in fill",
        "cancel in fill",
        "raise in advance",
        "empty mask",
        "refuse what it allowed",
    ],
)
def test_a_fault_ends_its_request_alone(llm: LLM, expected: Ends, fault: str) -> None:
    ends = run_together(llm, [PLAIN, make_params("ok"), make_params(fault)])
    assert (ends["0"], ends["1"]) == (expected["0"], expected["1"])
    assert ends["2"][0] is not None
    assert run_together(llm, [make_params("ok")])["0"][0] is None, "the engine does not go on"


def test_a_backend_that_fails_between_two_steps_is_not_told_of_others(llm, expected, monkeypatch) -> None:
    calls: list[int] = []
    monkeypatch.setattr(FaultyBackend, "begin_catch_up", lambda self: calls.append(1 // len(calls)))
    for _ in range(2):
        ends = run_together(llm, [PLAIN, make_params("ok")])
        assert (ends["0"], ends["1"]) == (expected["0"], expected["1"])
        assert not calls


class Panic(BaseException):
    """As of a Rust library: no ``Exception``."""


@pytest.mark.parametrize("error", [ValueError, SystemExit, Panic])
def test_whatever_a_backend_raises_between_two_steps_is_named(
    error: type[BaseException], caplog: pytest.LogCaptureFixture
) -> None:
    class Panics(FaultyBackend):
        def begin_catch_up(self) -> None:
            calls.append(1)
            raise error

    calls: list[int] = []
    filler = MaskFiller(Panics(TokenizerInfo("{}", 200, ())), 1.0)
    filler.begin_catch_up()
    filler.begin_catch_up()
    assert calls == [1] and "Panics: begin_catch_up failed" in caplog.text and error.__name__ in caplog.text


def test_a_mask_that_never_comes_ends_its_request_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manager, "_MASK_TIME_LIMIT_S", 1.0)
    engine = LLM(MODEL, device="cpu", max_model_len=128, structured_output_backend=BACKEND)
    expected = run_together(engine, [PLAIN, make_params("ok"), make_params("ok")])
    ends = run_together(engine, [PLAIN, make_params("ok"), make_params("hang in fill"), make_params("ok")])
    assert ends["0"] == expected["0"]
    assert ends["1"] == ends["3"] == expected["1"]
    assert "did not return" in str(ends["2"][0])
    engine.shutdown()


def test_a_compilation_that_never_ends_is_refused_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manager, "_COMPILE_TIME_LIMIT_S", 1.0)
    engine = LLM(MODEL, device="cpu", max_model_len=128, structured_output_backend=BACKEND)
    ends = run_together(engine, [make_params("hang in compile"), PLAIN, make_params("ok")])
    assert "longer than 1 s" in str(ends["0"][0])
    assert ends["1"][0] is ends["2"][0] is None
    for i in range(7):
        fault = StructuredOutputsParams(choice=["hang in compile"], reasoning_end=str(i))  # another key each time
        params = SamplingParams(max_tokens=4, structured_outputs=fault)
        assert run_together(engine, [params])["0"][0] is not None
    engine.shutdown()
