"""A distribution named by ``--plugin`` adds a flag, a command, a route and middleware; unnamed, it changes nothing."""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import httpx
import pytest
from fastapi import APIRouter, FastAPI, HTTPException, Request, Response
from fastapi.responses import StreamingResponse
from fastapi.testclient import TestClient
from starlette.types import ASGIApp, Receive, Scope, Send

from quire.core.engine.watchdog import PluginWatchdog
from quire.core.errors import PluginError
from quire.core.plugin.manager import PluginManager
from quire.core.stats import QuarantinedPlugin
from quire.server.cli import main as cli
from quire.server.cli import serve
from quire.server.cli.flags import make_engine_args
from quire.server.cli.main import main
from quire.server.http.app_extensions import extend_app
from quire.server.http.errors import add_error_handlers

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


def spin() -> None:
    while True:
        time.sleep(0.01)


def make_app(extend: Callable[[FastAPI], None], told: list[QuarantinedPlugin]) -> FastAPI:
    """An application that a plugin extends, whose event loop is watched from the first request for ``/ours`` on."""

    def iter_hook(hook: str, app: FastAPI) -> Iterator[str]:
        extend(app)
        yield "quire-held-up"

    app = FastAPI()
    app.state.watchdog = None

    @app.get("/ours")
    async def ours() -> str:
        app.state.watchdog = app.state.watchdog or PluginWatchdog(0.6)  # in the thread of the event loop
        return "ours"

    @app.get("/slow")
    async def slow() -> str:
        time.sleep(1.3)
        return "slow"

    add_error_handlers(app)
    extend_app(app, cast(PluginManager, SimpleNamespace(iter_hook=iter_hook)), told.append)
    return app


def test_a_route_that_holds_up_the_server_is_switched_off(caplog: pytest.LogCaptureFixture) -> None:
    """It is named, others are served, and what a route raises is an answer like any other."""
    told: list[QuarantinedPlugin] = []

    def extend(app: FastAPI) -> None:
        router = APIRouter()

        @app.get("/spins")
        @router.get("/spins")
        async def spins() -> None:
            await asyncio.sleep(0)
            spin()

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

        @router.get("/waits")
        def waits() -> str:
            time.sleep(0.5)
            return "done"

        app.include_router(router, prefix="/router")

    app = make_app(extend, told)
    with TestClient(app) as http:
        try:
            assert http.get("/ours").json() == "ours" and http.get("/streams").text == "onetwo"
            assert http.get("/refuses").status_code == 418 and http.get("/refuses").status_code == 418
            for path in ("/spins", "/spins", "/router/spins"):
                answer = http.get(path)
                assert answer.status_code == 503 and "/spins is switched off" in answer.json()["error"]["message"]
            assert {each.kind for each in told} == {"route"} and {each.reason for each in told} == {"hung"}
            assert [each.name.startswith("quire-held-up/") for each in told] == [True, True]
            assert http.get("/ours").json() == "ours" and http.get("/router/waits").json() == "done"
        finally:
            app.state.watchdog.stop()
    assert "route/quire-held-up/spins is switched off (hung)" in caplog.text


