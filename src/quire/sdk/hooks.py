"""The marker for hook implementations, and what hooks are given and return.

The hooks themselves, with the arguments of each, are in ``quire.core.plugin.hookspecs``.
"""

from __future__ import annotations

from quire.core.plugin.hookspecs import hookimpl
from quire.core.plugin.registry import Choice, Registrar, Requirement

__all__ = ["Choice", "Registrar", "Requirement", "hookimpl"]
