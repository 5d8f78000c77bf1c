"""Tests use what is public: a private name may change without a test, so a test that needs one asks for a handle."""

from __future__ import annotations

import ast

OTHERS = {"argparse._SubParsersAction", "parser._actions", "torch.cuda._sleep"}
"""Private names of the standard library and of torch that have no public equal."""
TUPLES = {"_asdict", "_fields", "_replace"}
"""Public names of named tuples."""


def violations(source):
    """Every private attribute of another object, and every private name that is imported from Quire."""
    found = []
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Attribute) and _is_private(node.attr) and node.attr not in TUPLES:
            if ast.unparse(node.value) not in ("self", "cls") and ast.unparse(node) not in OTHERS:
                found.append(source.at(node, f"uses {ast.unparse(node)}"))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("quire"):
            found += [source.at(node, f"imports {alias.name}") for alias in node.names if _is_private(alias.name)]
    return found


def _is_private(name):
    return name.startswith("_") and not name.startswith("__")


def test_tests_use_public_names(everything):
    found = [line for source in everything if source.folder == "tests" for line in violations(source)]
    assert not found, "give the class a read-only property or a debug_state():\n" + "\n".join(found)


def test_a_private_name_is_seen(source):
    assert len(violations(source("tests/a.py", "from quire.core.a import _b\nllm._core.step()\nself._x = a._y.z"))) == 3
    assert violations(source("tests/a.py", "self._x = row._replace(a=1).__class__")) == []
