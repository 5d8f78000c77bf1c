"""Logging: one handler on the ``quire`` logger, lines to stderr."""

from __future__ import annotations

import logging
import sys

from quire.core.env import log_level

__all__ = ["setup_logging", "setup_plain_logging"]


def setup_logging(level: str | None = None, rank: int | None = None) -> None:
    """Send the ``quire`` loggers to stderr. Called by the command line and by engine processes, never on import.

    The lines of a process that is one ``rank`` of a model name it. Ranks do the same things: what is no warning, the
    first says for all, unless the level is DEBUG.
    """
    logger = logging.getLogger("quire")
    logger.setLevel(level or log_level())
    if rank and logger.level > logging.DEBUG:
        logger.setLevel(max(logger.level, logging.WARNING))
    if not logger.handlers:
        handler = logging.StreamHandler(sys.stderr)
        place = "%(name)s" if rank is None else f"%(name)s[rank {rank}]"
        handler.setFormatter(logging.Formatter(f"%(levelname)s %(asctime)s {place}: %(message)s", "%H:%M:%S"))
        logger.addHandler(handler)
        logger.propagate = False


def setup_plain_logging() -> None:
    """Warnings and errors of the ``quire`` loggers as lines on stderr, each once and without tracebacks: for commands
    that run a policy many times and say themselves what became of it."""
    logger = logging.getLogger("quire")
    if not logger.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setLevel(logging.WARNING)
        handler.setFormatter(_PlainFormatter())
        handler.addFilter(_OnceFilter())
        logger.addHandler(handler)
        logger.propagate = False


class _PlainFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return f"{record.levelname.lower()}: {record.getMessage()}"


class _OnceFilter(logging.Filter):
    def __init__(self) -> None:
        super().__init__()
        self._seen: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        is_new = message not in self._seen
        self._seen.add(message)
        return is_new
