"""Who may import whom: core neither plugins nor server, server only core, plugins only what any plugin may."""

from __future__ import annotations

import ast
import re

import pytest

FOR_PLUGINS = ("quire.core.layers", "quire.core.ops", "quire.sdk")
"""What a bundled plugin may import of Quire beside its top-level names: what an author may, and the building blocks."""

_BUNDLED = re.compile(r"quire\.(plugins|server)\b[\w.]*(:\w+)?")


def violations(source):
    """Every import that breaks the layering, and every bundled module that core names outside ``builtin.py``."""
    found = []
    for node, name in source.imports():
        top, _, rest = name.partition(".")
        layer = rest.split(".")[0] if top == "quire" else ""
        if top in ("core", "plugins", "server"):
            found.append(source.at(node, f"imports top-level {top!r}; its name is quire.{name}"))
        elif source.folder == "core" and layer in ("plugins", "server"):
            found.append(source.at(node, f"core imports {name}"))
        elif source.folder == "server" and layer == "plugins":
            found.append(source.at(node, f"server imports {name}; it reaches plugins through core"))
        elif source.folder == "plugins" and top == "quire" and not _open_to_plugins(name):
            found.append(source.at(node, f"a plugin imports {name}, which is not open to plugins"))
    return found + _named(source)


def _open_to_plugins(name):
    if name.startswith("quire.plugins.") or any(f"{name}.".startswith(f"{allowed}.") for allowed in FOR_PLUGINS):
        return True
    return name == "quire" or (name.count(".") == 1 and name != "quire.core")


def _named(source):
    if source.folder != "core" or source.path == "core/plugin/builtin.py":
        return []
    texts = [n for n in ast.walk(source.tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
    return [
        source.at(n, f"names {n.value}; only core/plugin/builtin.py may") for n in texts if _BUNDLED.fullmatch(n.value)
    ]


def test_the_tree_keeps_its_layers(everything):
    found = [line for source in everything for line in violations(source)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("core/a.py", "import quire.plugins.kv.paged"),
        ("core/a.py", "def f():\n    from quire.server import cli"),
        ("core/a.py", "from .. import plugins"),
        ("core/sched/a.py", "from ...server import cli"),
        ("core/a.py", "TARGET = 'quire.plugins.kv.paged:PagedAllocator'"),
        ("server/a.py", "from quire.plugins.kv import paged"),
        ("plugins/kv/a.py", "from quire.server import cli"),
        ("plugins/kv/a.py", "from quire.core.engine.engine_core import EngineCore"),
        ("plugins/kv/a.py", "from quire.core import builtin"),
        ("plugins/kv/a.py", "from quire.core.contracts.kv import KVAllocator"),
        ("tests/a.py", "from core.request import Request"),
        ("tools/a.py", "import server"),
    ],
)
def test_a_breach_is_seen(source, path, text):
    assert len(violations(source(path, text))) == 1


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("core/a.py", "from quire.core.request import Request"),
        ("core/plugin/builtin.py", "TARGET = 'quire.plugins.kv.paged:PagedAllocator'"),
        ("server/a.py", "from quire.core.engine.async_llm import AsyncLLM"),
        ("plugins/kv/a.py", "from quire.sdk import KVAllocator\nfrom quire.plugins.kv.pool import NULL_BLOCK"),
        ("plugins/kv/a.py", "from quire import SamplingParams\nfrom .pool import NULL_BLOCK\nimport torch"),
    ],
)
def test_what_is_allowed_passes(source, path, text):
    assert violations(source(path, text)) == []
