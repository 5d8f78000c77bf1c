"""Structural tags mean what XGrammar means by them."""

from __future__ import annotations

import pytest

from quire.core.errors import InvalidRequestError

TAG = {"type": "tag", "begin": "<p>", "content": {"type": "json_schema", "json_schema": {"const": 1}}, "end": "</p>"}
TEXTS = ["", "Hi", "Hi <p>1</p>", "<p>1</p>", "<p>1</p> bye", "<p>1</p><p>1</p>", "<p>1</p> and <p>1</p>", "<p>2</p>"]


@pytest.mark.parametrize("at_least_one", [False, True])
@pytest.mark.parametrize("stop_after_first", [False, True])
def test_flags_of_triggered_tags(at_least_one, stop_after_first, compile_params, accepts) -> None:
    flags = {"at_least_one": at_least_one, "stop_after_first": stop_after_first}
    tag = {"type": "triggered_tags", "triggers": ["<p>"], "tags": [TAG], **flags}
    grammar = compile_params(structural_tag={"type": "structural_tag", "format": tag})
    accepted = [text for text in TEXTS if accepts(grammar, text)]
    assert accepted == [
        text
        for text in TEXTS[:-1]
        if (text.startswith("<p>") or not at_least_one)
        and (text.find("</p>") in (-1, len(text) - 4) or not stop_after_first)
    ]


def test_a_tag_alone(compile_params, accepts) -> None:
    grammar = compile_params(structural_tag={"format": TAG})
    assert [text for text in TEXTS if accepts(grammar, text)] == ["<p>1</p>"]


@pytest.mark.parametrize("name", ["free_text", "at_least_one", "structure_first", "stop_after_first", "first", "free"])
@pytest.mark.parametrize("value", ["no", None, 1])
def test_a_flag_is_true_or_false(name, value, compile_params) -> None:
    tag: dict = {"structures": [{"begin": "<p>", "schema": {"const": 1}, "end": "</p>"}], "triggers": ["<p>"]}
    (tag["structures"][0] if name in ("first", "free") else tag)[name] = value
    with pytest.raises(InvalidRequestError, match=f"'{name}' must be true or false"):
        compile_params(structural_tag=tag)
