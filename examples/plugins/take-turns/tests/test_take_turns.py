from quire_take_turns import TakeTurns

from quire.sdk import RequestInfo
from quire.testing import parametrize_with_checks


@parametrize_with_checks(TakeTurns)
def test_keeps_its_contract(check):
    check()


def test_the_second_tenant_goes_before_the_first_ones_second_request():
    policy = TakeTurns()
    keys = [policy.admission_key(RequestInfo(str(i), i, 8, 8, 0, salt)) for i, salt in enumerate("aab")]
    assert sorted(keys) == [keys[0], keys[2], keys[1]]
