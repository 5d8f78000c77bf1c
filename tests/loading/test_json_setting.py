"""Settings that are JSON objects: every one says alike what is wrong of its value."""

from __future__ import annotations

from typing import Any

import pytest

from quire.core.errors import ConfigError
from quire.core.json_setting import parse_json_setting


def test_an_object_is_its_text_or_a_mapping() -> None:
    for value in ('{"a": 1}', {"a": 1}):
        assert parse_json_setting("some_setting", value, "{}") == {"a": 1}
    assert parse_json_setting("some_setting", None, "{}") == {} == parse_json_setting("some_setting", "{}", "{}")


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("{", "is not JSON: .*; write it as {.a.: 1}"),
        ("", "is not JSON"),
        ("{a: 1}", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[1]", "must be a JSON object, such as {.a.: 1}, got '\\[1\\]'"),
        ("null and void", "is not JSON"),
        (3, "must be a JSON object"),
    ],
)
def test_anything_else_is_refused_on_one_line(value: Any, reason: str) -> None:
    with pytest.raises(ConfigError, match=f"^some_setting.* {reason}") as raised:
        parse_json_setting("some_setting", value, '{"a": 1}')
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 300
