"""docs/coming-from-vllm.md says what the tables in the code say, and names only what is there."""

from __future__ import annotations

import importlib.util
import re

import pytest

import quire
from quire.core.engine.vllm_flag_table import ABSENT_FLAGS, VLLM_FLAGS
from quire.core.engine.vllm_names import VLLM_COMMANDS, VLLM_VARIABLES
from quire.core.stats import ENGINE_STATS
from quire.server.cli.main import COMMANDS


@pytest.fixture(scope="module")
def page(root) -> str:
    return (root / "docs" / "coming-from-vllm.md").read_text()


def test_every_flag_and_variable_has_its_row(page):
    rows = [f"| `{name}` | {fate} |" for name, (_, fate) in VLLM_VARIABLES.items()]
    rows += [f"| `vllm {name}` | {fate} |" for name, fate in VLLM_COMMANDS.items()]
    assert not [row for row in rows if row not in page]


def group_flags(fates) -> list[str]:
    """A row for each fate, with all the flags that it befell."""
    flags_by_fate: dict[str, list[str]] = {}
    for flag, fate in fates:
        flags_by_fate.setdefault(fate, []).append(flag)
    return [f"| {', '.join(flags)} | {fate} |" for fate, flags in flags_by_fate.items()]


def read_rows(section: str) -> list[str]:
    return [line for line in section.splitlines() if line.startswith("| `")]


def test_every_flag_that_is_accepted_has_its_place(root):
    rows = group_flags((f"`{flag.name}`", flag.message) for flag in VLLM_FLAGS if not flag.refused)
    section = (root / "docs" / "cli.md").read_text().partition("### vLLM's flags")[2].partition("###")[0]
    assert read_rows(section) == rows


def test_every_flag_that_is_refused_has_its_place(page):
    fates = []
    for flag in VLLM_FLAGS:
        if flag.refused:
            accepted = " or ".join(f"`{value}`" for value in flag.accepted_values)
            fates.append((f"`{flag.name}` other than {accepted}", flag.message))
    fates += [(f"`{name}`", fate) for name, fate in ABSENT_FLAGS.items()]
    assert read_rows(page.partition("## Flags")[2].partition("## ")[0]) == group_flags(fates)


def test_commands_are_there(page):
    assert set(re.findall(r"`quire (\w+)", page)) <= set(COMMANDS)
    modules = re.findall(r"python -m (quire[\w.]+)", page)
    assert modules and all(importlib.util.find_spec(name) for name in modules)


def test_metrics_are_exported(page, root):
    exporter = "".join(file.read_text() for file in (root / "plugins" / "metrics").glob("*.py"))
    names = {name.removesuffix("_total") for name in re.findall(r"`vllm:(\w+)`", page)}
    known = {name.removesuffix("_total") for name in ENGINE_STATS}
    assert len(names) > 10
    assert not [name for name in sorted(names) if name not in known and name not in exporter]


def test_python_names_can_be_imported(page):
    section = page.partition("## Python")[2]
    names = set(re.findall(r"importable as `(\w+)`", section)) | {"LLM", "SamplingParams", "AsyncLLM", "EngineArgs"}
    assert len(names) == 10 and all(getattr(quire, name) for name in names)
    methods = re.findall(r"`LLM\.(\w+)`", section)
    assert methods and all(callable(getattr(quire.LLM, name)) for name in methods)


def test_the_python_of_the_page_runs(python_of, capsys):
    exec(compile(python_of("coming-from-vllm.md"), "coming-from-vllm.md", "exec"), {})
    lines = capsys.readouterr().out.splitlines()
    assert sorted(line.partition(" -> ")[0] for line in lines) == ["Paged attention is", "def add(a, b):"]
