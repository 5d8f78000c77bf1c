"""Errors a user can cause and mend. Each message is one line: the value, the reason, the remedy."""

from __future__ import annotations

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


class QuireError(Exception):
    """Base of every error that Quire raises for its user. The command line prints it and exits with status 2."""


class ConfigError(QuireError, ValueError):
    """A setting that cannot be honoured."""


class CheckpointError(QuireError, ValueError):
    """A model folder or file that cannot be loaded."""


class PluginError(QuireError, ValueError):
    """A plugin that cannot be found, loaded or used."""


class PluginOptionError(PluginError):
    """Options that a plugin does not have, or refuses."""


class InvalidRequestError(QuireError, ValueError):
    """A request that cannot be served as asked. ``param`` names the offending field; HTTP answers 400."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class ContextLengthError(InvalidRequestError):
    """A prompt, or the answer that it asks for, does not fit into the model's context.

    Clients and gateways recognize it by the beginning of the message, which is OpenAI's, or over HTTP by its code
    ``context_length_exceeded``.
    """

    def __init__(self, max_model_len: int, reason: str, param: str = "prompt") -> None:
        super().__init__(f"This model's maximum context length is {max_model_len} tokens. {reason}", param)


class UnsupportedError(InvalidRequestError):
    """A request for something that Quire knows and cannot do yet."""


class QueueFullError(InvalidRequestError):
    """The queue is full or the policy refuses more. HTTP answers 429 with ``Retry-After``."""


class DeadlineUnmeetableError(QueueFullError):
    """The policy found that the answer would come too late to be of use. HTTP answers 429, code
    ``deadline_unmeetable``."""


class RequestFailedError(QuireError, RuntimeError):
    """The engine could not finish this request, though it was valid. HTTP answers 500."""


class ControlCallError(QuireError, RuntimeError):
    """A control call failed in the engine core or in a worker, or got no reply in time. The engine goes on."""


class EngineDeadError(QuireError, RuntimeError):
    """The engine core stopped; no request can be served. HTTP answers 503."""


class WorkerDiedError(EngineDeadError):
    """A worker has ended, hangs, or did something else than the others: the executor can run no step any more."""


class WorkerError(QuireError, RuntimeError):
    """What a worker in another process raised, all workers alike; the executor goes on."""

    def __init__(self, message: str, plugin: tuple[str, str] | None = None, error_code: int | None = None) -> None:
        super().__init__(message)
        self.plugin = plugin
        """Kind and name of the plugin in which it was raised."""
        self.error_code = error_code
        """``cudaError_t``, where the device raised."""
