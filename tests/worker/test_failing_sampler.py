"""A sampler that raises is replaced by the bundled one, and no request is lost."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from torch import Tensor

from quire import LLM, SamplingParams
from quire.core.contracts.sampler import SamplingBatch
from quire.core.sample.sampler import GumbelSampler
from quire.core.testing.tiny_models import make_tiny_model

PROMPTS = [[5, 6, 7, 8] * (2 + i) for i in range(4)]
PARAMS = SamplingParams(temperature=0.8, seed=3, max_tokens=12, ignore_eos=True)


class RaisesHalfWay(GumbelSampler):
    """After some calls it overwrites the logits, and raises."""

    num_calls = 0

    def sample(self, logits: Tensor, batch: Any) -> Tensor:
        self.num_calls += 1
        if self.num_calls > 5:
            logits.fill_(0)
            raise RuntimeError("a kernel refused its launch")
        return super().sample(logits, batch)


class ReturnsNothing(GumbelSampler):
    def sample(self, logits: Tensor, batch: Any) -> Any:
        return None


class FailsFromTheTable(GumbelSampler):
    """Samples from the table, and raises after it has appended a token to one row."""

    num_calls = 0

    def prepare_graph_sampling(self, max_rows: int) -> bool:
        return True

    def sample_from_table(self, logits: Tensor, rows: Tensor, table: Any, tokens: Tensor, *, greedy: bool) -> None:
        self.num_calls += 1
        count = len(rows) if self.num_calls <= 5 else 1
        positions = table.num_tokens[rows].long()
        tokens.copy_(self.sample(logits.float(), SamplingBatch.from_table(table, rows, positions, True)))
        table.token_ids[rows[:count], positions[:count]] = tokens[:count]
        table.num_tokens[rows[:count]] += 1
        if self.num_calls > 5:
            raise RuntimeError("a kernel refused its launch")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_tiny_model("llama", tmp_path_factory.mktemp("sampler") / "model"))


def serve(model: str, **choices: Any) -> tuple[list[list[int]], dict[str, float]]:
    engine = LLM(model=model, device="cpu", max_model_len=128, **choices)
    try:
        answers = [engine.generate(PROMPTS, PARAMS) for _ in range(3)]
        return [output.outputs[0].token_ids for batch in answers for output in batch], engine.get_stats()
    finally:
        engine.shutdown()


@pytest.mark.parametrize("sampler", ["RaisesHalfWay", "ReturnsNothing", "FailsFromTheTable"])
@pytest.mark.parametrize("speculation", [{}, {"spec_method": "ngram"}], ids=["plain", "drafts"])
def test_requests_go_on_with_the_bundled_sampler(
    model: str, sampler: str, speculation: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    expected, stats = serve(model)
    assert stats["plugin_quarantines_total"] == 0
    with caplog.at_level(logging.ERROR, "quire.plugin"):
        answers, stats = serve(model, sampler=f"{__name__}:{sampler}", **speculation)
    assert answers == expected
    assert stats["plugin_quarantines_total"] == 1 and stats["kv_cache_usage_perc"] == 0
    (record,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert "is quarantined (raised)" in record.getMessage() and "GumbelSampler takes over" in record.getMessage()
