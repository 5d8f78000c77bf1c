"""No state that outlives its owner: no ``global``, no mutable module variable; no mixins, no ``utils``."""

from __future__ import annotations

import ast

import pytest

MAKERS = {
    "ChainMap", "ContextVar", "Counter", "OrderedDict", "WeakKeyDictionary", "WeakSet", "WeakValueDictionary",
    "bytearray", "count", "cycle", "defaultdict", "deque", "dict", "list", "local", "set",
}  # fmt: skip
"""Calls that make something mutable."""
LITERALS = (ast.List, ast.Dict, ast.Set, ast.ListComp, ast.DictComp, ast.SetComp)
CHANGES = {"add", "append", "clear", "discard", "extend", "insert", "pop", "popitem", "remove", "setdefault", "update"}


def violations(source):
    """Module-level state, ``global`` statements and mixins."""
    found = []
    mutable = set()
    for node in source.tree.body:
        for name in _assigned_mutable(node):
            mutable.add(name)
            if name.upper() != name:
                found.append(source.at(node, f"{name} is mutable state of the module; make it a field of its owner"))
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Global):
            found.append(source.at(node, f"global {', '.join(node.names)}; make it a field of its owner"))
        elif isinstance(node, ast.ClassDef) and any(_is_mixin(n) for n in (node.name, *map(ast.unparse, node.bases))):
            found.append(source.at(node, f"class {node.name} is or has a mixin; hold a part instead of inheriting it"))
        elif (name := _changed(node)) in mutable:
            found.append(source.at(node, f"{name} is a constant of the module and is changed here"))
    return found


def _assigned_mutable(node):
    if isinstance(node, ast.AnnAssign) and node.value is not None:
        targets, value = [node.target], node.value
    elif isinstance(node, ast.Assign):
        targets, value = node.targets, node.value
    else:
        return []
    called = value.func if isinstance(value, ast.Call) else None
    name = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", None)
    if not isinstance(value, LITERALS) and name not in MAKERS:
        return []
    return [t.id for t in targets if isinstance(t, ast.Name) and not t.id.startswith("__")]


def _changed(node):
    """The name of what a statement changes in place: ``X.append(1)``, ``X[k] = v``, ``del X[k]``."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in CHANGES:
        return getattr(node.func.value, "id", None)
    if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store | ast.Del):
        return getattr(node.value, "id", None)
    return None


def _is_mixin(name):
    return name.lower().endswith("mixin")


def test_there_is_no_state_outside_objects(product):
    found = [line for source in product for line in violations(source)]
    assert not found, "\n".join(found)


def test_nothing_is_called_utils(everything):
    vague = ("utils", "util", "helpers", "misc", "common_utils")
    found = [s.path for s in everything if set(s.path.removesuffix(".py").split("/")) & set(vague)]
    assert not found, f"name them by what they hold: {found}"


@pytest.mark.parametrize(
    "text",
    [
        "cache = {}",
        "_cache: dict[str, int] = dict()",
        "counter = itertools.count()",
        "def f():\n    global x\n    x = 1",
        "class StreamMixin: ...",
        "class A(StreamMixin): ...",
        "TABLE = {}\ndef f(k):\n    TABLE[k] = 1",
        "TABLE = []\ndef f(k):\n    TABLE.append(k)",
    ],
)
def test_state_is_seen(source, text):
    assert len(violations(source("core/a.py", text))) == 1


def test_constants_pass(source):
    text = "__all__ = ['f']\nTABLE = {'a': 1}\nname = 'x'\ndef f(k):\n    found = []\n    found.append(TABLE[k])"
    assert violations(source("core/a.py", text)) == []
