"""Checks of routers: valid choices, the same for the same history, whatever the loads."""

from __future__ import annotations

import random
import time

from quire.core.contracts.router import ReplicaLoad, RoutedRequest, Router
from quire.core.plugin.options import parse_options

__all__ = [
    "check_chooses_one_of_the_replicas",
    "check_is_deterministic",
    "check_is_quick_with_many_replicas",
    "check_two_can_live_in_one_process",
]


def check_chooses_one_of_the_replicas(cls: type[Router]) -> None:
    """An index in range, with one replica too, for idle and crowded ones, with and without prefixes."""
    for num_replicas in (1, 2, 7):
        for choice in _route(_make_router(cls), num_replicas, 200):
            assert isinstance(choice, int) and 0 <= choice < num_replicas, f"choose_replica returned {choice!r}"


def check_is_deterministic(cls: type[Router]) -> None:
    """The same requests and loads give the same choices: it reads no clock and draws from no unseeded generator."""
    assert _route(_make_router(cls), 5, 300) == _route(_make_router(cls), 5, 300), "a second run chose otherwise"


def check_two_can_live_in_one_process(cls: type[Router]) -> None:
    """A router shares no state with another."""
    alone = _route(_make_router(cls), 5, 100)
    other, beside = _make_router(cls), _make_router(cls)
    _route(other, 3, 50)
    assert _route(beside, 5, 100) == alone, "what another router did changes the choices"


def check_is_quick_with_many_replicas(cls: type[Router]) -> None:
    """A choice among 256 replicas takes less than 20 ms."""
    router = _make_router(cls)
    _route(router, 256, 3)
    start = time.perf_counter()
    _route(router, 256, 20)
    seconds = (time.perf_counter() - start) / 20
    assert seconds < 0.02, f"a choice took {seconds * 1e3:.1f} ms"


def _make_router(cls: type[Router]) -> Router:
    return cls(parse_options(cls, {}))


def _route(router: Router, num_replicas: int, num_requests: int) -> list[int]:
    """The choices for random requests and loads."""
    rng = random.Random(num_replicas)
    choices = []
    for number in range(num_requests):
        loads = [ReplicaLoad(rng.randint(0, 30), rng.choice((0, 0, 5)), rng.random()) for _ in range(num_replicas)]
        hashes = tuple(rng.randint(0, 3) + 10 * i for i in range(rng.choice((0, 1, 8))))
        request = RoutedRequest(f"r{number}", number * 1000, 512, rng.choice((None, 64)), "a", hashes, 16)
        choices.append(router.choose_replica(request, loads))
        if number % 3 == 0:
            router.request_finished(request.request_id, choices[-1])
    return choices
