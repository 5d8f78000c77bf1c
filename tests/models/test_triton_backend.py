"""A whole model through the Triton attention kernels."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.models.paged import PagedRunner, load

from quire.core.testing.tiny_models import make_tiny_model
from quire.plugins.attention.triton.backend import TritonBackend


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_interpreted_kernels_give_the_reference_logits(family: str, tmp_path: Path) -> None:
    """Chunks, decodes and windows, in float32."""
    windows = {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1} if family == "qwen3" else {}
    model = load(make_tiny_model(family, tmp_path, **windows))
    if any(TritonBackend.unsupported(spec, torch.device("cpu")) for spec in model.attention_specs()):
        pytest.skip("needs TRITON_INTERPRET=1")
    prompt = torch.randint(0, 256, (41,), generator=torch.Generator().manual_seed(3)).tolist()
    steps = ({0: prompt[:20], 1: prompt[:3]}, {0: prompt[20:40], 1: prompt[3:4]}, {0: prompt[40:], 1: prompt[4:5]})
    expected, got = PagedRunner(model, 2), PagedRunner(model, 2, backend=TritonBackend)
    for step in steps:
        one, other = expected.step(step), got.step(step)
        for i in one:
            torch.testing.assert_close(other[i], one[i], atol=5e-5, rtol=0)
