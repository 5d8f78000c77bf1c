"""A distribution named by ``--plugin`` adds a flag, a command, a route and middleware; unnamed, it changes nothing."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from quire.server.cli import main as cli
from quire.server.cli import serve
from quire.server.cli.flags import make_engine_args
from quire.server.cli.main import main

from ..conftest import start_server

PLUGIN = """
import quire

@quire.hookimpl
def quire_add_arguments(parser):
    parser.add_argument("--greeting", default="hello")

@quire.hookimpl
def quire_register_commands(subparsers):
    subparsers.add_parser("greet", help="say hello").set_defaults(run=lambda args: print("hello") or 0)

@quire.hookimpl
def quire_configure(config):
    print("configured", config.scheduler.max_num_seqs)

@quire.hookimpl
def quire_unconfigure():
    print("released")

@quire.hookimpl
def quire_extend_app(app):
    @app.get("/greeting")
    async def greeting():
        return {"greeting": app.state.server.arguments.greeting}

    @app.middleware("http")
    async def mark(request, call_next):
        response = await call_next(request)
        response.headers["X-Greeted"] = "yes"
        return response
"""


@pytest.fixture
def greeting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    info = tmp_path / "site" / "quire_greeting-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: quire-greeting\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[quire.v1]\ngreeting = quire_greeting\n")
    (tmp_path / "site" / "quire_greeting.py").write_text(PLUGIN)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    return "quire-greeting"


def test_the_engines_life(greeting: str, tiny_model: str, tmp_path: Path) -> None:
    script = """if True:
        from quire.core.engine.args import EngineArgs
        from quire.core.engine.config_builder import build_config
        for plugins in ((), ("quire-greeting",)):
            build_config(EngineArgs(model=MODEL, plugins=plugins, device="cpu", max_num_seqs=7))
        print("serving")
    """
    env = {**os.environ, "PYTHONPATH": os.pathsep.join((str(tmp_path / "site"), *filter(None, sys.path)))}
    command = [sys.executable, "-c", f"MODEL = {tiny_model!r}\n{script}"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.stdout.split("\n") == ["configured 7", "serving", "released", ""], done.stderr


def test_a_command(greeting: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--plugin", greeting, "greet"]) == 0
    assert capsys.readouterr().out == "hello\n"
    with pytest.raises(SystemExit):
        main(["greet"])


def test_before_the_command_or_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    parsed: list[argparse.Namespace] = []
    monkeypatch.setattr(cli, "call_argument_hooks", lambda words, subparsers: None)
    monkeypatch.setattr(serve, "run", lambda args: parsed.append(args) or 0)
    assert main(["--plugin", "a", "serve", "--plugin", "b"]) == 0
    assert make_engine_args(parsed[0]).plugins == ["a", "b"]


def test_a_flag_a_route_and_middleware(greeting: str, tiny_model: str, tmp_path: Path) -> None:
    server = start_server(tmp_path / "log", tiny_model, "--plugin", greeting, "--greeting", "moin")
    try:
        with httpx.Client(base_url=server.url) as client:
            answer = client.get("/greeting")
            assert answer.json() == {"greeting": "moin"} and answer.headers["x-greeted"] == "yes"
            body = {"prompt": "x", "max_tokens": 3, "ignore_eos": True, "stream": True}
            streamed = client.post("/v1/completions", json=body)
            assert streamed.headers["x-greeted"] == "yes" and streamed.text.endswith("data: [DONE]\n\n")
    finally:
        assert server.stop() == 0
