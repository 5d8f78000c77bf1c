"""Formats of strings, at the edges of their standards: what is excluded cannot be written."""

from __future__ import annotations

import json

import pytest

from quire.core.errors import InvalidRequestError

VALID = {
    "date": ["2024-02-29", "2000-02-29", "0001-01-01", "2023-02-28", "2023-04-30", "1999-12-31"],
    "time": ["23:59:59Z", "08:30:06.283185+14:00", "23:59:60Z", "23:59:60.5+00:00", "00:00:00z"],
    "date-time": ["2024-02-29T23:59:59.9-08:00", "1998-12-31T23:59:60Z", "1963-06-19t08:30:06z"],
    "hostname": ["a", "www.example.com", "a-b.c3", "a" * 63, "-".join("abcd"), "a.b-c-d", "ab-cd", "abc-d", "a--b"],
    "ipv6": ["::", "::1", "1::", "2001:db8::8a2e:370:7334", "::ffff:192.168.0.1", "1:2:3:4:5:6:7:8", "1:2:3:4:5:6:7::"],
}
INVALID = {
    "date": [
        "2023-02-29",
        "1900-02-29",
        "2024-02-30",
        "2023-04-31",
        "0000-01-01",
        "2023-13-01",
        "2023-00-10",
        "23-1-1",
    ],
    "time": ["24:00:00Z", "22:59:60Z", "23:59:60+01:00", "23:59:61Z", "08:30:06", "08:30Z", "12:00:00+24:00"],
    "date-time": ["2023-02-29T00:00:00Z", "2023-01-01 00:00:00Z", "1998-12-31T23:58:60Z", "2023-01-01"],
    "hostname": ["", "-a", "a-", "a_b", "a..b", "a.", "a" * 64, "xn--x", "ab--cd", ".".join(["a" * 63] * 4)],
    "ipv6": [":", "1", "12345::", "1::2::3", "::256.0.0.1", "::1.2.3", "1:2:3:4:5:6:7:8::", "::%1"],
}


@pytest.mark.parametrize("name", VALID)
def test_a_format_is_that_of_its_standard(name, compile_params, accepts) -> None:
    grammar = compile_params(json={"format": name})
    assert [text for text in VALID[name] if not accepts(grammar, json.dumps(text))] == []
    assert [text for text in INVALID[name] if accepts(grammar, json.dumps(text))] == []
    assert accepts(grammar, "3"), "a format says nothing of what is no string"


def test_a_format_stands_beside_other_keywords(compile_params, accepts) -> None:
    fields = {"format": "date", "pattern": "^20", "maxLength": 10.0, "allOf": [{"pattern": "9$"}]}
    grammar = compile_params(json={"type": "object", "properties": {"day": {"type": "string", **fields}}})
    assert accepts(grammar, '{"day": "2024-02-29"}')
    for day in ("1996-02-29", "2023-02-29", "2024-02-28"):
        assert not accepts(grammar, json.dumps({"day": day}))


@pytest.mark.parametrize("name", ["binary", "path", "int32", "password"])
def test_a_format_of_no_standard_asserts_nothing(name, compile_params, accepts) -> None:
    grammar = compile_params(json={"type": ["string", "integer"], "format": name, "maxLength": 3})
    assert accepts(grammar, '"abc"') and accepts(grammar, "12")
    assert not accepts(grammar, '"abcd"')


@pytest.mark.parametrize("name", ["uri-reference", "idn-hostname", "json-pointer"])
def test_a_format_of_the_standard_is_never_passed_over(name, compile_params) -> None:
    with pytest.raises(InvalidRequestError, match=f"keyword 'format' is not supported with the value '{name}'"):
        compile_params(json={"type": "object", "properties": {"a": {"format": name}}})


@pytest.mark.parametrize("all_of", [3, None, {}, {"a": 1}, "x"])
@pytest.mark.parametrize("keywords", [{"format": "date"}, {"dependentRequired": {"a": ["b"]}}])
def test_an_all_of_that_is_no_list_is_refused_by_name(keywords, all_of, compile_params) -> None:
    with pytest.raises(InvalidRequestError, match="allOf must be an array"):
        compile_params(json={**keywords, "allOf": all_of})


@pytest.mark.parametrize("reference", ["#/components/A", "#/a~1b/c%20d", "#/components/B"])
def test_formats_hold_wherever_a_reference_leads(reference, compile_params, accepts) -> None:
    day = {"type": "object", "properties": {"day": {"format": "date"}, "count": {"format": "int64"}}}
    components = {"A": day, "B": {"$ref": "#/components/A"}}
    grammar = compile_params(json={"$ref": reference, "components": components, "a/b": {"c d": day}})
    assert accepts(grammar, '{"day": "2024-02-29", "count": 3}')
    assert not accepts(grammar, '{"day": "2023-02-29"}')
    with pytest.raises(InvalidRequestError, match="'not' at /components/A"):
        compile_params(json={"$ref": "#/components/A", "components": {"A": {"not": {"type": "string"}}}})


def test_a_value_that_a_reference_leads_to_stays_as_it_is(compile_params) -> None:
    """Answers are compared with it."""
    properties = {"a": {"const": {"format": "int64"}}, "b": {"$ref": "#/properties/a/const"}}
    with pytest.raises(InvalidRequestError, match="'format' is not supported with the value 'int64'"):
        compile_params(json={"type": "object", "properties": properties})
