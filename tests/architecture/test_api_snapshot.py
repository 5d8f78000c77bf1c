"""The plugin API may only grow: ``api_snapshot.json`` keeps each hook signature, contract member, public name and call.

``python tests/architecture/test_api_snapshot.py`` adds what is new to the snapshot. It refuses to remove or change
anything: that is a new major version of the plugin API. (Until 0.1 is released, delete the file first and run it.)
"""

import inspect
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "src"))

from quire.core.plugin.contract_record import has_grown, record_contracts

SNAPSHOT = Path(__file__).with_name("api_snapshot.json")


def current():
    """The record of this version, without what docstrings say."""
    record = record_contracts()
    del record["docs"]
    return record


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
        changed = [(m, t) for m, t in members.items() if not has_grown(t, now.get(m))]
        found += [f"{where}.{m} was {t!r}, is {now.get(m)!r}" for m, t in changed]
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
    now = current()
    lost = breaks(json.loads(SNAPSHOT.read_text()), now) if SNAPSHOT.exists() else []
    if lost:
        sys.exit("the plugin API may only grow: " + "; ".join(lost))
    SNAPSHOT.write_text(json.dumps(now, indent=1) + "\n")
