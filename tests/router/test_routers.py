"""The bundled routers: they keep their contract, and do what they are named after."""

from __future__ import annotations

import pytest

from quire.core.contracts.router import ReplicaLoad, RoutedRequest
from quire.core.errors import PluginError
from quire.core.plugin.options import parse_options
from quire.plugins.router.least_loaded import LeastLoadedRouter
from quire.plugins.router.prefix_aware import PrefixAwareRouter
from quire.plugins.router.round_robin import RoundRobinRouter
from quire.testing import parametrize_with_checks

IDLE = ReplicaLoad(0, 0, 0.0)


def request(*hashes):
    return RoutedRequest("r", 0, 100, None, None, hashes, 16)


@parametrize_with_checks(RoundRobinRouter)
def test_round_robin_keeps_its_contract(check):
    check()


@parametrize_with_checks(LeastLoadedRouter)
def test_least_loaded_keeps_its_contract(check):
    check()


@parametrize_with_checks(PrefixAwareRouter)
def test_prefix_aware_keeps_its_contract(check):
    check()


def test_turns_are_taken():
    router = RoundRobinRouter()
    assert [router.choose_replica(request(), [IDLE] * 3) for _ in range(5)] == [0, 1, 2, 0, 1]


def test_the_fewest_requests_count_then_the_freest_cache():
    loads = [ReplicaLoad(3, 2, 0.1), ReplicaLoad(4, 0, 0.9), ReplicaLoad(2, 2, 0.3)]
    assert LeastLoadedRouter().choose_replica(request(), loads) == 2


def test_a_prefix_is_followed_until_its_replica_has_too_much_to_do():
    router = PrefixAwareRouter(PrefixAwareRouter.Options(max_imbalance=2.0, min_imbalance=4))
    first = router.choose_replica(request(1, 2, 3), [IDLE] * 3)
    other = router.choose_replica(request(7, 8), [ReplicaLoad(1, 0, 0.0) if i == first else IDLE for i in range(3)])
    assert other != first
    for _ in range(3):
        assert router.choose_replica(request(1, 2, 9), [IDLE] * 3) == first
        assert router.choose_replica(request(7, 8, 9), [IDLE] * 3) == other
    crowded = [ReplicaLoad(9, 0, 0.0) if i == first else ReplicaLoad(1, 0, 0.0) for i in range(3)]
    assert router.choose_replica(request(1, 2, 3), crowded) != first


def test_old_prefixes_are_forgotten():
    router = PrefixAwareRouter(PrefixAwareRouter.Options(max_blocks=4))
    busy = [ReplicaLoad(1, 0, 0.0), IDLE]
    assert router.choose_replica(request(1, 2), [IDLE, busy[0]]) == 0
    assert router.choose_replica(request(1, 2), busy) == 0
    router.choose_replica(request(3, 4, 5, 6), [IDLE, busy[0]])
    assert router.choose_replica(request(1, 2), busy) == 1


def test_bad_options_are_refused():
    with pytest.raises(PluginError, match="max_imbalance is a ratio"):
        parse_options(PrefixAwareRouter, {"max_imbalance": "0.5"})
