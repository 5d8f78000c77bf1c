"""One tiny model and one engine for the whole folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from quire import LLM
from quire.core.testing.tiny_models import make_tiny_model


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny") / "llama"
    make_tiny_model("llama", path)
    return path


@pytest.fixture(scope="session")
def reference(tiny: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def llm(tiny: Path) -> Iterator[LLM]:
    made = LLM(model=str(tiny), max_model_len=256, device="cpu")
    yield made
    made.shutdown()
