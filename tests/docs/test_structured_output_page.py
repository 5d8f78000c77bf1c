"""The Python of docs/structured-output.md runs as it stands."""

from __future__ import annotations

import re

import pytest

from quire import LLM, SamplingParams, StructuredOutputsParams
from quire.core.errors import InvalidRequestError
from quire.server.cli.plugins_new import NewPackage


def test_the_blocks_run(root, tmp_path, monkeypatch):
    text = (root / "docs" / "structured-output.md").read_text(encoding="utf-8")
    use, backend = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    exec(use, {})
    (tmp_path / "one_of.py").write_text(backend)
    monkeypatch.syspath_prepend(str(tmp_path))
    llm = LLM("quire-tiny", device="cpu", max_model_len=64, structured_output_backend="one_of:OneOf")
    choices = ["a bird", "a big bird", "a plane"]
    params = SamplingParams(
        temperature=1, seed=1, n=4, max_tokens=12, structured_outputs=StructuredOutputsParams(choice=choices)
    )
    [output] = llm.generate("It is", params)
    assert all(completion.text in choices for completion in output.outputs)
    with pytest.raises(InvalidRequestError, match="choices alone"):
        llm.generate("It is", SamplingParams(structured_outputs=StructuredOutputsParams(regex="a")))
    llm.shutdown()


def test_the_page_shows_what_quire_plugins_new_writes(root):
    text = (root / "docs" / "structured-output.md").read_text(encoding="utf-8")
    files = NewPackage.from_words("structured_output", "one-of").make_files()
    assert f"```python\n{files['quire_one_of/structured_output.py']}```" in text
