import os

import torch

if not torch.cuda.is_available():  # before Triton is imported: its interpreter runs the checks
    os.environ.setdefault("TRITON_INTERPRET", "1")

from quire_flat_attention.backend import FlatAttention

from quire.testing import parametrize_with_checks


@parametrize_with_checks(FlatAttention)
def test_keeps_its_contract(check):
    check()
