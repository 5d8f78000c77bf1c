"""The contracts of this version as plain data: what plugins can rely on, to compare versions with."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import inspect
from typing import Any

__all__ = ["FACES", "ContractRecord", "has_grown", "record_contracts"]

ContractRecord = dict[str, Any]
"""``hooks``, ``contracts``, ``types`` and ``calls`` by place and member, ``names`` by module, and ``docs``: a digest of
what the docstring of each promises."""
FACES = (
    "quire",
    "quire.sdk",
    *(f"quire.sdk.{part}" for part in ("contracts", "errors", "hooks", "layers", "ops", "options")),
    "quire.testing",
)
"""The modules that users and authors import."""
_MADE_BY_BUILDER = frozenset({"LMHead", "LayerNorm", "LearnedPositions", "Linear", "RMSNorm", "VocabEmbedding"})
"""Layers whose constructors authors do not call: ``LayerBuilder`` does."""


def record_contracts() -> ContractRecord:
    """The API as it is: hooks, contracts with their members, the dataclasses that cross them, and public names."""
    from quire.core.plugin import hookspecs
    from quire.core.plugin.registry import KINDS

    hooks: dict[str, Any] = {}
    docs: dict[str, str] = {}
    for name, function in vars(hookspecs).items():
        options = getattr(function, "quire_spec", None)
        if name.startswith("quire_") and options is not None:
            hooks[name] = {
                "arguments": list(inspect.signature(function).parameters),
                "firstresult": options["firstresult"],
            }
            docs[name] = _digest(function)
    contracts: dict[str, Any] = {}
    types: dict[str, Any] = {}
    for kind in KINDS.values():
        module = importlib.import_module(kind.contract.partition(":")[0])
        for name in sorted(module.__all__):
            value = getattr(module, name)
            where = f"{module.__name__}:{name}"
            if not inspect.isclass(value):
                continue
            docs |= _digest_members(where, value)
            if inspect.isabstract(value):
                contracts[where] = _members(value)
            elif dataclasses.is_dataclass(value):
                types[where] = {f.name: _optional(f) for f in dataclasses.fields(value)}
    calls: dict[str, Any] = {}
    for where in ("quire.sdk.layers", "quire.sdk.ops"):
        module = importlib.import_module(where)
        calls |= {f"{where}:{name}": _callables(getattr(module, name)) for name in module.__all__}
    calls["quire.sdk.contracts:Worker"] = _callables(importlib.import_module("quire.sdk.contracts").Worker)
    faces = {name: sorted(importlib.import_module(name).__all__) for name in FACES}
    calls = {where: members for where, members in sorted(calls.items()) if members}
    return {"hooks": hooks, "contracts": contracts, "types": types, "calls": calls, "names": faces, "docs": docs}


def has_grown(old: str, new: str | None) -> bool:
    """Whether what could be called as ``old`` still can: parameters keep their order, and what is new has a default."""
    if new is None or not old.startswith("(") or not new.startswith("("):
        return old == new
    was, now = (text[1:-1].split(", ") if text != "()" else [] for text in (old, new))
    return now[: len(was)] == was and all("=" in each or each == "*" for each in now[len(was) :])


def _callables(value: Any) -> dict[str, str]:
    """What authors call: a function under ``""``, the methods and fields of a class under their names."""
    value = getattr(value, "fn", value)  # what a kernel calls, behind its decorator
    if inspect.isfunction(value):
        parameters = inspect.signature(value).parameters.values()
        return {"": "(" + ", ".join(_parameter(p) for p in parameters) + ")"}
    if not inspect.isclass(value):
        return {}
    members = _members(value)
    if value.__name__ in _MADE_BY_BUILDER:
        del members["__init__"]
    if not dataclasses.is_dataclass(value):
        return members
    fields = {f.name for f in dataclasses.fields(value)}
    return {name: text for name, text in members.items() if name not in fields or not name.startswith("_")}


def _members(cls: type) -> dict[str, str]:
    members: dict[str, str] = {}
    for name, value in vars(cls).items():
        if name.startswith("_") and name != "__init__":
            continue
        function = getattr(value, "__func__", value)
        if isinstance(function, property):
            text = "property"
        elif inspect.isfunction(function):
            parameters = inspect.signature(function).parameters.values()
            text = "(" + ", ".join(_parameter(p) for p in parameters) + ")"
        else:
            text = "attribute"
        members[name] = ("abstract " if name in getattr(cls, "__abstractmethods__", ()) else "") + text
    for name in getattr(cls, "__annotations__", {}):
        members.setdefault(name, "attribute")
    return members


def _parameter(parameter: inspect.Parameter) -> str:
    star: dict[Any, str] = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**", parameter.KEYWORD_ONLY: "*, "}
    default = "" if parameter.default is parameter.empty else "=..."
    return star.get(parameter.kind, "") + parameter.name + default


def _optional(field: dataclasses.Field[Any]) -> str:
    given = field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
    return "optional" if given else "required"


def _digest_members(where: str, cls: type) -> dict[str, str]:
    """By ``where`` and ``where.member``."""
    digests = {where: _digest(cls)}
    for name, value in vars(cls).items():
        function = getattr(value, "__func__", value)
        if not name.startswith("_") and (inspect.isfunction(function) or isinstance(function, property)):
            digests[f"{where}.{name}"] = _digest(function)
    return digests


def _digest(value: Any) -> str:
    return hashlib.sha256((inspect.getdoc(value) or "").encode()).hexdigest()[:16]
