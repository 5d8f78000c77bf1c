"""What a core module offers is what its ``__all__`` says, and what it says is there."""

from __future__ import annotations

import ast


def violations(source):
    """A public module without ``__all__``, or one that promises a name it does not have."""
    exported = _exported(source.tree)
    defined = _defined(source.tree)
    if exported is None:
        public = sorted(name for name in defined if not name.startswith("_") and name not in _hooks(source.tree))
        return [source.at(source.tree, f"no __all__, yet it defines {', '.join(public[:3])}")] if public else []
    imported = {alias.asname or alias.name for node in _imports(source.tree) for alias in node.names}
    missing = sorted(set(exported) - defined - imported)
    twice = sorted({name for name in exported if exported.count(name) > 1})
    found = [source.at(source.tree, f"__all__ names {name}, which is not there") for name in missing]
    return found + [source.at(source.tree, f"__all__ names {name} twice") for name in twice]


def _exported(tree):
    for node in tree.body:
        if isinstance(node, ast.Assign) and any(getattr(t, "id", "") == "__all__" for t in node.targets):
            return list(ast.literal_eval(node.value))
    return None


def _defined(tree):
    names = set()
    for node in _statements(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {n.id for target in targets for n in ast.walk(target) if isinstance(n, ast.Name)}
    return names


def _hooks(tree):
    """Hook implementations are found by their marker, not by name."""
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    return {f.name for f in functions if any("hookimpl" in ast.unparse(d) for d in f.decorator_list)}


def _imports(tree):
    return [node for node in _statements(tree) if isinstance(node, ast.Import | ast.ImportFrom)]


def _statements(tree):
    """Top-level statements, and those inside a top-level ``if`` or ``try``."""
    pending = list(tree.body)
    while pending:
        node = pending.pop()
        yield node
        if isinstance(node, ast.If | ast.Try):
            pending += [*node.body, *node.orelse, *getattr(node, "finalbody", [])]
            pending += [inner for handler in getattr(node, "handlers", []) for inner in handler.body]


def test_core_modules_say_what_they_offer(product):
    found = [line for source in product if source.folder == "core" for line in violations(source)]
    assert not found, "\n".join(found)


def test_a_false_promise_is_seen(source):
    assert violations(source("core/a.py", "def f(): ...")) == ["core/a.py:1: no __all__, yet it defines f"]
    assert len(violations(source("core/a.py", "__all__ = ['f', 'g', 'f']\ndef f(): ..."))) == 2
    assert violations(source("core/a.py", "def _f(): ...\n@hookimpl\ndef quire_x(): ...")) == []
