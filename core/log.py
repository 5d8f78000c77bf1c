"""Logging: one handler on the ``quire`` logger, lines to stderr."""

from __future__ import annotations

import logging
import sys

from quire.core.env import log_level

__all__ = ["setup_logging"]


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
