"""One tiny model, an engine of it, and a worker that runs its steps."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from quire import LLM
from quire.core.testing.tiny_models import make_tiny_model


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model("llama", tmp_path_factory.mktemp("tiny") / "llama")


@pytest.fixture(scope="session")
def llm(tiny: Path) -> Iterator[LLM]:
    engine = LLM(model=str(tiny), max_model_len=256, device="cpu")
    yield engine
    engine.shutdown()
