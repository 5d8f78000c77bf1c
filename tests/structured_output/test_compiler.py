"""Compilations leave the interpreter to a busy engine, and what they make is kept for others."""

from __future__ import annotations

import json
import time
from concurrent.futures import wait

import pytest

from quire import StructuredOutputsParams
from quire.core.structured_output import compiler
from quire.core.structured_output.compiler import EngineWait, GrammarCompiler
from quire.sdk import CompiledGrammar, GrammarState, StructuredOutputBackend, TokenizerInfo


class Grammar(CompiledGrammar):
    def start(self) -> GrammarState:
        raise NotImplementedError


class YieldingBackend(StructuredOutputBackend):
    def compile(self, params: StructuredOutputsParams) -> CompiledGrammar:
        for _ in range(3):
            self.yield_to_engine()
        return Grammar()


@pytest.fixture
def grammars(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(compiler, "_MAX_YIELD_S", 60.0)
    monkeypatch.setattr(compiler, "_MAX_YIELDS_S", 60.0)
    grammars = GrammarCompiler(lambda: YieldingBackend(TokenizerInfo("{}", 32, (0,))), time_limit_s=60)
    grammars.get_backend()
    yield grammars
    grammars.engine_wait.begin()
    grammars.shutdown()


def test_a_compilation_goes_on_while_the_engine_waits(grammars: GrammarCompiler) -> None:
    grammars.submit(StructuredOutputsParams(choice=["before the first step"])).result(timeout=30)
    with grammars.engine_wait:
        pass
    future = grammars.submit(StructuredOutputsParams(choice=["while it schedules"]))
    assert not wait([future], timeout=0.2).done
    with grammars.engine_wait:
        future.result(timeout=30)


def test_the_engine_waits_for_what_it_compiles_in_its_own_time(grammars: GrammarCompiler) -> None:
    with grammars.engine_wait:
        pass
    grammars.compile_and_wait(StructuredOutputsParams(choice=["a"]))


def test_a_busy_engine_does_not_stop_compilations() -> None:
    """However many pieces they have."""
    engine_wait = EngineWait()
    with engine_wait:
        pass
    engine_wait.begin_compilation()
    start = time.monotonic()
    for _ in range(1_000):
        engine_wait.yield_to_engine()
    assert 0.1 <= time.monotonic() - start < 5


def test_masks_that_are_found_ahead_are_found_in_pieces(backend, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    monkeypatch.setattr(backend, "yield_to_engine", lambda: calls.append(0))
    properties = {name: {"type": "string", "minLength": 20} for name in ("first", "second")}
    schema = {"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False}
    backend.compile(StructuredOutputsParams(json=json.dumps(schema)))
    assert len(calls) > 20


def test_what_was_used_last_is_kept_while_it_fits(grammars: GrammarCompiler, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Grammar, "num_bytes", 4 << 20)  # 64 of them fit
    constraints = [StructuredOutputsParams(choice=[str(number)]) for number in range(200)]
    for constraint in constraints:
        grammars.submit(constraint).result(timeout=30)
    assert grammars.stats.num_cache_hits == 0
    for constraint in constraints[-64:]:
        grammars.submit(constraint)
    assert grammars.stats.num_cache_hits == 64
    for constraint in constraints[: 200 - 64 - 64 // 8]:
        grammars.submit(constraint)
    assert grammars.stats.num_cache_hits == 64
