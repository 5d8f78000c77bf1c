"""A model whose layers all have a sliding window needs a cache for the window, not for the context."""

from __future__ import annotations

from pathlib import Path

import pytest

from quire import LLM, SamplingParams
from quire.core.errors import ConfigError
from quire.core.testing.tiny_models import make_tiny_model

LONG = [5 + i % 90 for i in range(150)]
LIMITS = {"device": "cpu", "max_model_len": 256, "max_num_batched_tokens": 32, "max_num_seqs": 4}


@pytest.mark.parametrize("speculation", [{}, {"spec_method": "ngram"}])
def test_a_small_cache_serves_a_long_context(tmp_path: Path, speculation: dict[str, str]) -> None:
    model = str(make_tiny_model("mistral", tmp_path / "windows", sliding_window=20))
    params = SamplingParams(temperature=0, max_tokens=90, ignore_eos=True)
    prompts = [LONG, LONG[:40], LONG[7:]]
    answers = []
    for num_blocks in (60, 8):
        engine = LLM(model=model, num_gpu_blocks_override=num_blocks, **LIMITS, **speculation)
        try:
            answers.append([output.outputs[0].token_ids for output in engine.generate(prompts, params)])
        finally:
            engine.shutdown()
    assert answers[0] == answers[1]
    with pytest.raises(ConfigError, match="max_model_len 256 does not fit"):
        LLM(model=model, num_gpu_blocks_override=4, **LIMITS)
