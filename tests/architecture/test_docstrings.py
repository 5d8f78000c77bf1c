"""Everything public in core, plugins and server says what it is: modules, classes, functions and methods."""

from __future__ import annotations

import ast

DEFINITIONS = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def violations(source):
    """Every public module, class, function or method without a docstring."""
    found = [] if ast.get_docstring(source.tree) else [source.at(source.tree, "the module has no docstring")]
    return found + [source.at(node, f"{node.name} has no docstring") for node in _silent(source.tree)]


def _silent(parent):
    for node in parent.body:
        if isinstance(node, DEFINITIONS) and not node.name.startswith("_"):
            if not ast.get_docstring(node) and not _is_variant(node):
                yield node
            if isinstance(node, ast.ClassDef):
                yield from _silent(node)


def _is_variant(node):
    """A setter, or an overload: documented where the name is first defined."""
    names = [ast.unparse(decorator) for decorator in node.decorator_list]
    return any(name.endswith((".setter", "overload", "override")) for name in names)


def test_everything_public_is_documented(product):
    found = [line for source in product for line in violations(source)]
    assert not found, "\n".join(found)


def test_silence_is_seen(source):
    text = "def f():\n    pass\n\nclass A:\n    'One.'\n    def m(self): ...\n    def _n(self): ...\n"
    assert [line.split(": ")[1].split()[0] for line in violations(source("core/a.py", text))] == ["the", "f", "m"]
