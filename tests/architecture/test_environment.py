"""The environment is read in ``core/env.py`` alone: ten variables at most, each with a flag that wins over it."""

from __future__ import annotations

import ast
import re

import pytest

from quire.core.plugin.registry import KINDS
from quire.server.cli.flags import ENGINE_FLAGS, SERVER_FLAGS

HOME = "core/env.py"
CONVENTIONS = {"PYTHONPATH"}
"""Names that belong to no program."""


def violations(source):
    """Every use of the process environment."""
    nodes = [n for n in ast.walk(source.tree) if isinstance(n, ast.Attribute | ast.Name | ast.ImportFrom)]
    return [source.at(node, f"reads the environment; only {HOME} may") for node in nodes if _reads(node)]


def _reads(node):
    if isinstance(node, ast.ImportFrom):
        return node.module == "os" and any(a.name in ("environ", "getenv", "putenv") for a in node.names)
    return isinstance(node, ast.Attribute) and node.attr in ("environ", "environb", "getenv", "putenv")


def test_only_one_file_reads_it(everything):
    counted = [s for s in everything if s.folder in ("core", "plugins", "server", "src") and s.path != HOME]
    found = [line for source in counted for line in violations(source)]
    assert not found, "\n".join(found)


def test_its_variables_are_few_and_have_flags(product):
    (env,) = (source for source in product if source.path == HOME)
    constants = (n.value for n in ast.walk(env.tree) if isinstance(n, ast.Constant) and isinstance(n.value, str))
    names = {text for text in constants if re.fullmatch(r"[A-Z][A-Z0-9]*(_[A-Z0-9]+)+|PYTHONPATH", text)}
    assert len(names) <= 10
    flags = {flag.flag for flag in (*ENGINE_FLAGS, *SERVER_FLAGS)} | {kind.option_flag for kind in KINDS.values()}
    for name in names - CONVENTIONS:
        documented = re.search(rf"``{name}``[^\n]*?``(--[a-z-]+)``", env.text)
        assert documented, f"{HOME} does not say which flag stands for {name}"
        assert documented[1] in flags, f"{HOME}: {name} points at {documented[1]}, which is no flag"


@pytest.mark.parametrize("text", ["import os\nos.environ['A']", "from os import getenv", "import os\nos.getenv('A')"])
def test_a_reader_is_seen(source, text):
    assert len(violations(source("core/a.py", text))) == 1
