"""The pages of the documentation as tests see them, and one server for all that they say to run against it."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, and the page and line where it stands."""

    language: str
    text: str
    where: str


def blocks_of(page: Path) -> list[Block]:
    """Every fenced block of a page."""
    matches = re.finditer(r"^```(\w*)\n(.*?)^```$", page.read_text(), re.M | re.S)
    text = page.read_text()
    return [Block(m[1], m[2], f"{page.name}:{text[: m.start()].count(chr(10)) + 1}") for m in matches]


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture(scope="session")
def pages(root: Path) -> list[Path]:
    """Every page for users."""
    return [*sorted(root.glob("*.md")), *sorted((root / "docs").rglob("*.md"))]


@pytest.fixture(scope="session")
def readme(root: Path) -> list[Block]:
    """The fenced blocks of the README."""
    return blocks_of(root / "README.md")


@pytest.fixture(scope="session")
def all_blocks(pages: list[Path]) -> list[Block]:
    """The fenced blocks of every page that is written by hand."""
    return [block for page in pages if page.parent.name != "reference" for block in blocks_of(page)]


@pytest.fixture(scope="session")
def python_of(all_blocks: list[Block]) -> Callable[[str], str]:
    """``python_of(page)``: all its Python blocks, one after the other, as a module."""

    def joined(page: str) -> str:
        return "\n\n".join(b.text for b in all_blocks if b.language == "python" and b.where.startswith(f"{page}:"))

    return joined


@pytest.fixture(scope="session")
def server(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The server that ``make serve`` starts, on a free port: its address."""
    log = tmp_path_factory.mktemp("server") / "log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            _serve_command(root), cwd=root, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT
        )
    try:
        yield _wait_ready(process, log)
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _serve_command(root: Path) -> list[str]:
    """``make serve`` in this environment, installing nothing; where Quire is not installed, what it would run."""
    if (Path(sys.prefix) / "bin" / "quire").exists():
        return ["make", "-s", "-o", f"{sys.prefix}/.installed", "serve", f"VENV={sys.prefix}", "PORT=0"]
    code = f"import sys; sys.path.insert(0, {str(root / 'src')!r}); from quire.server.cli.main import main; "
    code += "sys.exit(main())"
    return [sys.executable, "-c", code, "serve", "quire-tiny", "--host", "127.0.0.1", "--port", "0"]


def _wait_ready(process: subprocess.Popen[bytes], log: Path) -> str:
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and process.poll() is None:
        ready = re.search(r" ready on (http://\S+)", log.read_text())
        if ready:
            return ready[1]
        time.sleep(0.05)
    raise AssertionError(f"the server is not ready\n{log.read_text()}")
