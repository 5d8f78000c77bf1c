"""What ``StructuredOutputsParams`` takes, and how it says no."""

from __future__ import annotations

import json

import msgspec
import pytest
from pydantic import BaseModel

from quire import GuidedDecodingParams, SamplingParams, StructuredOutputsParams
from quire.core.errors import InvalidRequestError
from quire.core.structured_outputs import MAX_CONSTRAINT_BYTES


def test_a_schema_is_kept_as_text_in_the_order_of_its_keys() -> None:
    schema = {"type": "object", "properties": {"b": {}, "a": {"const": "é"}}}
    params = StructuredOutputsParams(json=schema)
    assert params.json == '{"type":"object","properties":{"b":{},"a":{"const":"é"}}}'
    assert StructuredOutputsParams(json=json.dumps(schema, indent=2)) == params
    assert params.kind == "json"
    assert params.load_json() == schema
    decoded = msgspec.msgpack.decode(
        msgspec.msgpack.encode(SamplingParams(structured_outputs=params)), type=SamplingParams
    )
    assert decoded.structured_outputs == params


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "exactly one .*none is given"),
        ({"json": {}, "regex": "a"}, "json and regex are given"),
        ({"json": "{"}, "json is not valid JSON"),
        ({"json": "[1]"}, "must be a JSON object"),
        ({"json": 3}, "must be a JSON object"),
        ({"json": '{"a": NaN}'}, "NaN is no JSON number"),
        ({"json": {"a": float("nan")}}, "not valid JSON"),
        ({"json": {"a": object()}}, "not valid JSON"),
        ({"json": '{"a":' * 3000 + "1" + "}" * 3000}, "json is .*(recursion|deeper)"),
        ({"json": '{"a":' * 65 + "1" + "}" * 65}, "nested deeper than 64"),
        ({"json": {"enum": ["x" * 99] * 2000}}, f"the limit is {MAX_CONSTRAINT_BYTES}"),
        ({"regex": "a" * 200_000}, "the limit is"),
        ({"regex": ""}, "not empty"),
        ({"regex": 3}, "must be a text"),
        ({"regex": "\ud800"}, "surrogate"),
        ({"choice": []}, "list of 1 to"),
        ({"choice": "abc"}, "list of 1 to"),
        ({"choice": ["a", 3]}, "must hold texts"),
        ({"structural_tag": True}, "must be a JSON object"),
        ({"structural_tag": {"format": {"type": "sequence"}}}, "a format of type 'sequence' is not supported"),
        ({"structural_tag": {"format": 3}}, "type None is not supported"),
        ({"structural_tag": {"format": {"type": "triggered_tags"}}}, "'tags' of format must be a list"),
        ({"structural_tag": {"format": {"type": "triggered_tags", "tags": [3]}}}, r"tags\[0\] must be an object"),
        ({"structural_tag": {"format": {"type": "tag", "begin": "<a>", "content": 3}}}, "content of type json_schema"),
        ({"structural_tag": {"format": {"type": "tag", "begun": "<a>"}}}, "format has no field 'begun'"),
        ({"structural_tag": {"format": 3, "triggers": ["<a>"]}}, "the tag has no field 'triggers'"),
        (
            {"structural_tag": {"format": {"type": "triggered_tags", "tags": [], "at_least_one": "no"}}},
            "'at_least_one' of format must be true or false",
        ),
        ({"choice": ["a"], "reasoning_start": "<think>"}, "needs reasoning_end"),
        ({"regex": "a", "disable_any_whitespace": "no"}, "disable_any_whitespace must be true or false"),
        ({"regex": "a", "disable_fallback": [1]}, "disable_fallback must be true or false"),
        ({"regex": "a", "backend": 5}, "backend must be a text"),
        ({"regex": "a", "backend": "xgrammar:no-blanks"}, "'no-blanks' is no option of a backend"),
    ],
)
def test_what_is_malformed_is_refused_by_name(fields, message) -> None:
    with pytest.raises(InvalidRequestError, match=message) as caught:
        StructuredOutputsParams(**fields)
    assert caught.value.param == "structured_outputs"
    assert "\n" not in str(caught.value)


