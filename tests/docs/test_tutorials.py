"""The commands of ``docs/tutorials`` run as they stand, in order, and print what the pages show.

A ``text`` block is what the ``sh`` block before it prints: every line of it has to come, whatever its numbers. All
pages share one server, which has the flags of every ``quire serve`` in them.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pytest
import yaml
from tests.docs.conftest import ROOT, Block, blocks_of

from quire.server.cli.main import main, make_parsers

FOLDER = ROOT / "docs" / "tutorials"
IN_PROCESS = ("simulate", "ab", "plugins", "policy", "explain")
"""Commands that run in this process, which has imported already what they need."""
PAGES = ("third-party-plugin.md", "ab-test-schedulers.md", "write-a-policy.md", "production.md")
"""The first one installs what the server is started with; a page that is run alone has it installed."""
SERVE_FLAGS = shlex.split("""
    --scheduling-policy take_turns --scheduling-policy-option burst=4 --plugin quire-status-board --metrics board
    --record day.jsonl.zst --admin-api-key ADMIN --api-key KEY --named-api-key team-a=KEY-A --max-model-len 2048
    --served-model-name quire-tiny assistant --max-num-queued-requests 512 --shutdown-timeout 60
    --no-disable-log-requests
""")
SHORTER = {
    "--num-prompts 500": "--num-prompts 32",
    "requests=6000": "requests=120",
    "--arrivals poisson:rate=8": "--arrivals uniform:rate=40",
    "--block 30 --washout 5": "--block 0.12 --washout 0.01",
}
"""What takes minutes in a tutorial takes seconds here."""


class Workshop:
    """A folder with a virtual environment of its own, in which the shell finds ``quire`` and ``pip``; one server."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        shutil.copytree(ROOT / "examples" / "plugins", folder / "examples" / "plugins")
        venv, tools = folder / "venv", folder / "bin"
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True, timeout=60)
        self.python = venv / "bin" / "python"
        self.site = sysconfig.get_path("purelib", vars={"base": str(venv), "platbase": str(venv)})
        here = (ROOT / "src", sysconfig.get_path("purelib"), sysconfig.get_path("platlib"))
        Path(self.site, "all.pth").write_text("\n".join(map(str, here)) + "\n")
        tools.mkdir()
        flags = "--no-deps --no-build-isolation --no-index --disable-pip-version-check"
        self.write_tool("quire", f'exec {self.python} -m quire "$@"')
        self.write_tool(
            "pip",
            f'command=$1; shift\n[ $command = install ] && set -- {flags} "$@"\n'
            f'exec {sys.executable} -m pip --python {self.python} $command "$@"',
        )
        self.url = ""
        self.server: subprocess.Popen[bytes] | None = None
        self.log = folder / "log"

    def write_tool(self, name: str, script: str) -> None:
        path = self.folder / "bin" / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)

    def start_server(self) -> None:
        """Started by the first page that serves; the others find it running."""
        if self.server is not None:
            return
        if not list(Path(self.site).glob("quire_take_turns*")):
            packages = [f"./examples/plugins/{name}" for name in ("take-turns", "status-board")]
            command = [self.folder / "bin" / "pip", "install", "-q", *packages]
            subprocess.run(command, cwd=self.folder, check=True, timeout=120)
        with self.log.open("wb") as log:
            command = [self.python, "-m", "quire", "serve", "quire-tiny", "--port", "0", *SERVE_FLAGS]
            self.server = subprocess.Popen(
                command, cwd=self.folder, env=self.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        deadline = time.monotonic() + 90
        while not (ready := re.search(r" ready on (http://\S+)", self.log.read_text())):
            assert time.monotonic() < deadline and self.server.poll() is None, self.log.read_text()
            time.sleep(0.05)
        self.url = ready[1]

    @property
    def environment(self) -> dict[str, str]:
        path = f"{self.folder / 'bin'}:{os.environ['PATH']}"
        return {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "PYTHONPATH": ".", "PYTHONDONTWRITEBYTECODE": "1"}

    def run(self, line: str, capsys: pytest.CaptureFixture[str]) -> str:
        """What one command prints."""
        line = self.adapt(line)
        words = shlex.split(line, comments=True)
        if words[:2] == ["quire", "serve"] and not line.endswith("# refused"):
            check_serve(words)
            self.start_server()
            return self.log.read_text()
        expected = 2 if line.endswith("# refused") else 0
        if words[0] == "quire" and words[1] in IN_PROCESS:
            capsys.readouterr()
            status = main(words[1:])
            printed = "\n".join(capsys.readouterr())
            assert status == expected, f"{line}\n{printed}"
            return printed
        result = subprocess.run(
            ["bash", "-c", line], cwd=self.folder, env=self.environment, timeout=120, text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        assert result.returncode == expected, f"{line}\n{result.stdout}"
        return result.stdout

    def adapt(self, line: str) -> str:
        """The command for the server that runs, in less time, and with the key that it asks for."""
        for long, short in SHORTER.items():
            line = line.replace(long, short)
        line, mark, comment = line.partition("  #")
        words = line.split()
        if words[:3] == ["quire", "bench", "serve"]:
            line += f" --base-url {self.url} --api-key KEY"
        elif words[:2] == ["quire", "ab"] and "--url" in words:
            line += " --api-key KEY"
        elif words[:2] in (["quire", "policy"], ["quire", "explain"], ["quire", "trace"]):
            line += f" --url {self.url}"
        return re.sub(r"http://127\.0\.0\.1:800[01]", self.url, line) + mark + comment


def check_serve(words: list[str]) -> None:
    """The shared server has the flags of this page's: those that change what the page shows."""
    parser, _ = make_parsers()
    assert parser.parse_known_args(words[1:])[1] == []
    kinds = {"--scheduling-policy", "--plugin", "--metrics", "--record", "--admin-api-key", "--api-key"}
    assert {word for word in words if word in kinds} <= set(SERVE_FLAGS)


def commands(block: Block) -> list[str]:
    """The lines of a shell block, joined where one is continued."""
    return [line for line in block.text.replace("\\\n", "").splitlines() if line and not line.startswith("#")]


def normalized(text: str) -> str:
    """Without what differs from run to run: numbers, folders, identifiers; blanks are one blank."""
    text = re.sub(r"(?<![\w.])(?:/[\w.+-]+)+/", "", text)
    text = re.sub(r"\b(cmpl|mine-1|order-17)-[\w-]+", r"\1-N", text)
    text = text.replace("switched once", "switched 1 times")  # more often where a page before has switched
    return re.sub(r"\s+", " ", re.sub(r"[-+]?\d[\d,.:]*", "N", text)).strip()


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    workshop = Workshop(tmp_path_factory.mktemp("workshop"))
    yield workshop
    if workshop.server is not None and workshop.server.poll() is None:
        workshop.server.terminate()
        assert workshop.server.wait(30) == 0, "it was not drained"


def run_page(name: str, workshop: Workshop, capsys: pytest.CaptureFixture[str]) -> None:
    blocks = blocks_of(FOLDER / name)
    assert sum(block.language == "sh" for block in blocks) >= 4
    printed = ""
    for block in blocks:
        if block.language == "python":
            first, _, source = block.text.partition("\n")
            (workshop.folder / first.removeprefix("# ")).write_text(source)
        elif block.language == "sh":
            printed = "\n".join(workshop.run(line, capsys) for line in commands(block))
        elif block.language == "text" and not block.text.startswith("# not run"):
            found = normalized(printed)
            missing = [line for line in block.text.splitlines() if line != "..." and normalized(line) not in found]
            assert not missing, f"{block.where}: {missing} not in what was printed:\n{printed}"
        elif block.language == "yaml":
            assert "quire" in yaml.safe_load(block.text)["containers"][0]["command"]
        else:
            assert block.language == "text", block.where


@pytest.mark.parametrize("name", PAGES)
def test_every_command_of_the_page_prints_what_it_shows(name, workshop, capsys, monkeypatch):
    monkeypatch.chdir(workshop.folder)
    # The recording names the class with which the server was started, which a page has removed since.
    for folder in (ROOT / "examples" / "plugins" / "take-turns", workshop.folder, workshop.site):
        monkeypatch.syspath_prepend(folder)
    key = "" if name == "production.md" else '-H "Authorization: Bearer KEY"'
    workshop.write_tool("curl", f'exec /usr/bin/curl {key} "$@"')
    run_page(name, workshop, capsys)


def test_every_page_is_run_and_is_short():
    assert sorted(PAGES) == sorted(path.name for path in FOLDER.glob("*.md"))
    for path in FOLDER.glob("*.md"):
        assert len(path.read_text().splitlines()) <= 130, path.name
