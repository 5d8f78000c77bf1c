"""Tokens of a model that ranks share are those of the model in one piece, whatever is asked for and whoever drafts."""

from __future__ import annotations

import itertools

import pytest

from quire import RequestOutput
from quire.core.sample.sampler import GumbelSampler

from .conftest import FAMILIES, PROMPTS, PROPOSERS, ModelFolders, assert_same, make_params, open_engine

SAMPLE = [("llama", "none", 2), ("mistral", "ngram", 4), ("qwen2", "draft", 4), ("qwen3", "eagle3", 2)]
"""Each family, each kind of proposer, both sizes."""
EVERY = [case for case in itertools.product(FAMILIES, PROPOSERS, (2, 4)) if case not in SAMPLE]
SEEN_WIDTHS: set[int] = set()


class WholeSampler(GumbelSampler):
    """Keeps how many logits of a row it saw."""

    def sample(self, logits, batch):
        SEEN_WIDTHS.add(logits.shape[1])
        return super().sample(logits, batch)


@pytest.fixture(scope="module")
def expected(folders: ModelFolders) -> dict[str, list[RequestOutput]]:
    """By family, from one rank; made when first asked for."""

    class ByFamily(dict):
        def __missing__(self, family: str) -> list[RequestOutput]:
            with open_engine(folders, family) as llm:
                self[family] = llm.generate(PROMPTS, make_params())
            return self[family]

    return ByFamily()


@pytest.mark.parametrize(
    ("family", "proposer", "size"), [*SAMPLE, *(pytest.param(*case, marks=pytest.mark.parallel) for case in EVERY)]
)
def test_tokens_are_those_of_one_rank(folders, expected, family: str, proposer: str, size: int) -> None:
    """Requests of every kind together, some preempted, some that find a prefix."""
    params = make_params()
    with open_engine(folders, family, proposer, size, num_gpu_blocks_override=60) as llm:
        assert_same(llm, expected[family], params)
        stats = llm.get_stats()
        assert stats["num_preemptions_total"] > 0 and stats["prefix_cache_hits_total"] > 0
        assert proposer in ("none", "suffix") or stats["spec_decode_num_draft_tokens_total"] > 0
        assert_same(llm, expected[family], params[:4])


def test_a_sampler_of_another_author_sees_whole_logits(folders, expected) -> None:
    """Only of the bundled one is it known that parts are enough."""
    with open_engine(folders, "qwen2", size=2, sampler="tests.parallel.test_tokens:WholeSampler") as llm:
        assert_same(llm, expected["qwen2"], make_params()[:6])
    assert {323} == SEEN_WIDTHS
