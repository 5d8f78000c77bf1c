"""Routes of plugins, beside those of the server: none of them can hold up the others for long."""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any

from fastapi import FastAPI
from starlette.types import ASGIApp, Receive, Scope, Send

from quire.core.plugin.manager import PluginManager
from quire.core.plugin.quarantine import Quarantine
from quire.core.stats import QuarantinedPlugin
from quire.server.http.errors import UnavailableError

__all__ = ["add_plugin_routes"]


def add_plugin_routes(app: FastAPI, plugins: PluginManager, on_fault: Callable[[QuarantinedPlugin], None]) -> None:
    """Let plugins extend ``app``. Their routes are guarded: one that does not give the event loop back is interrupted
    by the ``PluginWatchdog``, ``on_fault`` is told, and it answers 503 from then on. What it raises is its affair."""
    known = set(map(id, app.router.routes))
    for dist in plugins.iter_hook("quire_extend_app", app=app):
        for route in app.router.routes:
            if id(route) not in known and hasattr(route, "app"):
                name = dist + str(getattr(route, "path", type(route).__name__))
                route.app = _GuardedRoute(name, route.app, on_fault)
        known |= set(map(id, app.router.routes))


class _GuardedRoute:
    """The application of one route."""

    def __init__(self, name: str, app: ASGIApp, on_fault: Callable[[QuarantinedPlugin], None]) -> None:
        self._name, self._app = name, app
        # What it raises is its affair. StopIteration, by which a coroutine returns, is an Exception too.
        self._quarantine = Quarantine("route", name, on_fault, outcome="is switched off", not_faults=(Exception,))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._quarantine.is_active:
            await _GuardedCall(self._app(scope, receive, send), self._quarantine)
        if not self._quarantine.is_active:
            raise UnavailableError(f"{self._name} is switched off, as the server's log says")


class _GuardedCall:
    """Awaits a coroutine, every stretch of which, from one await to the next, is a guarded call."""

    def __init__(self, coroutine: Any, quarantine: Quarantine) -> None:
        self._coroutine, self._quarantine = coroutine, quarantine

    def __await__(self) -> Generator[Any, Any, None]:
        advance, argument = self._coroutine.send, None
        try:
            while True:
                try:
                    awaited = self._quarantine.call(_handler, advance, argument)
                except StopIteration:
                    return
                if not self._quarantine.is_active:
                    return
                try:
                    advance, argument = self._coroutine.send, (yield awaited)
                except BaseException as error:
                    advance, argument = self._coroutine.throw, error
        finally:
            self._coroutine.close()


def _handler(advance: Callable[[Any], Any], argument: Any) -> Any:
    """Lends its name to what the log says."""
    return advance(argument)
