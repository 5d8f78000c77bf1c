"""The Python of docs/structured-output.md runs as it stands."""

from __future__ import annotations

import re

from quire import LLM, SamplingParams, StructuredOutputsParams


def test_the_blocks_run(root, tmp_path, monkeypatch):
    text = (root / "docs" / "structured-output.md").read_text(encoding="utf-8")
    use, backend = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    exec(use, {})
    (tmp_path / "only_tokens.py").write_text(backend)
    monkeypatch.syspath_prepend(str(tmp_path))
    llm = LLM("quire-tiny", device="cpu", max_model_len=64, structured_output_backend="only_tokens:OnlyTokens")
    params = SamplingParams(
        temperature=1, seed=1, max_tokens=12, structured_outputs=StructuredOutputsParams(choice=["300", "301"])
    )
    token_ids = llm.generate("x", params)[0].outputs[0].token_ids
    assert set(token_ids) <= {300, 301, *llm.config.model.eos_token_ids}
    llm.shutdown()
