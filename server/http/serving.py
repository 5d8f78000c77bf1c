"""Run the server: load, announce, answer, drain, stop."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import logging
import socket
import ssl
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import uvicorn

from quire.core.engine.args import EngineArgs
from quire.core.engine.async_llm import AsyncLLM
from quire.core.engine.process import EngineProcess
from quire.core.errors import ConfigError, PluginError
from quire.core.log import setup_logging
from quire.core.version import __version__
from quire.server.http.connection_limits import LimitedHttpProtocol
from quire.server.http.listening import allow_restart
from quire.server.http.settings import ServerSettings
from quire.server.http.signals import StopSignals
from quire.server.http.state import ServerState
from quire.server.http.throughput_log import log_throughput

__all__ = ["drain_requests", "serve"]

log = logging.getLogger(__name__)

_KEEP_ALIVE_S = 75
"""Longer than the 60 s for which nginx keeps an idle connection: the server never closes it under a request."""
_GRACEFUL_SHUTDOWN_S = 2
_CUT_OFF_S = 1
_POLL_S = 0.5
_QUEUED_PER_ROW = 16
"""Requests that may wait for each of the ``--max-num-seqs`` that may run, unless ``--max-num-queued-requests`` says."""


def serve(
    args: EngineArgs,
    settings: ServerSettings,
    process: EngineProcess,
    sockets: Sequence[socket.socket],
    signals: StopSignals,
    arguments: Any = None,
    flag_warnings: Sequence[str] = (),
    ssl_context: ssl.SSLContext | None = None,
) -> int:
    """Serve on ``sockets``, as ``bind_sockets`` made them, with the engine core in ``process``, until SIGTERM or
    SIGINT; returns the exit status: 0, or 1 if the engine died. With ``ssl_context`` the sockets speak TLS.

    Raises QuireError if the server cannot start.
    """
    setup_logging(settings.log_level.upper() if settings.log_level else None)
    if not args.disable_log_requests:
        _route_access_log()
    for warning in flag_warnings:
        log.warning("%s", warning)
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        return runner.run(_serve(args, settings, process, sockets, signals, arguments, ssl_context))


async def _serve(
    args: EngineArgs,
    settings: ServerSettings,
    process: EngineProcess,
    sockets: Sequence[socket.socket],
    signals: StopSignals,
    arguments: Any,
    ssl_context: ssl.SSLContext | None,
) -> int:
    if args.max_num_queued_requests is None:  # a server has many clients, none of which knows of the others
        args = replace(args, max_num_queued_requests=_QUEUED_PER_ROW * max(args.max_num_seqs, 1))
    log_options = {} if settings.log_level is None else {"log_level": settings.log_level.upper()}
    engine = AsyncLLM(args, process=process, **log_options)
    signals.call_before_exit(engine.kill_at_once)  # of the process that it has by then
    log_task: asyncio.Task[None] | None = None
    try:
        from quire.server.http.app import create_app, create_metrics_app  # seconds, while the model is loaded
        from quire.server.http.app_extensions import extend_app

        await engine.start()
        app = create_app(engine, settings, arguments)
        extend_app(app, engine.plugins, engine.add_quarantined)
        state: ServerState = app.state.server
        servers = [_Server(_uvicorn_config(app, args, ssl_context))]
        if settings.prometheus_port is not None:
            servers.append(_Server(_uvicorn_config(create_metrics_app(state), args, ssl_context)))
        gc.collect()
        gc.freeze()
        if not args.disable_log_stats:
            log_task = asyncio.create_task(log_throughput(engine.get_stats))
        return await _run(servers, sockets, state, signals)
    finally:
        if log_task is not None:
            log_task.cancel()
        await engine.shutdown()


async def _run(
    servers: Sequence[_Server], sockets: Sequence[socket.socket], state: ServerState, signals: StopSignals
) -> int:
    running = [asyncio.ensure_future(s.serve(sockets=[each])) for s, each in zip(servers, sockets, strict=True)]
    stop: asyncio.Future[int] | None = None
    try:
        while not all(server.started for server in servers) and not any(task.done() for task in running):
            await asyncio.sleep(0.005)
        signalled = signals.deliver_to_loop()
        stop = asyncio.ensure_future(signalled.get())
        if not any(task.done() for task in running):
            _print_ready(state, sockets)
            state.engine.constraint_checker.start()
        while not stop.done() and not state.engine.is_dead and not any(task.done() for task in running):
            await asyncio.wait({stop, *running}, timeout=_POLL_S, return_when=asyncio.FIRST_COMPLETED)
        if stop.done() and not state.engine.is_dead:
            await drain_requests(state, signalled)
            if state.in_flight:
                await _cut_off_requests(state, servers)
                return 0
    finally:
        if stop is not None:
            stop.cancel()
        for server in servers:
            server.should_exit = True
        results = await asyncio.gather(*running, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    if state.engine.is_dead:
        log.error("the engine hung or died; the server ends")
        return 1
    return 0


async def _cut_off_requests(state: ServerState, servers: Sequence[_Server]) -> None:
    """End every request with an error of its own: the engine fails those that it knows, and those still being read or
    tokenized are cancelled, which ``RequestMiddleware`` answers."""
    log.warning("%d requests are cut off", state.in_flight)
    await state.engine.shutdown(timeout=0)
    for server in servers:
        server.config.timeout_graceful_shutdown = _CUT_OFF_S


async def drain_requests(state: ServerState, signalled: asyncio.Queue[int]) -> None:
    """Let requests in flight finish. A second signal, or the time limit, ends the wait."""
    state.draining = True
    limit = state.settings.shutdown_timeout
    if state.in_flight:
        log.info("draining: %d requests in flight get up to %g s; signal again to stop now", state.in_flight, limit)
    idle = asyncio.ensure_future(state.wait_idle(limit))
    again = asyncio.ensure_future(signalled.get())
    await asyncio.wait({idle, again}, return_when=asyncio.FIRST_COMPLETED)
    idle.cancel()
    again.cancel()


class _Server(uvicorn.Server):
    """Uvicorn without its signal handlers; a failed start raises ``PluginError``."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start listening, once the start-up handlers of plugins have run."""
        for bound in sockets or ():
            allow_restart(bound)
        try:
            await super().startup(sockets)
        except OSError as error:
            raise ConfigError(f"the port cannot be used: {error.strerror or error}; choose another") from None
        except SystemExit:
            raise PluginError("a plugin's start-up handler failed, as the log shows; leave out its --plugin") from None

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Capture none."""
        yield


def _uvicorn_config(app: Any, args: EngineArgs, ssl_context: ssl.SSLContext | None) -> uvicorn.Config:
    config = uvicorn.Config(
        app,
        http=LimitedHttpProtocol,
        ws="none",
        lifespan="auto",
        log_config=None,
        access_log=not args.disable_log_requests,
        timeout_keep_alive=_KEEP_ALIVE_S,
        timeout_graceful_shutdown=_GRACEFUL_SHUTDOWN_S,
        server_header=False,
    )
    config.load()
    config.ssl = ssl_context
    return config


def _print_ready(state: ServerState, sockets: Sequence[socket.socket]) -> None:
    """The ready line, and a request to paste."""
    scheme = "http" if state.settings.ssl_certfile is None else "https"
    shown, local = _format_addresses(scheme, sockets[0])
    print(f"Quire {__version__} ready on {shown} - {state.engine.ready_line}")
    for other in sockets[1:]:
        print(f"Metrics also on {_format_addresses(scheme, other)[0]}/metrics")
    key = " -H 'Authorization: Bearer KEY'" if state.api_keys else ""
    messages = [{"role": "user", "content": "What is paged attention?"}]
    body = json.dumps({"model": state.model_names[0], "messages": messages}).replace("'", "'\\''")
    insecure = "" if scheme == "http" else " -k"  # a certificate hardly names this machine so
    print(f"Try: curl{insecure} {local}/v1/chat/completions{key} -H 'Content-Type: application/json' -d '{body}'")
    sys.stdout.flush()


def _format_addresses(scheme: str, bound: socket.socket) -> tuple[str, str]:
    """The address it listens on, and the address for a client on this machine."""
    host, port = bound.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    local = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]"}.get(shown, shown)
    return f"{scheme}://{shown}:{port}", f"{scheme}://{local}:{port}"


def _route_access_log() -> None:
    """Write uvicorn's line per request to the handlers of Quire's log."""
    access = logging.getLogger("uvicorn.access")
    access.handlers = logging.getLogger("quire").handlers
    access.setLevel(logging.INFO)
    access.propagate = False


def _loop_factory() -> Any:
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop
