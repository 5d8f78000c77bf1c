from quire.core.testing.conformance import parametrize_with_checks
from quire.plugins.sched.fcfs import FCFSPolicy
from quire.plugins.sched.priority import PriorityPolicy
from quire.plugins.sched.sjf import SJFPolicy


@parametrize_with_checks(FCFSPolicy)
def test_fcfs_keeps_the_contract(check):
    check()


@parametrize_with_checks(PriorityPolicy)
def test_priority_keeps_the_contract(check):
    check()


@parametrize_with_checks(SJFPolicy)
def test_sjf_keeps_the_contract(check):
    check()
