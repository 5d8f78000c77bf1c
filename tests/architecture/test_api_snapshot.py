"""The plugin API may only grow: ``api_snapshot.json`` keeps each hook signature, contract member, public name and call.

``python tests/architecture/test_api_snapshot.py`` adds what is new to the snapshot. It refuses to remove or change
anything: that is a new major version of the plugin API. (Until 0.1 is released, delete the file first and run it.)
"""

import dataclasses
import importlib
import inspect
import json
import sys
from pathlib import Path

SNAPSHOT = Path(__file__).with_name("api_snapshot.json")
FACES = (
    "quire",
    "quire.sdk",
    *(f"quire.sdk.{part}" for part in ("contracts", "errors", "hooks", "layers", "ops", "options")),
    "quire.testing",
)
"""The modules that users and authors import."""
MADE_BY_BUILDER = {"LMHead", "LayerNorm", "LearnedPositions", "Linear", "RMSNorm", "VocabEmbedding"}
"""Layers whose constructors authors do not call: ``LayerBuilder`` does."""


def current():
    """The API as it is: hooks, contracts with their members, the dataclasses that cross them, and public names."""
    from quire.core.plugin import hookspecs
    from quire.core.plugin.registry import KINDS

    hooks = {}
    for name, function in vars(hookspecs).items():
        options = getattr(function, "quire_spec", None)
        if name.startswith("quire_") and options is not None:
            hooks[name] = {
                "arguments": list(inspect.signature(function).parameters),
                "firstresult": options["firstresult"],
            }
    contracts, types = {}, {}
    for kind in KINDS.values():
        module = importlib.import_module(kind.contract.partition(":")[0])
        for name in sorted(module.__all__):
            value = getattr(module, name)
            where = f"{module.__name__}:{name}"
            if not inspect.isclass(value):
                continue
            if inspect.isabstract(value):
                contracts[where] = _members(value)
            elif dataclasses.is_dataclass(value):
                types[where] = {f.name: _optional(f) for f in dataclasses.fields(value)}
    calls = {}
    for where in ("quire.sdk.layers", "quire.sdk.ops"):
        module = importlib.import_module(where)
        calls |= {f"{where}:{name}": _callables(getattr(module, name)) for name in module.__all__}
    calls["quire.sdk.contracts:Worker"] = _callables(importlib.import_module("quire.sdk.contracts").Worker)
    faces = {name: sorted(importlib.import_module(name).__all__) for name in FACES}
    calls = {where: members for where, members in sorted(calls.items()) if members}
    return {"hooks": hooks, "contracts": contracts, "types": types, "calls": calls, "names": faces}


def _callables(value):
    """What authors call: a function under ``""``, the methods and fields of a class under their names."""
    value = getattr(value, "fn", value)  # what a kernel calls, behind its decorator
    if inspect.isfunction(value):
        parameters = inspect.signature(value).parameters.values()
        return {"": "(" + ", ".join(_parameter(p) for p in parameters) + ")"}
    if not inspect.isclass(value):
        return {}
    members = _members(value)
    if value.__name__ in MADE_BY_BUILDER:
        del members["__init__"]
    if not dataclasses.is_dataclass(value):
        return members
    fields = {f.name for f in dataclasses.fields(value)}
    return {name: text for name, text in members.items() if name not in fields or not name.startswith("_")}


def _members(cls):
    members = {}
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


def _parameter(parameter):
    star = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**", parameter.KEYWORD_ONLY: "*, "}
    default = "" if parameter.default is parameter.empty else "=..."
    return star.get(parameter.kind, "") + parameter.name + default


def _optional(field):
    given = field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
    return "optional" if given else "required"