@pytest.mark.parametrize("on_failure", ["fail", "skip"])
def test_middleware_that_holds_up_the_server_is_switched_off(on_failure: str, caplog: pytest.LogCaptureFixture) -> None:
    """The time of what it calls is not its own, what it raises is not shown, and no request passes one that fails
    unless it may be left out."""
    told: list[QuarantinedPlugin] = []

    class Plain:
        def __init__(self, app: ASGIApp, wish: str) -> None:
            self.app, self.wish = app, wish

        async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
            if scope.get("query_string") == b"spins":
                spin()
            await self.app(scope, receive, send)

    Plain.on_failure = on_failure

    def extend(app: FastAPI) -> None:
        app.add_middleware(Plain, wish="none")

        @app.middleware("http")
        async def mark(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
            if request.url.query == "raises":
                raise ValueError("a secret")
            response = await call_next(request)
            response.headers["X-Marked"] = "yes"
            return response

    app = make_app(extend, told)
    with TestClient(app) as http:
        try:
            assert http.get("/ours").headers["x-marked"] == "yes" and http.get("/slow").json() == "slow"
            failed = http.get("/ours?raises")
            assert (
                failed.status_code == 500
                and "secret" not in failed.text
                and "middleware/quire-held-up/mark failed" in caplog.text
            )
            assert not told
            answer = http.get("/ours?spins")
            assert answer.status_code == 503 and answer.headers["x-marked"] == "yes"
            assert "middleware/quire-held-up/Plain is switched off" in answer.json()["error"]["message"]
            assert told == [QuarantinedPlugin("middleware", "quire-held-up/Plain", "hung")]
            assert http.get("/ours").status_code == (503 if on_failure == "fail" else 200)
        finally:
            app.state.watchdog.stop()


@pytest.mark.parametrize("passes_on", [True, False])
def test_a_request_that_is_cancelled_switches_nothing_off(passes_on: bool) -> None:
    """Neither the middleware around it nor the route, whether the task ends by it or the middleware answers."""
    told: list[QuarantinedPlugin] = []

    class Limited:
        def __init__(self, app: ASGIApp) -> None:
            self.app = app

        async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
            if passes_on or scope["type"] != "http":
                return await self.app(scope, receive, send)
            try:
                async with asyncio.timeout(0.05):
                    await self.app(scope, receive, send)
            except TimeoutError:
                await Response("too late", 504)(scope, receive, send)

    def extend(app: FastAPI) -> None:
        app.add_middleware(type("Inner", (Limited,), {}))
        app.add_middleware(Limited)

        @app.get("/waits")
        async def waits(seconds: float) -> str:
            await asyncio.sleep(seconds)
            return "done"

    async def serve_two() -> None:
        transport = httpx.ASGITransport(make_app(extend, told))
        async with httpx.AsyncClient(transport=transport, base_url="http://quire") as http:
            task = asyncio.ensure_future(http.get("/waits?seconds=30"))
            if passes_on:
                await asyncio.sleep(0.1)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
            else:
                assert (await task).status_code == 504
            assert (await http.get("/waits?seconds=0")).json() == "done"

    asyncio.run(serve_two())
    assert not told


def test_routes_and_middleware_that_exit_do_not_end_the_server(caplog: pytest.LogCaptureFixture) -> None:
    told: list[QuarantinedPlugin] = []

    def extend(app: FastAPI) -> None:
        @app.get("/exits")
        async def exits() -> None:
            await asyncio.sleep(0)
            sys.exit(3)

        @app.middleware("http")
        async def leave(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
            if request.url.query == "leave":
                sys.exit(4)
            return await call_next(request)

    app = make_app(extend, told)
    with TestClient(app) as http:
        try:
            assert [http.get(path).status_code for path in ("/exits", "/ours", "/ours?leave")] == [503, 200, 503]
        finally:
            app.state.watchdog.stop()
    assert [each.kind for each in told] == ["route", "middleware"]
    assert "middleware/quire-held-up/leave is switched off (raised)" in caplog.text


def test_middleware_that_exits_when_constructed_is_refused_by_its_name() -> None:
    with pytest.raises(PluginError, match=r"^quire-held-up/Leaves: the middleware .*: it called sys.exit\(5\)"):
        make_app(lambda app: app.add_middleware(type("Leaves", (), {"__init__": lambda self, app: sys.exit(5)})), [])


def test_middleware_that_cannot_be_constructed_is_refused_by_its_name() -> None:
    with pytest.raises(PluginError, match=r"^quire-held-up/Needy: the middleware cannot be constructed: .*'wish'"):
        make_app(lambda app: app.add_middleware(type("Needy", (), {"__init__": lambda self, app, wish: None})), [])


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
