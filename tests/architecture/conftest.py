"""The source tree as the rules see it: every Python file, parsed once."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("core", "plugins", "server")
BESIDE = ("src", "tests", "tools", "benchmarks", "examples")
_LINKS = tuple(f"src/quire/{folder}/" for folder in FOLDERS)


@dataclass(frozen=True)
class Source:
    """One Python file. ``path`` is relative to the repository, with slashes."""

    path: str
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        """Its syntax tree."""
        return ast.parse(self.text, self.path)

    @cached_property
    def folder(self) -> str:
        """The top-level folder it lives in."""
        return self.path.split("/")[0]

    @cached_property
    def module(self) -> str:
        """Its import name: ``core/sched/waiting_queue.py`` is ``quire.core.sched.waiting_queue``."""
        parts = self.path.removesuffix(".py").removesuffix("/__init__").split("/")
        return ".".join(parts[1:] if parts[0] == "src" else ["quire", *parts])

    @property
    def lines(self) -> int:
        """How many lines it has."""
        return len(self.text.splitlines())

    def at(self, node: ast.AST, message: str) -> str:
        """A violation, as an editor can jump to it."""
        return f"{self.path}:{getattr(node, 'lineno', 1)}: {message}"

    def imports(self) -> list[tuple[ast.AST, str]]:
        """Every absolute name it imports, ``from a import b`` as ``a.b``, wherever in the file the import stands."""
        found: list[tuple[ast.AST, str]] = []
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                found += [(node, alias.name) for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                base = self._base(node)
                found += [(node, f"{base}.{alias.name}") for alias in node.names]
        return found

    def _base(self, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        package = self.module if self.path.endswith("__init__.py") else self.module.rpartition(".")[0]
        above = package.split(".")[: len(package.split(".")) - node.level + 1]
        return ".".join([*above, *([node.module] if node.module else [])])


def _read(folders: tuple[str, ...]) -> list[Source]:
    found = []
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*.py")):
            name = path.relative_to(ROOT).as_posix()
            if not name.startswith(_LINKS) and not any(part.startswith(".") for part in name.split("/")):
                found.append(Source(name, path.read_text(encoding="utf-8")))
    return found


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture(scope="session")
def product() -> list[Source]:
    """What users install: core, plugins and server, assets excepted."""
    return [source for source in _read(FOLDERS) if not source.path.startswith("core/assets/")]


@pytest.fixture(scope="session")
def everything(product: list[Source]) -> list[Source]:
    """The product, its public face, and all that stands beside it. The links in ``src/quire`` are not followed."""
    return product + _read(BESIDE)


@pytest.fixture(scope="session")
def source() -> type[Source]:
    """Makes a file from text, to show that a rule catches what it must."""
    return Source
