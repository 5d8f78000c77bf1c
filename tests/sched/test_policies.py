"""The bundled policies' order."""

import pytest

from quire.core.contracts.policy import RequestInfo
from quire.core.errors import PluginError
from quire.core.plugin.options import parse_options
from quire.plugins.sched.fcfs import FCFSPolicy
from quire.plugins.sched.priority import PriorityPolicy
from quire.plugins.sched.sjf import SJFPolicy


def order(make_engine, policy, arrivals):
    """Serve one at a time; ``arrivals``: (name, prompt length, priority), all there before the first step."""
    engine = make_engine(policy, rows=1, budget=64)
    for name, size, priority in arrivals:
        engine.add_request(name, [1] * size, max_tokens=1, priority=priority)
    engine.run_until_finished()
    return list(engine.finished)


ARRIVALS = [("a", 9, 1), ("b", 3, 0), ("c", 5, -1), ("d", 3, 0)]


@pytest.mark.parametrize(
    ("cls", "expected"), [(FCFSPolicy, "abcd"), (PriorityPolicy, "cbda"), (SJFPolicy, "bdca")], ids=lambda c: str(c)
)
def test_order(make_engine, cls, expected):
    assert "".join(order(make_engine, cls(parse_options(cls, {})), ARRIVALS)) == expected


@pytest.mark.parametrize("cls", [PriorityPolicy, SJFPolicy])
def test_ageing_lets_the_patient_through(make_engine, cls):
    def rank(policy, seconds, size, priority):
        return policy.admission_key(RequestInfo("r", int(seconds * 1e9), size, 10, priority))

    patient, fresh = (0, 2000, 2), (100, 1000, 0)
    for aging, first in (("0", fresh), ("1", patient), ("1000", fresh)):
        policy = cls(parse_options(cls, {"aging": aging}))
        assert min(patient, fresh, key=lambda request: rank(policy, *request)) == first


@pytest.mark.parametrize("cls", [PriorityPolicy, SJFPolicy])
@pytest.mark.parametrize("value", ["-1", "inf", "nan", "soon"])
def test_ageing_must_make_sense(cls, value):
    with pytest.raises(PluginError, match="aging"):
        parse_options(cls, {"aging": value})