def breaks(old, new):
    """What ``new`` takes away from plugins written for ``old``, in words."""
    found = []
    for name, hook in old["hooks"].items():
        now = new["hooks"].get(name)
        if now is None:
            found.append(f"hook {name} is gone")
        elif not set(hook["arguments"]) <= set(now["arguments"]) or hook["firstresult"] != now["firstresult"]:
            found.append(f"hook {name} lost an argument or changed its meaning")
    for section in ("contracts", "types"):
        for where, members in old[section].items():
            now = new[section].get(where)
            if now is None:
                found.append(f"{where} is gone")
                continue
            found += [f"{where}.{m} was {t!r}, is {now.get(m)!r}" for m, t in members.items() if now.get(m) != t]
            added = {m: t for m, t in now.items() if m not in members}
            found += [f"{where}.{m} is new and must have a default" for m, t in added.items() if _demands(t)]
    for where, members in old["calls"].items():
        now = new["calls"].get(where, {})
        changed = [(m, t) for m, t in members.items() if not _has_grown(t, now.get(m))]
        found += [f"{where}.{m} was {t!r}, is {now.get(m)!r}" for m, t in changed]
    for module, names in old["names"].items():
        found += [f"{module}.{name} is gone" for name in names if name not in new["names"].get(module, ())]
    return found


def _has_grown(old, new):
    """Whether what could be called as ``old`` still can: parameters keep their order, and what is new has a default."""
    if new is None or not old.startswith("(") or not new.startswith("("):
        return old == new
    was, now = (text[1:-1].split(", ") if text != "()" else [] for text in (old, new))
    return now[: len(was)] == was and all("=" in each or each == "*" for each in now[len(was) :])


def _demands(text):
    return text.startswith("abstract") or text == "required"


def test_nothing_that_plugins_rely_on_was_taken_away():
    assert breaks(json.loads(SNAPSHOT.read_text()), current()) == []


def test_the_snapshot_is_complete():
    assert json.loads(SNAPSHOT.read_text()) == current(), f"run python {Path(__file__).name} to add what is new"


def test_every_hook_says_when_it_is_called_and_what_none_means():
    from quire.core.plugin import hookspecs

    for name in current()["hooks"]:
        text = inspect.getdoc(getattr(hookspecs, name)) or ""
        assert text, name
        if not name.startswith("quire_register_") or name == "quire_register_commands":
            assert "Called" in text and "None" in text, name


def test_the_comparison_finds_what_breaks():
    old = {
        "hooks": {"a": {"arguments": ["x"], "firstresult": False}, "b": {"arguments": [], "firstresult": True}},
        "contracts": {"m:C": {"f": "abstract (self)", "g": "(self, x)"}},
        "types": {"m:T": {"n": "required"}},
        "calls": {"m:f": {"": "(x, y)"}},
        "names": {"m": ["a"]},
    }
    grown = {
        "hooks": {**old["hooks"], "a": {"arguments": ["x", "y"], "firstresult": False}, "c": {}},
        "contracts": {"m:C": {**old["contracts"]["m:C"], "h": "(self)"}, "m:D": {"f": "abstract (self)"}},
        "types": {"m:T": {"n": "required", "k": "optional"}},
        "calls": {"m:f": {"": "(x, y, z=...)"}},
        "names": {"m": ["a", "b"], "n": ["c"]},
    }
    assert breaks(old, grown) == []
    broken = {
        "hooks": {"a": {"arguments": ["y"], "firstresult": False}},
        "contracts": {"m:C": {"f": "abstract (self, more)", "h": "abstract (self)"}},
        "types": {"m:T": {"n": "required", "k": "required"}},
        "calls": {"m:f": {"": "(x, y, z)"}},
        "names": {"m": ["b"]},
    }
    assert len(breaks(old, broken)) == 8


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2] / "src"))
    now = current()
    lost = breaks(json.loads(SNAPSHOT.read_text()), now) if SNAPSHOT.exists() else []
    if lost:
        sys.exit("the plugin API may only grow: " + "; ".join(lost))
    SNAPSHOT.write_text(json.dumps(now, indent=1) + "\n")
