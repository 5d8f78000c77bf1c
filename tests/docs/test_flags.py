"""Every flag that a page, a docstring, a comment or an error text names is there."""

from __future__ import annotations

import argparse
import re

import pytest

from quire.core.engine.vllm_flag_table import ABSENT_FLAGS, VLLM_FLAGS
from quire.server.cli.main import make_parsers

FLAG = re.compile(r"(?<![\w/-])--(?>[a-z][a-z0-9]*(?:[-_][a-z0-9]+)*)(?![-{])")
"""A flag, but not the beginning of one that is put together, such as ``--no-...`` or ``--{kind}-option``."""
DECLARED = re.compile(r"""add_argument\(\s*["'](--[\w-]+)""")
OTHER_PROGRAMS = {
    *(
        "--address",
        "--branch",
        "--depth",
        "--dump-resource-usage",
        "--extra-index-url",
        "--format",
        "--head",
        "--ipc",
        "--no-build-isolation",
        "--node-ip-address",
        "--num-cpus",
        "--query-gpu",
        "--upgrade",
        "--shm-size",
    ),
}
"""Flags of git, pip, nvidia-smi, cuobjdump, docker and ray."""
PLACEHOLDERS = {"--flag", "--flag-with-underscores", "--no-flag", "--some-flag"}
"""What texts write for any flag."""


def flags_of(parser: argparse.ArgumentParser) -> set[str]:
    """The flags of a parser and of every command below it, those that are not shown included."""
    flags: set[str] = set()
    for action in parser._actions:
        flags.update(action.option_strings)
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                flags |= flags_of(command)
    return flags


@pytest.fixture(scope="module")
def known(root) -> set[str]:
    """The flags of ``quire``, of vLLM as far as they are understood, and of the scripts in this repository."""
    parser, _ = make_parsers()
    scripts = [file for folder in ("tools", "benchmarks", "examples") for file in (root / folder).rglob("*.py")]
    declared = {flag for script in scripts for flag in DECLARED.findall(script.read_text())}
    return flags_of(parser) | {flag.name for flag in VLLM_FLAGS} | set(ABSENT_FLAGS) | declared


def unknown_flags(text: str, known: set[str]) -> list[str]:
    names = {name.replace("_", "-") for name in FLAG.findall(text)}
    return sorted(names - known - OTHER_PROGRAMS - PLACEHOLDERS)


def test_every_flag_in_a_page_exists(pages, known, root):
    others = [*(root / "benchmarks").glob("*.md"), *(root / "examples").rglob("*.md")]
    unknown = {page.name: flags for page in (*pages, *others) if (flags := unknown_flags(page.read_text(), known))}
    assert not unknown


def test_every_flag_in_the_source_exists(known, root):
    """In docstrings, comments, help and error texts."""
    files = [file for folder in ("core", "plugins", "server", "examples") for file in (root / folder).rglob("*.py")]
    assert len(files) > 200
    unknown = {
        str(file.relative_to(root)): flags for file in files if (flags := unknown_flags(file.read_text(), known))
    }
    assert not unknown


@pytest.mark.parametrize("text", ["`--policy-option a=1`", "raise it with --max_modl_len", "--model-architecture"])
def test_a_flag_that_does_not_exist_is_seen(text, known):
    assert len(unknown_flags(text, known)) == 1


@pytest.mark.parametrize(
    "text", ["`--sampler-option`", "--max_model_len=3", "--no-{name}", "turned off with `--no-...`"]
)
def test_other_texts_pass(text, known):
    assert unknown_flags(text, known) == []
