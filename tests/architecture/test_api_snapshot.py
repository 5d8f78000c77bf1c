"""The plugin API may only grow: ``api_snapshot.json`` keeps every hook signature, contract member and public name.

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
    *(f"quire.sdk.{part}" for part in ("contracts", "errors", "hooks", "options")),
    "quire.testing",
)
"""The modules that users and authors import."""


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
    faces = {name: sorted(importlib.import_module(name).__all__) for name in FACES}
    return {"hooks": hooks, "contracts": contracts, "types": types, "names": faces}


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
        members[name] = ("abstract " if name in cls.__abstractmethods__ else "") + text
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
    for module, names in old["names"].items():
        found += [f"{module}.{name} is gone" for name in names if name not in new["names"].get(module, ())]
    return found


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
        "names": {"m": ["a"]},
    }
    grown = {
        "hooks": {**old["hooks"], "a": {"arguments": ["x", "y"], "firstresult": False}, "c": {}},
        "contracts": {"m:C": {**old["contracts"]["m:C"], "h": "(self)"}, "m:D": {"f": "abstract (self)"}},
        "types": {"m:T": {"n": "required", "k": "optional"}},
        "names": {"m": ["a", "b"], "n": ["c"]},
    }
    assert breaks(old, grown) == []
    broken = {
        "hooks": {"a": {"arguments": ["y"], "firstresult": False}},
        "contracts": {"m:C": {"f": "abstract (self, more)", "h": "abstract (self)"}},
        "types": {"m:T": {"n": "required", "k": "required"}},
        "names": {"m": ["b"]},
    }
    assert len(breaks(old, broken)) == 7


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2] / "src"))
    now = current()
    lost = breaks(json.loads(SNAPSHOT.read_text()), now) if SNAPSHOT.exists() else []
    if lost:
        sys.exit("the plugin API may only grow: " + "; ".join(lost))
    SNAPSHOT.write_text(json.dumps(now, indent=1) + "\n")
