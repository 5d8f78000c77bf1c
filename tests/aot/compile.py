"""Compiles what a host function would launch: ``quire.core.testing.aot``, which ``quire plugins check --aot`` uses."""

from __future__ import annotations

from quire.core.testing.aot import CompiledKernel as Compiled
from quire.core.testing.aot import catch_launches as launches_of
from quire.core.testing.aot import compile_launch
from quire.core.testing.aot import get_variant as variant

__all__ = ["Compiled", "compile_launch", "launches_of", "variant"]
