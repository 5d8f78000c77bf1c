"""Logging: one handler on the ``quire`` logger, lines to stderr."""

from __future__ import annotations

import logging
import sys

from quire.core.env import log_level

__all__ = ["setup_logging"]


def setup_logging(level: str | None = None) -> None:
    """Send the ``quire`` loggers to stderr. Called by the command line and by engine processes, never on import."""
    logger = logging.getLogger("quire")
    logger.setLevel(level or log_level())
    if not logger.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(levelname)s %(asctime)s %(name)s: %(message)s", "%H:%M:%S"))
        logger.addHandler(handler)
        logger.propagate = False
