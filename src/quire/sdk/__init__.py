"""What a plugin imports: contracts, hooks, errors and options, flat here or by topic in the modules below.

``from quire.sdk import BatchingPolicy, hookimpl`` loads the contract that is named and nothing else: torch only where
that contract speaks of tensors. Within one major version of the plugin API, names and signatures are only added.
``quire.sdk.ops`` has operations and what kernels are made of, ``quire.sdk.layers`` the layers of models.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from quire.sdk import contracts, errors, hooks, options
from quire.sdk.errors import *  # noqa: F403
from quire.sdk.hooks import *  # noqa: F403
from quire.sdk.options import *  # noqa: F403

if TYPE_CHECKING:
    from quire.sdk.contracts import *  # noqa: F403

__all__ = ["contracts", "errors", "hooks", "options"]
__all__ += contracts.__all__
__all__ += errors.__all__
__all__ += hooks.__all__
__all__ += options.__all__


def __getattr__(name: str) -> Any:
    """A contract, imported at its first use."""
    if name in contracts.__all__:
        return getattr(contracts, name)
    raise AttributeError(f"module 'quire.sdk' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
