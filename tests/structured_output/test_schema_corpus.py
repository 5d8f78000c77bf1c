"""What the bundled backend makes of JSON Schema: exact, or refused with a name. ``jsonschema`` is the judge."""

from __future__ import annotations

import json
import random
from collections import Counter

import jsonschema
import pytest
from tests.structured_output.instances import mutate_instances
from tests.structured_output.keyword_schemas import BY_KEYWORD
from tests.structured_output.schemas import Case, make_corpus

from quire.sdk import CompiledGrammar, InvalidRequestError

MIN_SHARE_COMPILED = 0.79
"""That of llguidance on MaskBench: 8,909 of 11,306."""


@pytest.fixture(scope="module")
def corpus() -> list[Case]:
    return make_corpus()


@pytest.fixture(scope="module")
def grammars(corpus, compile_params) -> list[CompiledGrammar | InvalidRequestError]:
    results: list[CompiledGrammar | InvalidRequestError] = []
    for case in corpus:
        try:
            results.append(compile_params(json=json.dumps(case.schema)))
        except InvalidRequestError as error:
            results.append(error)
    return results


def test_no_invalid_instance_is_accepted_and_every_valid_one_is(corpus, grammars, accepts) -> None:
    rng, num_valid, num_invalid = random.Random(1), 0, 0
    for case, grammar in zip(corpus, grammars, strict=True):
        if isinstance(grammar, InvalidRequestError):
            continue
        checker = jsonschema.Draft202012Validator.FORMAT_CHECKER
        judge = jsonschema.Draft202012Validator(case.schema, format_checker=checker)
        for instance in case.candidates:  # in the order of the properties
            text = json.dumps(instance, ensure_ascii=False)
            is_valid = judge.is_valid(instance)
            num_valid += is_valid
            assert accepts(grammar, text) == is_valid, f"{text} is {'valid' if is_valid else 'not'}: {case.schema}"
        for instance in mutate_instances(rng, case.candidates):
            if not judge.is_valid(instance):
                num_invalid += 1
                text = json.dumps(instance, ensure_ascii=False)
                assert not accepts(grammar, text), f"{text} does not match {case.schema}"
    assert num_valid > 2000
    assert num_invalid > 10_000


def test_enough_schemas_compile_and_the_others_are_refused_by_name(corpus, grammars) -> None:
    assert len(corpus) >= 500
    refused = [
        (case, grammar) for case, grammar in zip(corpus, grammars, strict=True) if isinstance(grammar, Exception)
    ]
    share = 1 - len(refused) / len(corpus)
    assert share >= MIN_SHARE_COMPILED
    words = [*BY_KEYWORD, "minProperties", "maxProperties"]
    for _, error in refused:
        assert "\n" not in str(error)
        assert any(f"'{word}'" in str(error) for word in words) or "no answer can match" in str(error), error
    by_keyword = Counter(case.keyword for case, _ in refused)
    assert by_keyword["combined"] < 0.1 * 500, by_keyword


@pytest.mark.parametrize(
    ("schema", "keyword"),
    [
        ({"type": "integer", "multipleOf": 0}, "multipleOf"),
        ({"type": "objec"}, "type"),
        ({"type": ["string", "nul"]}, "type"),
        ({"type": ["string", 3]}, "type"),
        ({"enum": []}, "enum"),
        ({"type": []}, "type"),
    ],
)
def test_a_value_that_its_keyword_excludes_is_refused_with_its_name(schema, keyword, compile_params) -> None:
    with pytest.raises(InvalidRequestError, match=f"'{keyword}'"):
        compile_params(json=schema)


@pytest.mark.parametrize("pretty", [None, 2, 8])
def test_any_usual_layout_of_json_is_accepted(pretty, compile_params, accepts) -> None:
    instance = {"a": [1, 2, {"b": None}], "c": "x"}
    grammar = compile_params(json={"type": "object"})
    assert accepts(grammar, json.dumps(instance, indent=pretty))
    assert accepts(grammar, json.dumps(instance, separators=(",", ":")))


@pytest.mark.parametrize("constraint", [{"json": {"type": "object"}}, {"json_object": True}])
def test_white_space_cannot_fill_an_answer(constraint, compile_params, accepts) -> None:
    grammar = compile_params(**constraint)
    assert accepts(grammar, '{"a": 1\n}')
    assert not accepts(grammar, '{"a": 1\n\n\n}')
    assert not accepts(grammar, '{"a": 1' + " " * 60 + "}")
    strict = compile_params(**constraint, disable_any_whitespace=True)
    assert accepts(strict, '{"a": 1, "b": 2}')
    assert not accepts(strict, '{"a":1}')


@pytest.mark.parametrize(
    "text", ['{{"a": 1}}', '{"a": {{"b": 1}}}', '{"a": 1}}', '""a": 1}', '{"a"": 1}', '{"a": 1,, "b": 2}']
)
def test_no_mark_is_doubled(text, compile_params, accepts) -> None:
    """As answers had it elsewhere whose first token was drafted."""
    assert not accepts(compile_params(json={"type": "object"}), text)
    assert not accepts(compile_params(json_object=True), text)


def test_an_object_can_be_closed_for_other_properties(compile_params, accepts) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "object", "properties": {"b": {}}}}}
    assert accepts(compile_params(json=schema), '{"a": {"b": 1, "c": 2}, "z": 1}')
    closed = compile_params(json=schema, disable_additional_properties=True)
    assert accepts(closed, '{"a": {"b": 1}}')
    assert not accepts(closed, '{"a": {"b": 1, "c": 2}}')
    assert not accepts(closed, '{"a": {"b": 1}, "z": 1}')
