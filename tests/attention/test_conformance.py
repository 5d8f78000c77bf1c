"""Conformance of the bundled backends; Triton's kernels run in the interpreter, in float32 and float16."""

from __future__ import annotations

import pytest
import torch

from quire.core.testing.attention_problem import make_spec
from quire.core.testing.conformance import parametrize_with_checks
from quire.plugins.attention.torch_sdpa import TorchSDPABackend
from quire.plugins.attention.triton.backend import TritonBackend

interpreted = pytest.mark.skipif(
    bool(TritonBackend.unsupported(make_spec(), torch.device("cuda" if torch.cuda.is_available() else "cpu"))),
    reason="neither a GPU nor TRITON_INTERPRET=1",
)


@parametrize_with_checks(TorchSDPABackend)
def test_torch_sdpa(check):
    check()


@interpreted
@parametrize_with_checks(TritonBackend)
def test_triton(check):
    check()
