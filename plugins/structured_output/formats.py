"""Formats of JSON Schema as regular expressions, where the library's take what the standards exclude: days that a month
does not have, leap seconds at any time, host names that are too long."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from quire.sdk import JSON_SCHEMA_FORMATS

__all__ = ["add_to_all_of", "write_format"]

_YEAR = "([1-9][0-9]{3}|0[1-9][0-9]{2}|00[1-9][0-9]|000[1-9])"
_MULTIPLE_OF_4 = "(0[48]|[2468][048]|[13579][26])"
_LEAP_YEAR = f"([0-9]{{2}}{_MULTIPLE_OF_4}|{_MULTIPLE_OF_4}00)"
_DAY = "(0[1-9]|1[0-9]|2[0-8])"
_DATE = (
    f"({_YEAR}-((0[1-9]|1[0-2])-{_DAY}|(0[13-9]|1[0-2])-(29|30)|(0[13578]|1[02])-31)|{_LEAP_YEAR}-02-29)"  # RFC 3339
)
_FRACTION = r"(\.[0-9]+)?"
_HOUR_MINUTE = "([01][0-9]|2[0-3]):[0-5][0-9]"
_TIME = (  # a leap second in UTC alone: elsewhere it takes arithmetic
    f"({_HOUR_MINUTE}:[0-5][0-9]{_FRACTION}([Zz]|[+-]{_HOUR_MINUTE})|23:59:60{_FRACTION}([Zz]|[+-]00:00))"
)
_LETTER, _INNER = "[A-Za-z0-9]", "[A-Za-z0-9-]"
_LABEL = (  # without "--" in the third and fourth place, where an encoded name needs more than an expression
    f"{_LETTER}({_LETTER}|{_INNER}({_LETTER}|{_LETTER}{_INNER}{{0,59}}{_LETTER}|-{_LETTER}({_INNER}{{0,58}}{_LETTER})?))?"
)
_OCTET = "(25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
_H16 = "[0-9A-Fa-f]{1,4}"
_LS32 = rf"({_H16}:{_H16}|({_OCTET}\.){{3}}{_OCTET})"
_IPV6 = "|".join(  # RFC 3986
    (
        f"({_H16}:){{6}}{_LS32}",
        f"::({_H16}:){{5}}{_LS32}",
        *(f"(({_H16}:){{0,{4 - count}}}{_H16})?::({_H16}:){{{count}}}{_LS32}" for count in (4, 3, 2, 1, 0)),
        f"(({_H16}:){{0,5}}{_H16})?::{_H16}",
        f"(({_H16}:){{0,6}}{_H16})?::",
    )
)
_FORMATS: Mapping[str, Mapping[str, Any]] = MappingProxyType({
    "date": {"pattern": f"^{_DATE}$"},
    "time": {"pattern": f"^{_TIME}$"},
    "date-time": {"pattern": f"^{_DATE}[Tt]{_TIME}$"},
    "hostname": {"pattern": rf"^{_LABEL}(\.{_LABEL})*$", "maxLength": 253},
    "ipv6": {"pattern": f"^({_IPV6})$"},
})  # fmt: skip


def write_format(schema: dict[str, Any]) -> None:
    """Put an expression in the place of the schema's format, if there is one for it, and take out one that asserts
    nothing."""
    name = schema.get("format")
    if not isinstance(name, str):
        return
    if name in _FORMATS or name not in JSON_SCHEMA_FORMATS:
        del schema["format"]
    if name in _FORMATS:
        add_to_all_of(schema, dict(_FORMATS[name]))


def add_to_all_of(schema: dict[str, Any], other: dict[str, Any]) -> None:
    """Assert ``other`` beside what the schema asserts. An ``allOf`` that is no list stays for the library to refuse."""
    schemas = schema.get("allOf", [])
    if isinstance(schemas, list):
        schema["allOf"] = [*schemas, other]