def test_the_depth_of_nested_objects_costs_no_stack() -> None:
    value: dict = {}
    for _ in range(100_000):
        value = {"a": value}
    with pytest.raises(InvalidRequestError):
        StructuredOutputsParams(json=value)
    while value:  # taken apart level by level: freeing it at once would recurse
        value = value["a"]


def test_scripts_for_vllm_give_fields_that_may_be_none() -> None:
    assert GuidedDecodingParams.from_optional(json=None, regex=None, choice=None, backend="outlines") is None
    params = GuidedDecodingParams.from_optional(json=None, regex="[ab]+", json_object=None, whitespace_pattern=None)
    assert params == StructuredOutputsParams(regex="[ab]+")


def test_options_behind_the_name_of_a_backend_hold() -> None:
    schema = {"type": "object", "properties": {"a": {}}}
    params = StructuredOutputsParams(json=schema, backend="guidance:disable-any-whitespace,no-additional-properties")
    assert params.disable_any_whitespace
    assert params.load_json() == {**schema, "additionalProperties": False}


def test_a_kind_that_is_false_is_not_given() -> None:
    """Also in the process that it is sent to."""
    params = StructuredOutputsParams(regex="a+", json_object=False)
    assert params == StructuredOutputsParams(regex="a+", json_object=0)
    assert params.kind == "regex"
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(params), type=StructuredOutputsParams) == params


def test_an_empty_constraint_is_not_none_at_all() -> None:
    """An answer is never left free where something was asked for."""
    assert StructuredOutputsParams.from_optional(json={}) == StructuredOutputsParams(json={})
    for fields in ({"choice": []}, {"regex": ""}, {"grammar": ""}, {"json": ""}):
        with pytest.raises(InvalidRequestError):
            StructuredOutputsParams.from_optional(**fields)
    assert StructuredOutputsParams.from_optional(json_object=False, json=None) is None


def test_a_class_of_pydantic_stands_for_its_schema() -> None:
    class Answer(BaseModel):
        name: str

    assert StructuredOutputsParams(json=Answer) == StructuredOutputsParams(json=Answer.model_json_schema())


def test_sampling_params_take_a_dict_and_refuse_others() -> None:
    assert SamplingParams(structured_outputs={"choice": ["a"]}).structured_outputs == StructuredOutputsParams(
        choice=["a"]
    )
    for value in ("json", {"nonsense": 1}, 3):
        with pytest.raises(InvalidRequestError, match="structured_outputs"):
            SamplingParams(structured_outputs=value)


SCHEMA = {"type": "integer"}
TAG = {"type": "tag", "begin": "<a>", "content": {"type": "json_schema", "json_schema": SCHEMA}, "end": "</a>"}


def test_structural_tags_of_xgrammar_are_the_same_in_other_words() -> None:
    structures = {"structures": [{"begin": "<a>", "schema": SCHEMA, "end": "</a>"}], "triggers": ["<a>"]}
    triggered = {"type": "triggered_tags", "triggers": ["<a>"], "tags": [TAG], "stop_after_first": True}
    params = StructuredOutputsParams(structural_tag={"type": "structural_tag", "format": triggered})
    assert params == StructuredOutputsParams(structural_tag={**structures, "stop_after_first": True})
    alone = StructuredOutputsParams(structural_tag=json.dumps({"format": TAG})).load_json()
    assert alone == {**structures, "free_text": False, "at_least_one": True, "stop_after_first": True}
    first = StructuredOutputsParams(structural_tag={"format": {**triggered, "at_least_one": True}}).load_json()
    assert first == {**structures, "stop_after_first": True, "at_least_one": True, "structure_first": True}
