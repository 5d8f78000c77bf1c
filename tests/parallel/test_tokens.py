"""Tokens of a model that ranks share are those of the model in one piece, whatever is asked for and whoever drafts."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from tests.quant.test_fixtures import FIXTURES, NAMES
from tests.spec_decode.eagle3_reference import make_eagle3_head

from quire import LLM, RequestOutput
from quire.core.errors import ConfigError
from quire.core.sample.sampler import GumbelSampler
from quire.core.testing.tiny_models import make_tiny_model

from .conftest import (
    EXECUTOR,
    FAMILIES,
    PROMPTS,
    PROPOSERS,
    ModelFolders,
    assert_same,
    make_params,
    make_two_layers,
    open_engine,
)

SAMPLE = [
    ("llama", "none", 2, 1),
    ("mistral", "ngram", 4, 1),
    ("qwen2", "draft", 4, 1),
    ("qwen3", "eagle3", 2, 1),
    ("llama", "eagle3", 1, 2),
    ("mistral", "none", 1, 2),
    ("qwen2", "suffix", 2, 2),
    ("qwen3", "draft", 1, 2),
]
"""Each family, each kind of proposer, each size: ranks of a stage, and stages."""
SIZES = ((2, 1), (4, 1), (1, 2), (2, 2))
EVERY = [case for f, p, size in itertools.product(FAMILIES, PROPOSERS, SIZES) if (case := (f, p, *size)) not in SAMPLE]
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
    ("family", "proposer", "size", "stages"),
    [*SAMPLE, *(pytest.param(*case, marks=pytest.mark.parallel) for case in EVERY)],
)
def test_tokens_are_those_of_one_rank(folders, expected, family: str, proposer: str, size: int, stages: int) -> None:
    """Requests of every kind together, some preempted, some that find a prefix."""
    params = make_params()
    with open_engine(folders, family, proposer, size, stages, num_gpu_blocks_override=60) as llm:
        assert_same(llm, expected[family], params)
        stats = llm.get_stats()
        assert stats["num_preemptions_total"] > 0 and stats["prefix_cache_hits_total"] > 0
        assert proposer in ("none", "suffix") or stats["spec_decode_num_draft_tokens_total"] > 0
        assert_same(llm, expected[family], params[:4])
        for index in (0, 6, 15):  # alone: each step waits for the token of the one before
            [output] = llm.generate([PROMPTS[index]], params[index])
            assert output.outputs[0].token_ids == expected[family][index].outputs[0].token_ids


@pytest.mark.parallel
@pytest.mark.parametrize("name", NAMES)
def test_every_quantization(folders: ModelFolders, tmp_path: Path, name: str) -> None:
    """Packed shards under requests of every kind, with drafts and without."""
    params, prompts = make_params(8), [[token % 60 for token in prompt] for prompt in PROMPTS]
    params = [each for each in params if each.structured_outputs is None and each.allowed_token_ids is None]
    arguments = {"tokenizer": str(folders.get("llama")), "max_model_len": 160, "max_num_seqs": 8, "device": "cpu"}
    answers = []
    model = make_two_layers(FIXTURES / name, tmp_path / "model")
    for size, stages, proposer in ((1, 1, "none"), (2, 1, "ngram"), (4, 1, "none"), (1, 2, "suffix"), (2, 2, "none")):
        ranks = {"tensor_parallel_size": size, "pipeline_parallel_size": stages}
        ranks |= {"executor": EXECUTOR} if size * stages > 1 else {}
        llm = LLM(str(model), **arguments, **ranks, **PROPOSERS[proposer], cpu_threads=1)
        outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts[: len(params)]], params)
        answers.append([each.token_ids for output in outputs for each in output.outputs])
        llm.shutdown()
    assert all(each == answers[0] for each in answers)


@pytest.mark.parametrize("stages", [3, 4])
def test_stages_of_unlike_layers(tmp_path, stages: int) -> None:
    """Block tables are those of the whole model: here no stage has a layer of every kind."""
    sizes = {"num_hidden_layers": 5, "use_sliding_window": True, "sliding_window": 9, "max_window_layers": 2}
    model = make_tiny_model("qwen2", tmp_path / "model", tie_word_embeddings=True, **sizes)
    head = make_eagle3_head(
        tmp_path / "head", model, PROMPTS[:3], num_heads=4, eagle_aux_hidden_state_layer_ids=[1, 3, 4]
    )
    arguments = {"max_model_len": 160, "max_num_seqs": 6, "block_size": 4, "max_num_batched_tokens": 48}
    params, answers = make_params(), []
    for ranks in ({}, {"pipeline_parallel_size": stages, "executor": EXECUTOR, "speculative_model": str(head)}):
        llm = LLM(str(model), device="cpu", num_gpu_blocks_override=60, cpu_threads=1, **arguments, **ranks)
        outputs = llm.generate(PROMPTS, params)
        answers.append([each.token_ids for output in outputs for each in output.outputs])
        assert llm.get_stats()["num_preemptions_total"] > 0
        llm.shutdown()
    assert answers[0] == answers[1]


@pytest.mark.parametrize("proposer", ["draft", pytest.param("eagle3", marks=pytest.mark.parallel)])
def test_a_draft_may_be_whole_on_every_rank(folders, expected, proposer: str) -> None:
    """``--speculative-draft-tensor-parallel-size 1``: it is as good, and takes part in no collective of its own."""
    with open_engine(folders, "qwen2", proposer, 2, speculative_draft_tensor_parallel_size=1) as llm:
        assert_same(llm, expected["qwen2"], make_params()[:5])
        assert llm.get_stats()["spec_decode_num_draft_tokens_total"] > 0
        draft = next(iter(llm.engine_core.executor.workers[1].model_runner.draft_runner.proposer.parameters()))
        assert draft.shape[0] in (323, 64), "not a half of the embedding, nor of the fused hidden states"


@pytest.mark.parametrize(
    "sizes", [{"num_attention_heads": 3, "num_key_value_heads": 3, "hidden_size": 48}, {"intermediate_size": 97}]
)
def test_a_draft_that_does_not_divide_is_whole(folders, expected, tmp_path, sizes: dict[str, int]) -> None:
    """Where nothing is said, and refused by name where it is."""
    draft = make_tiny_model("llama", tmp_path / "draft", **sizes)
    settings = {"tensor_parallel_size": 2, "speculative_model": str(draft)}
    with open_engine(folders, "llama", **settings, executor=EXECUTOR) as llm:
        assert llm.config.speculation.draft_tensor_parallel_size == 1
    with pytest.raises(ConfigError, match=r"tensor_parallel_size 2 is neither 1, .* tensor_parallel_size 4"):
        settings |= {"tensor_parallel_size": 4, "speculative_draft_tensor_parallel_size": 2}
        open_engine(folders, "llama", **settings, executor=EXECUTOR).__enter__()


def test_a_sampler_of_another_author_sees_whole_logits(folders, expected) -> None:
    """Only of the bundled one is it known that parts are enough."""
    with open_engine(folders, "qwen2", size=2, sampler="tests.parallel.test_tokens:WholeSampler") as llm:
        assert_same(llm, expected["qwen2"], make_params()[:6])
    assert {323} == SEEN_WIDTHS
