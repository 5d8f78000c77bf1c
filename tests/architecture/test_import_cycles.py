"""No module imports itself in a circle, however late: imports for type checkers and inside functions count too."""

from __future__ import annotations


def dependencies(sources):
    """Module -> the modules of ``sources`` that it imports anywhere in its text."""
    modules = {source.module: source for source in sources}
    return {
        name: {m for _, i in s.imports() if (m := _module_of(i, modules)) and m != name} for name, s in modules.items()
    }


def _module_of(imported, modules):
    """``quire.core.request.Request`` is a name in ``quire.core.request``."""
    return next((name for name in (imported, imported.rpartition(".")[0]) if name in modules), None)


def cycles(graph):
    """Every set of modules that reach each other (Tarjan's strongly connected components of more than one)."""
    index, low, stack, found = {}, {}, [], []

    def visit(node):
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in sorted(graph[node]):
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            component = frozenset(stack[stack.index(node) :])
            del stack[stack.index(node) :]
            if len(component) > 1:
                found.append(component)

    for node in sorted(graph):
        if node not in index:
            visit(node)
    return found


def test_no_module_imports_itself_in_a_circle(everything):
    counted = [source for source in everything if source.folder in ("core", "plugins", "server", "src")]
    found = cycles(dependencies(counted))
    assert not found, "\n".join(" - ".join(sorted(circle)) for circle in found)


def test_a_circle_is_seen(source):
    late = "def f():\n    from quire.core.c import g"
    typed = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from quire.core import a"
    sources = [
        source("core/a.py", "import quire.core.b"),
        source("core/b.py", late),
        source("core/c.py", typed),
        source("core/d.py", "from quire.core.a import f"),
    ]
    assert cycles(dependencies(sources)) == [frozenset({"quire.core.a", "quire.core.b", "quire.core.c"})]
    assert cycles(dependencies(sources[1:])) == []
