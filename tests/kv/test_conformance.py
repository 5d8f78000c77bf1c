from quire.core.testing.conformance import parametrize_with_checks
from quire.plugins.kv.paged import PagedAllocator


@parametrize_with_checks(PagedAllocator)
def test_paged_keeps_the_contract(check):
    check()
