"""The errors that a plugin raises for its user, and those that it may meet."""

from __future__ import annotations

from quire.core.errors import (
    CheckpointError,
    ConfigError,
    ContextLengthError,
    ControlCallError,
    DeadlineUnmeetableError,
    EngineDeadError,
    InvalidRequestError,
    PluginError,
    PluginOptionError,
    QueueFullError,
    QuireError,
    RequestFailedError,
    UnsupportedError,
    WorkerDiedError,
    WorkerError,
)

__all__ = [
    "CheckpointError",
    "ConfigError",
    "ContextLengthError",
    "ControlCallError",
    "DeadlineUnmeetableError",
    "EngineDeadError",
    "InvalidRequestError",
    "PluginError",
    "PluginOptionError",
    "QueueFullError",
    "QuireError",
    "RequestFailedError",
    "UnsupportedError",
    "WorkerDiedError",
    "WorkerError",
]
