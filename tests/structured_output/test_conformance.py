"""The bundled backends keep their contract."""

from __future__ import annotations

import json
import logging
import random

import jsonschema
import numpy as np
import pytest
from tests.structured_output.conftest import EOS, TINY
from tests.structured_output.instances import mutate_instances
from tests.structured_output.schemas import make_corpus
from tokenizers import Tokenizer

from quire import StructuredOutputsParams
from quire.core.engine.args import EngineArgs
from quire.core.engine.config_builder import build_config
from quire.core.errors import ConfigError
from quire.plugins.structured_output.guidance import GuidanceBackend
from quire.sdk import CompiledGrammar, GrammarState, InvalidRequestError, StructuredOutputBackend, TokenizerInfo
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


class Digits(StructuredOutputBackend):
    """Numbers of any length, and nothing else."""

    def __init__(self, tokenizer, options=None):
        super().__init__(tokenizer, options)
        read = Tokenizer.from_str(tokenizer.tokenizer_json)
        texts = read.decode_batch([[token] for token in range(read.get_vocab_size())])
        self.digits = {token for token, text in enumerate(texts) if text.isascii() and text.isdigit()}

    @classmethod
    def validate_params(cls, params):
        if params.regex != "[0-9]+":
            raise InvalidRequestError("only the expression [0-9]+ is supported")

    @classmethod
    def example(cls):
        return StructuredOutputsParams(regex="[0-9]+"), "1234567890"

    def compile(self, params):
        return Number(self.digits, {*self.tokenizer.eos_token_ids})


class Number(CompiledGrammar):
    def __init__(self, digits, eos):
        self.digits, self.eos = digits, eos

    def start(self):
        return Counting(self)


class Counting(GrammarState):
    def __init__(self, number):
        self.number, self.tokens = number, []

    def list_allowed(self):
        if self.tokens and self.tokens[-1] in self.number.eos:
            return set()
        return self.number.digits | (self.number.eos if self.tokens else set())

    def fill_mask(self, mask):
        mask.fill(0)
        for token in self.list_allowed():
            mask.view(np.uint32)[token // 32] |= np.uint32(1 << token % 32)

    def advance(self, token_ids):
        for count, token in enumerate(token_ids):
            if token not in self.list_allowed():
                return count
            self.tokens.append(token)
        return len(token_ids)

    def rollback(self, num_tokens):
        del self.tokens[len(self.tokens) - num_tokens :]


class Forgetful(Digits):
    """Rolls back one token too few."""

    def compile(self, params):
        return ForgetfulNumber(self.digits, {*self.tokenizer.eos_token_ids})


class ForgetfulNumber(Number):
    def start(self):
        return Remembering(self)


class Remembering(Counting):
    def rollback(self, num_tokens):
        super().rollback(num_tokens - 1)


class Short(Digits):
    """Names an answer that checks nothing."""

    @classmethod
    def example(cls):
        return StructuredOutputsParams(regex="[0-9]+"), "7"


def test_a_backend_that_takes_no_sample_is_checked_by_its_own_example() -> None:
    outcomes = {result.name: result.outcome for result in run_checks(Digits)}
    skipped = {name for name, outcome in outcomes.items() if outcome != "passed"}
    assert skipped == {"check_options_are_valid", "check_forced_tokens_may_come"}
    failed = {result.name for result in run_checks(Forgetful) if result.outcome == "failed"}
    assert {"check_mask_and_advance_agree", "check_rollback_restores_the_mask", "check_masks_for_drafts"} <= failed
    short = {result.reason for result in run_checks(Short) if result.outcome == "failed"}
    assert any("the answer of example() has 1 tokens; at least 5" in reason for reason in short)


@pytest.mark.parametrize(
    ("name", "expected", "options"),
    [
        ("auto", "llguidance", set()),
        ("guidance", "llguidance", set()),
        ("outlines:no-fallback", "llguidance", set()),
        ("lm-format-enforcer:no-additional-properties", "llguidance", {"disable_additional_properties"}),
        (
            "guidance:disable-any-whitespace,no-additional-properties",
            "llguidance",
            {"disable_any_whitespace", "disable_additional_properties"},
        ),
        ("auto:disable-any-whitespace", "llguidance", {"disable_any_whitespace"}),
        ("none", "none", set()),
    ],
)
def test_the_names_of_vllm_are_taken(name, expected, options, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        config = build_config(EngineArgs(model="quire-tiny", device="cpu", structured_output_backend=name)).config
    choice = config.plugin("structured_output")
    assert choice.name == expected
    assert {key for key, value in choice.options.items() if value is True} == options
    if name.partition(":")[0] not in ("auto", "none"):
        assert f"backend {name}: llguidance takes its place" in caplog.text


def test_other_options_behind_the_name_of_a_backend_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="'disable-whitespace' is no option of a backend; did you mean disable-any"):
        build_config(EngineArgs(model="quire-tiny", structured_output_backend="guidance:disable-whitespace"))


def test_a_backend_can_leave_out_blanks_and_further_properties_in_all_answers(tokenizer, accepts) -> None:
    info = TokenizerInfo((TINY / "tokenizer.json").read_text(), 4096, (EOS,))
    options = GuidanceBackend.Options(disable_any_whitespace=True, disable_additional_properties=True)
    backend, plain = GuidanceBackend(info, options), GuidanceBackend(info)
    params = StructuredOutputsParams(json={"type": "object", "properties": {"a": {"type": "boolean"}}})
    pattern = StructuredOutputsParams(json={"type": "object"}, whitespace_pattern=" {0,3}")
    for text, expected in (('{"a": true}', True), ('{"a":true}', False), ('{"b": 1}', False)):
        assert accepts(backend.compile(params), text) == expected
        assert accepts(plain.compile(params), text)
    assert accepts(backend.compile(pattern), '{   "a":1}')
