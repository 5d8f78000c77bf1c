"""Options of a plugin: the frozen dataclass ``Options`` on its class, how ``key=value`` pairs become one, and what the
default of a number of threads is made from."""

from __future__ import annotations

from quire.core.env import count_cpus
from quire.core.plugin.options import parse_options

__all__ = ["count_cpus", "parse_options"]
