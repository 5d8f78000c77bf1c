"""Asks a router at each arrival which simulated replica serves the request."""

from __future__ import annotations

from collections.abc import Sequence

from quire.core.contracts.router import RoutedRequest, Router
from quire.core.errors import PluginError
from quire.core.messages import EngineCoreRequest
from quire.server.simulate.replica import Replica
from quire.server.simulate.simulation import Assignment
from quire.server.traces.trace import Trace, TraceRequest

__all__ = ["make_assignment"]


def make_assignment(router: Router, trace: Trace) -> Assignment:
    """The router's choice for each request of ``trace``. One that fails ends the simulation with a ``PluginError``: its
    figures would be of something else."""

    def assign(number: int, message: EngineCoreRequest, request: TraceRequest, replicas: Sequence[Replica]) -> int:
        name = type(router).__qualname__
        routed = _make_routed_request(message, request, trace.hash_block_size)
        try:
            chosen = router.choose_replica(routed, [replica.measure_load(message.arrival_ns) for replica in replicas])
        except Exception as error:
            raise PluginError(f"router {name}: choose_replica raised {type(error).__name__}: {error}") from error
        if not isinstance(chosen, int) or not 0 <= chosen < len(replicas):
            raise PluginError(f"router {name}: choose_replica returned {chosen!r}, not 0 to {len(replicas) - 1}")
        return chosen

    return assign


def _make_routed_request(message: EngineCoreRequest, request: TraceRequest, block_size: int) -> RoutedRequest:
    num_blocks = request.prompt_len // block_size if block_size else 0
    return RoutedRequest(
        message.external_request_id,
        message.arrival_ns,
        request.prompt_len,
        request.max_tokens,
        None if message.scheduling is None else message.scheduling.group,
        request.block_hashes[:num_blocks],
        block_size,
    )
