"""The bundled backends keep their contract."""

from __future__ import annotations

import json
import logging
import random

import jsonschema
import pytest
from tests.structured_output.conftest import EOS, TINY
from tests.structured_output.instances import mutate_instances
from tests.structured_output.schemas import make_corpus

from quire import StructuredOutputsParams
from quire.core.engine.args import EngineArgs
from quire.core.engine.config_builder import build_config
from quire.plugins.structured_output.guidance import GuidanceBackend
from quire.sdk import InvalidRequestError, TokenizerInfo
from quire.testing import parametrize_with_checks, run_checks


@parametrize_with_checks(GuidanceBackend)
def test_llguidance(check):
    check()


def test_xgrammar_keeps_the_contract_for_what_it_takes(accepts) -> None:
    """Of the corpus it takes the plain schemas, and those exactly."""
    pytest.importorskip("xgrammar")
    from quire.plugins.structured_output.xgrammar import XGrammarBackend

    failed = [(result.name, result.reason) for result in run_checks(XGrammarBackend) if result.outcome == "failed"]
    assert not failed
    backend = XGrammarBackend(TokenizerInfo((TINY / "tokenizer.json").read_text(), 4096, (EOS,)))
    rng, num_compiled = random.Random(2), 0
    for case in make_corpus():
        params = StructuredOutputsParams(json=json.dumps(case.schema))
        try:
            backend.validate_params(params)
            grammar = backend.compile(params)
        except InvalidRequestError:
            continue
        num_compiled += 1
        judge = jsonschema.Draft202012Validator(case.schema)
        for instance in [*case.candidates, *mutate_instances(rng, case.candidates)]:
            is_valid = judge.is_valid(instance)
            if not is_valid or instance in case.candidates:
                text = json.dumps(instance, ensure_ascii=False)
                assert accepts(grammar, text) == is_valid, f"{text} is {'valid' if is_valid else 'not'}: {case.schema}"
    assert num_compiled > 100


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("auto", "llguidance"),
        ("guidance", "llguidance"),
        ("outlines", "llguidance"),
        ("lm-format-enforcer", "llguidance"),
        ("guidance:disable-any-whitespace", "llguidance"),
        ("none", "none"),
    ],
)
def test_the_names_of_vllm_are_taken(name: str, expected: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        config = build_config(EngineArgs(model="quire-tiny", device="cpu", structured_output_backend=name)).config
    assert config.plugin("structured_output").name == expected
    if name not in ("auto", "none"):
        assert f"backend {name}: llguidance takes its place" in caplog.text
