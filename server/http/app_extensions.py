"""What plugins add to the application, routes and middleware: none of it can hold up the other requests for long."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Generator, Sequence
from typing import Any

from fastapi import FastAPI
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from quire.core.errors import PluginError
from quire.core.plugin.discovery import format_error
from quire.core.plugin.manager import PluginManager
from quire.core.plugin.quarantine import CANCELLATIONS, NEVER_CONTAINED, Quarantine, run_outside_of_plugin
from quire.core.stats import QuarantinedPlugin
from quire.server.http.errors import UnavailableError, make_error_response

__all__ = ["extend_app"]

_log = logging.getLogger(__name__)
_OnFault = Callable[[QuarantinedPlugin], None]


def extend_app(app: FastAPI, plugins: PluginManager, on_fault: _OnFault) -> None:
    """Let plugins extend ``app``, and guard what they add: what does not give the event loop back is interrupted by the
    ``PluginWatchdog``, ``on_fault`` is told, and what needs it is answered with 503 from then on.

    Raises ``PluginError`` naming the plugin whose hook fails, or whose middleware cannot be constructed.
    """
    ours = [*app.router.routes, *app.user_middleware]
    known = set(map(id, ours))
    for dist in plugins.iter_hook("quire_extend_app", app=app):
        _guard_routes(dist, app.router.routes, known, on_fault)
        for index, middleware in enumerate(app.user_middleware):
            if id(middleware) not in known:
                app.user_middleware[index] = Middleware(_GuardedMiddleware, dist, middleware, on_fault)
        known |= set(map(id, app.user_middleware))
    app.middleware_stack = app.build_middleware_stack()


def _guard_routes(dist: str, routes: Sequence[Any], known: set[int], on_fault: _OnFault) -> None:
    for route in routes:
        if id(route) not in known:
            known.add(id(route))
            # What is included stays a router of its own, of which some kinds of routes are copied when it is asked.
            if (included := getattr(route, "original_router", None)) is not None:
                _guard_routes(dist, included.routes, known, on_fault)
            name = dist + str(getattr(route, "path", "/"))
            route.handle = _GuardedRoute(name, route.handle, on_fault)


class _GuardedRoute:
    """The handler of one route. What it raises is its affair."""

    def __init__(self, name: str, app: ASGIApp, on_fault: _OnFault) -> None:
        self._app = app
        self._guard = _Guard("route", name, on_fault)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not await self._guard.run(self._app, scope, receive, send):
            raise self._guard.make_unavailable_error()


class _GuardedMiddleware:
    """One plugin's middleware around ``app``. A fault answers the request with 503, and every later one that would pass
    through it; one whose ``on_failure`` is ``"skip"`` is left out of those."""

    def __init__(self, app: ASGIApp, dist: str, middleware: Middleware, on_fault: _OnFault) -> None:
        self._inside = _OutsideOfPlugin(app)
        # Of ``@app.middleware("http")`` the class is the framework's, and the author's function an argument.
        author = middleware.kwargs.get("dispatch", middleware.cls)
        name = f"{dist}/{getattr(author, '__name__', type(author).__name__)}"
        self._skips = getattr(author, "on_failure", "fail") == "skip"
        self._guard = _Guard("middleware", name, on_fault)
        try:
            self._app: ASGIApp = middleware.cls(self._inside, *middleware.args, **middleware.kwargs)
        except NEVER_CONTAINED:
            raise
        except BaseException as error:
            raise PluginError(f"{name}: the middleware cannot be constructed: {format_error(error)}") from error

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._skips and not self._guard.is_active:
            return await self._inside(scope, receive, send)
        is_started = False

        async def note_start(message: Message) -> None:
            nonlocal is_started
            is_started = True
            await send(message)

        failure: Exception | None = None
        try:
            if not await self._guard.run(self._app, scope, receive, note_start):
                failure = self._guard.make_unavailable_error()
        except Exception as error:
            if scope["type"] != "http":
                raise
            _log.error("middleware/%s failed", self._guard.name)
            failure = error
        if failure is not None and scope["type"] == "http":
            response = make_error_response(failure)
            if not is_started:
                await response(scope, receive, send)


class _OutsideOfPlugin:
    """What a middleware calls: its time is not the middleware's."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await _SteppedCall(self._app, run_outside_of_plugin, lambda: False, scope, receive, send)


class _Guard:
    """Calls what a plugin added, until one of its calls is at fault. Those that run beside that one go on."""

    def __init__(self, kind: str, name: str, on_fault: _OnFault) -> None:
        self.kind, self.name, self.is_active = kind, name, True
        self._on_fault = on_fault

    async def run(self, app: ASGIApp, *connection: Any) -> bool:
        """Serve a connection. False if that did not end, or is not begun any more."""
        if not self.is_active:
            return False
        # Errors are answers, and a request may be cancelled. StopIteration, by which a coroutine returns, is an
        # Exception too.
        not_faults = (Exception, *CANCELLATIONS)
        quarantine = Quarantine(
            self.kind, self.name, self._note_fault, outcome="is switched off", not_faults=not_faults
        )
        await _SteppedCall(app, quarantine.call, lambda: not quarantine.is_active, *connection)
        return quarantine.is_active

    def make_unavailable_error(self) -> UnavailableError:
        """What a client hears."""
        return UnavailableError(f"{self.kind}/{self.name} is switched off, as the server's log says")

    def _note_fault(self, plugin: QuarantinedPlugin) -> None:
        if self.is_active:
            self.is_active = False
            self._on_fault(plugin)


class _SteppedCall:
    """Awaits ``app``, every stretch of which, from one await to the next, goes through ``run``, until ``is_over``."""

    def __init__(
        self, app: Callable[..., Any], run: Callable[..., Any], is_over: Callable[[], bool], *connection: Any
    ) -> None:
        self._coroutine, self._run, self._is_over = _await_app(app, *connection), run, is_over

    def __await__(self) -> Generator[Any, Any, None]:
        advance, argument = self._coroutine.send, None
        try:
            while True:
                try:
                    awaited = self._run(_handler, advance, argument)
                except StopIteration:
                    return
                if self._is_over():
                    return
                try:
                    advance, argument = self._coroutine.send, (yield awaited)
                except BaseException as error:
                    advance, argument = self._coroutine.throw, error
        finally:
            self._coroutine.close()


async def _await_app(app: Callable[..., Awaitable[None]], *connection: Any) -> None:
    await app(*connection)


def _handler(advance: Callable[[Any], Any], argument: Any) -> Any:
    """Lends its name to what the log says."""
    return advance(argument)
