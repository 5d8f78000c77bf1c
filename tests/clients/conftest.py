"""Clients of other people against a server that ``run.py`` has started: ``make clients``.

Not part of the default suite, which has none of these packages: nothing here is collected without ``QUIRE_URL``.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator

import pytest

collect_ignore_glob = [] if "QUIRE_URL" in os.environ else ["test_*.py"]


@pytest.fixture(scope="session")
def base_url() -> str:
    return f"{os.environ['QUIRE_URL']}/v1"


@pytest.fixture(scope="session")
def loop() -> Iterator[asyncio.Runner]:
    """One event loop for all: some clients keep connections for the process, which end with the loop."""
    with asyncio.Runner() as runner:
        yield runner
