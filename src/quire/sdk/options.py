"""Options of a plugin: the frozen dataclass ``Options`` on its class, and how ``key=value`` pairs become one."""

from __future__ import annotations

from quire.core.plugin.options import parse_options

__all__ = ["parse_options"]
