import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported: the checks then run without a GPU

from quire_flat_attention.backend import FlatAttention

from quire.testing import parametrize_with_checks


@parametrize_with_checks(FlatAttention)
def test_keeps_its_contract(check):
    check()
