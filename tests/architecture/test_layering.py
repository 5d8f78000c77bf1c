"""Who may import whom: core neither plugins nor server, server only core, plugins only what any plugin may."""

from __future__ import annotations

import ast
import re

import pytest

FOR_AUTHORS = ("quire.sdk",)
"""What a plugin may import of Quire beside its top-level names, whoever wrote it."""
FOR_TESTS_OF_AUTHORS = (*FOR_AUTHORS, "quire.testing")
OF_EXAMPLES = (*FOR_TESTS_OF_AUTHORS, "quire.examples")
"""The last is how a module beside the example is called here."""

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
        elif source.folder == "plugins" and top == "quire" and not _is_open(name, (*FOR_AUTHORS, "quire.plugins")):
            found.append(source.at(node, f"a plugin imports {name}, which is not open to plugins"))
        elif source.folder == "examples" and top == "quire" and not _is_open(name, OF_EXAMPLES):
            found.append(source.at(node, f"an example imports {name}, which is not open to its reader"))
    return found + _named(source)


def _is_open(name, allowed):
    if any(f"{name}.".startswith(f"{each}.") for each in allowed):
        return True
    return name == "quire" or (name.count(".") == 1 and name not in ("quire.core", "quire.plugins", "quire.server"))


def _named(source):
    if source.folder != "core" or source.path == "core/plugin/builtin.py":
        return []
    texts = [n for n in ast.walk(source.tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
    return [
        source.at(n, f"names {n.value}; only core/plugin/builtin.py may") for n in texts if _BUNDLED.fullmatch(n.value)
    ]


def test_what_authors_read_imports_what_they_may(root):
    """The templates of ``quire plugins new``, and every block of the documentation."""
    pages = [*root.glob("*.md"), *root.glob("docs/**/*.md"), *root.glob("examples/**/*.md")]
    found = []
    for path in [*pages, *root.glob("server/plugin_templates/*.txt")]:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            match = re.match(r"\s*(?:>>> )?(?:from|import) (quire\.[\w.]+)", line)
            if match and not _is_open(f"{match[1]}.name", FOR_TESTS_OF_AUTHORS):
                found.append(f"{path.relative_to(root)}:{number}: {line.strip()}")
    assert not found, "\n".join(found)


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
        ("plugins/kv/a.py", "from quire.core.ops import rms_norm"),
        ("plugins/kv/a.py", "from quire.core.layers.builder import LayerBuilder"),
        ("examples/plugins/a/a.py", "from quire.core.ops import write_kv"),
        ("examples/plugins/a/a.py", "from quire.plugins.kv.pool import NULL_BLOCK"),
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
        ("plugins/kv/a.py", "from quire.sdk.ops import write_kv\nfrom quire.sdk.layers import LayerBuilder"),
        ("examples/plugins/a/a.py", "from quire import LLM\nfrom quire.testing import run_checks"),
        ("plugins/kv/a.py", "from quire import SamplingParams\nfrom .pool import NULL_BLOCK\nimport torch"),
    ],
)
def test_what_is_allowed_passes(source, path, text):
    assert violations(source(path, text)) == []
