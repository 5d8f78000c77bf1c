"""Looking around is quick: the commands that list things import neither torch nor fastapi nor transformers."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

HEAVY = ("fastapi", "huggingface_hub", "tokenizers", "torch", "transformers", "triton", "uvicorn")
PROBE = """
import contextlib, io, json, sys
with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
    {action}
print(json.dumps(sorted(name for name in {heavy!r} if name in sys.modules)))
"""
COMMAND = """
    from quire.server.cli.main import main
    try:
        main({words!r})
    except SystemExit:
        pass
"""


def imported_by(action, root):
    """The heavy packages that are loaded after ``action`` ran in a fresh interpreter."""
    code = PROBE.format(action=action.strip(), heavy=HEAVY)
    command = [sys.executable, "-c", code]
    env = {"PYTHONPATH": str(root / "src"), "PATH": "/usr/bin:/bin"}
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, env=env, stdin=subprocess.DEVNULL)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        ["--version"],
        ["serve", "--help"],
        ["bench", "--help"],
        ["plugins", "list"],
        ["plugins", "explain", "policy/fcfs"],
        ["plugins", "doctor"],
        ["serve", "--no-such-flag"],
    ],
    ids=" ".join,
)
def test_a_listing_command_is_light(words, root):
    assert imported_by(COMMAND.format(words=words), root) == []


def test_import_quire_is_light(root):
    assert imported_by("import quire, quire.core.plugin.registry, quire.core.plugin.builtin", root) == []


@pytest.mark.parametrize(
    "line",
    [
        "import quire.sdk, quire.sdk.contracts, quire.sdk.ops, quire.testing",
        "from quire.sdk import BatchingPolicy, MetricsExporter, PluginError, hookimpl, parse_options",
        "from quire.testing import parametrize_with_checks, run_checks",
    ],
)
def test_the_sdk_loads_what_is_used(line, root):
    assert imported_by(line, root) == []


def test_a_heavy_import_is_seen(root):
    assert "tokenizers" in imported_by("import tokenizers", root)
