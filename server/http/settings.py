"""Settings of the HTTP server, apart from those of the engine."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["ServerSettings"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerSettings:
    """Field names are the command line's flags with underscores."""

    host: str = "127.0.0.1"
    port: int = 8000
    """0 takes a free one; the ready line says which."""
    api_key: tuple[str, ...] = ()
    """Keys accepted on ``/v1/*``; empty: no key is asked for."""
    root_path: str = ""
    shutdown_timeout: float = 30.0
    """Seconds that requests in flight get to finish after SIGTERM."""
    max_request_bytes: int = 16 * 1024 * 1024
    prometheus_port: int | None = None
    """A second port that serves only ``/metrics``."""
    log_level: str | None = None
