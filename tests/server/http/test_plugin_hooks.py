"""A distribution named by ``--plugin`` adds a flag, a command, a route and middleware; unnamed, it changes nothing."""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import httpx
import pytest
from fastapi import FastAPI, HTTPException
from fastapi.responses import StreamingResponse
from fastapi.testclient import TestClient

from quire.core.engine.watchdog import PluginWatchdog
from quire.core.plugin.manager import PluginManager
from quire.core.stats import QuarantinedPlugin
from quire.server.cli import main as cli
from quire.server.cli import serve
from quire.server.cli.flags import make_engine_args
from quire.server.cli.main import main
from quire.server.http.errors import add_error_handlers
from quire.server.http.plugin_routes import add_plugin_routes

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


def test_what_does_not_end_or_fails_at_the_end_is_named(
    greeting: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name, body in (
        ("hangs", "while True: time.sleep(0.01)"),
        ("exits", "raise SystemExit(3)"),
        ("ends", "ended()"),
    ):
        info = tmp_path / "site" / f"quire_{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: quire-{name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[quire.v1]\n{name} = quire_{name}\n")
        hook = f"@quire.hookimpl\ndef quire_unconfigure():\n    {body}\n"
        begins = "import sys, time\nimport quire\n\n\ndef ended():\n    sys.ended.append(1)\n\n\n"
        (tmp_path / "site" / f"quire_{name}.py").write_text(begins + hook)
    sys.ended = []  # type: ignore[attr-defined]
    plugins = PluginManager(["quire-ends", "quire-exits", "quire-hangs"])
    begin = time.monotonic()
    plugins.unconfigure_plugins(limit_s=0.3)
    assert 0.2 < time.monotonic() - begin < 5 and sys.ended == [1]  # type: ignore[attr-defined]
    assert "quire-hangs: quire_unconfigure did not return in 0.3 s" in caplog.text
    assert "quire-exits: quire_unconfigure failed: it called sys.exit(3)" in caplog.text
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_a_route_that_holds_up_the_server_is_switched_off(caplog: pytest.LogCaptureFixture) -> None:
    """It is named, others are served, and what a route raises is an answer like any other."""
    told: list[QuarantinedPlugin] = []

    def extend(hook: str, app: FastAPI) -> Iterator[str]:
        @app.get("/spins")
        async def spins() -> None:
            await asyncio.sleep(0)
            while True:
                time.sleep(0.01)

        @app.get("/refuses")
        async def refuses() -> None:
            await asyncio.sleep(0)
            raise HTTPException(418, "a teapot")

        @app.get("/streams")
        async def streams() -> StreamingResponse:
            async def iterate() -> AsyncIterator[str]:
                for word in ("one", "two"):
                    await asyncio.sleep(0.01)
                    yield word

            return StreamingResponse(iterate())

        @app.get("/waits")
        def waits() -> str:
            time.sleep(0.5)
            return "done"

        yield "quire-held-up"

    app = FastAPI()
    app.state.watchdog = None

    @app.get("/ours")
    async def ours() -> str:
        app.state.watchdog = app.state.watchdog or PluginWatchdog(0.6)  # in the thread of the event loop
        return "ours"

    add_error_handlers(app)
    add_plugin_routes(app, cast(PluginManager, SimpleNamespace(iter_hook=extend)), told.append)
    with TestClient(app) as http:
        try:
            assert http.get("/ours").json() == "ours" and http.get("/streams").text == "onetwo"
            assert http.get("/refuses").status_code == 418 and http.get("/refuses").status_code == 418
            for _ in range(2):
                answer = http.get("/spins")
                assert (
                    answer.status_code == 503
                    and "quire-held-up/spins is switched off" in answer.json()["error"]["message"]
                )
                assert told == [QuarantinedPlugin("route", "quire-held-up/spins", "hung")]
            assert http.get("/ours").json() == "ours" and http.get("/waits").json() == "done"
        finally:
            app.state.watchdog.stop()
    assert "route/quire-held-up/spins is switched off (hung)" in caplog.text


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
