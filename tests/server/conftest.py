"""Real servers, started by the command line on free loopback ports, over a tiny random model."""

from __future__ import annotations

import contextlib
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import pytest

from quire.core.env import child_environment
from quire.core.testing.tiny_models import make_tiny_model

if TYPE_CHECKING:
    import openai


@dataclass
class RunningServer:
    process: subprocess.Popen[str]
    url: str
    stdout: Path
    stderr: Path

    @property
    def openai(self) -> openai.OpenAI:
        import openai

        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=60)

    @property
    def http(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=60)

    def load(self) -> dict[str, float]:
        with self.http as client:
            return client.get("/load").json()

    def metric(self, name: str) -> float:
        with self.http as client:
            text = client.get("/metrics").text
        [value] = re.findall(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)
        return float(value)

    def stop(self) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                self.process.kill()
        return self.process.wait(5)


def start_server(folder: Path, *arguments: str) -> RunningServer:
    folder.mkdir(parents=True, exist_ok=True)
    out, err = folder / "stdout", folder / "stderr"
    command = [sys.executable, "-m", "quire", "serve", *arguments, "--port", "0"]
    with out.open("w") as stdout, err.open("w") as stderr:
        process = subprocess.Popen(command, stdout=stdout, stderr=stderr, text=True, env=child_environment())
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        if match := re.search(r"ready on (https?://\S+)", out.read_text()):
            return RunningServer(process, match.group(1), out, err)
        if process.poll() is not None:
            break
        time.sleep(0.05)
    process.kill()
    raise RuntimeError(f"the server did not start (exit status {process.wait()}):\n{err.read_text()}")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_tiny_model("llama", tmp_path_factory.mktemp("model") / "tiny", max_position_embeddings=2048))


@pytest.fixture(scope="session")
def server(tiny_model: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """The server of most tests: the model ``tiny``, a context of 2,048 tokens."""
    running = start_server(tmp_path_factory.mktemp("server"), tiny_model, "--served-model-name", "tiny", "also-tiny")
    yield running
    assert running.process.poll() is None, f"the server died:\n{running.stderr.read_text()[-4000:]}"
    running.stop()


@pytest.fixture(scope="session")
def thinking_server(tiny_model: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """The same model, with a template that shows nothing of tools and opens the reasoning, and parsers by flag."""
    template = "{% for m in messages %}{{ m.content }}{% endfor %}{{ '<think>' }}"
    flags = ("--tool-call-parser", "hermes", "--reasoning-parser", "qwen3", "--enable-auto-tool-choice")
    names = ("--served-model-name", "tiny", "--chat-template", template)
    running = start_server(tmp_path_factory.mktemp("thinking"), tiny_model, *names, *flags)
    yield running
    running.stop()


@pytest.fixture
def start(tiny_model: str, tmp_path: Path) -> Iterator[Callable[..., RunningServer]]:
    """Start one more server, over the same model, with other flags."""
    running: list[RunningServer] = []

    def begin(*arguments: str) -> RunningServer:
        running.append(start_server(tmp_path / str(len(running)), tiny_model, *arguments))
        return running[-1]

    yield begin
    for each in running:
        each.stop()


def until(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    """Wait for ``condition``, or fail."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


def child_processes(pid: int) -> list[int]:
    """Child processes that run Python code of ours, without the resource tracker and what compiles constraints."""
    children = []
    before_exec = Path(f"/proc/{pid}/cmdline").read_text()
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended meanwhile
            command = Path(f"/proc/{child}/cmdline").read_text()  # empty while one begins, and when it has ended
            if command not in ("", before_exec) and not re.search("resource_tracker|compile_worker", command):
                children.append(int(child))
    return children


def has_ended(pid: int) -> bool:
    """Whether there is no such process, or only its exit status is left."""
    stat = Path(f"/proc/{pid}/stat")
    try:
        return " Z " in stat.read_text()
    except (FileNotFoundError, ProcessLookupError):
        return True


def check_error(response: httpx.Response, status: int, param: str | None = None) -> str:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"] and "\n" not in error["message"]
    if param is not None:
        assert error["param"] == param, error
    return str(error["message"])
