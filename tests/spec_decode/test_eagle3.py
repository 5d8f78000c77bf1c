"""EAGLE-3 heads: their drafts against a reference that shares no code with the product, and what is refused."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file

from quire import LLM, SamplingParams
from quire.core.sample.noise import gumbel
from quire.core.worker.cuda_graphs.prefill import PrefillGraphs, PrefillShapes

from .conftest import get_model_runner, get_refusal
from .eagle3_reference import Eagle3Reference, make_eagle3_head

SHARED = random.Random(1).sample(range(3, 250), 22)  # ends within a block of 4
PROMPTS = [SHARED[: (0, 22)[i % 3 > 0]] + [7 * i + j * j for j in range(3 + 2 * i)] * (1 + i % 2) for i in range(6)]


class RecordedDraft(NamedTuple):
    """What a proposer was asked for one request, and what it answered."""

    token_ids: list[int]
    draft_token_ids: list[int]
    temperature: float
    seed: int


class DraftRecorder:
    """Records every draft of an engine."""

    def __init__(self, llm: LLM) -> None:
        runner = get_model_runner(llm)
        self.drafts: list[RecordedDraft] = []
        self._table, self._propose = runner.table, runner.draft_runner.proposer.propose
        runner.draft_runner.proposer.propose = self.propose

    def propose(self, rows, num_tokens, *, greedy=False):
        drafts, table = self._propose(rows, num_tokens, greedy=greedy), self._table
        for row, draft_token_ids in zip(rows.tolist(), drafts.token_ids.tolist(), strict=True):
            token_ids = table.token_ids[row, : int(table.num_tokens[row])].tolist()
            self.drafts.append(
                RecordedDraft(token_ids, draft_token_ids, float(table.temperature[row]), int(table.seed[row]))
            )
        return drafts


@pytest.mark.parametrize("layout", ["eagle", "specforge", "speculators"])
def test_drafts_match_the_reference(models, reference, tmp_path, layout: str) -> None:
    """Prompts in chunks, prefixes that are shared and hit, preemption, drafts accepted and rejected, with and without
    noise: that of the token in the target's vocabulary, so that head and target sample alike."""
    head = make_eagle3_head(tmp_path / "head", models["MODEL"], PROMPTS, layout=layout)
    sizes = {"max_model_len": 128, "max_num_seqs": 4, "block_size": 4, "max_num_batched_tokens": 16}
    llm = LLM(
        model=str(models["MODEL"]),
        device="cpu",
        speculative_model=str(head),
        num_speculative_tokens=3,
        num_gpu_blocks_override=34,
        speculative_config={"adaptive": False},
        **sizes,
    )
    recorder, eagle3_reference = DraftRecorder(llm), Eagle3Reference.load(head, reference)
    if layout == "specforge":  # steps with prompts laid out with padding, as they are captured on a GPU
        runner = get_model_runner(llm)
        shapes = PrefillShapes(num_prompt_tokens=(8, 16))
        runner.prefill_graphs = PrefillGraphs(runner.model, runner.backends, runner.kv_cache, runner.table, 16, shapes)
    for temperature in (0, 0, 0.4):
        fields = {"temperature": temperature, "max_tokens": 22, "ignore_eos": True}
        llm.generate(PROMPTS, [SamplingParams(**fields, seed=i) for i in range(len(PROMPTS))])
    stats = llm.get_stats()
    assert stats["num_preemptions_total"] > 0 and stats["prefix_cache_hits_total"] > 0
    assert all(stats[f"spec_decode_accepted_at_{i}_total"] > 0 for i in range(3))
    assert stats["spec_decode_draft_acceptance_rate"] < 0.9
    for draft in random.Random(0).sample(recorder.drafts, 90):

        def noise(position: int, draft: RecordedDraft = draft) -> torch.Tensor:
            gumbel_noise = gumbel(torch.tensor([draft.seed]), torch.tensor([position]), 320)[0].double()
            return draft.temperature * gumbel_noise

        expected = eagle3_reference.draft_tokens(draft.token_ids, len(draft.draft_token_ids), noise)
        assert draft.draft_token_ids == expected
    llm.shutdown()


def test_an_embedding_equal_to_the_targets_is_shared(models, tmp_path) -> None:
    head = make_eagle3_head(tmp_path / "head", models["MODEL"], layout="specforge")
    target_embedding = load_file(models["MODEL"] / "model.safetensors")["model.embed_tokens.weight"]
    rewrite_tensors(head, **{"embed_tokens.weight": target_embedding})
    llm = LLM(model=str(models["MODEL"]), device="cpu", max_model_len=128, speculative_model=str(head))
    proposer = get_model_runner(llm).draft_runner.proposer
    assert not any(parameter.shape == target_embedding.shape for parameter in proposer.parameters())
    llm.shutdown()


def rewrite_tensors(head: Path, **changes) -> None:
    """Change tensors of a head; None removes one."""
    tensors = load_file(head / "model.safetensors") | {name.replace("__", "."): t for name, t in changes.items()}
    save_file({name: t for name, t in tensors.items() if t is not None}, head / "model.safetensors")


BAD_TENSORS = {
    "lacks fc.weight": {"fc.weight": None},
    "lacks d2t": {"d2t": None},
    "has tensors that an EAGLE-3 head does not have: layers.1.mlp.up_proj.weight": {
        "layers.1.mlp.up_proj.weight": torch.zeros(2)
    },
    "tensor 'fc.weight' has shape [32, 64], but config.json asks for [32, 96]": {"fc.weight": torch.zeros(32, 64)},
    "tensor 'layers.0.self_attn.q_proj.weight' has shape [32, 32]": {
        "midlayer.self_attn.q_proj.weight": torch.zeros(32, 32)
    },
    "tensor 'd2t' has shape [7]": {"d2t": torch.zeros(7, dtype=torch.int64)},
    "makes token 500 of draft token 0, but the vocabulary has 320": {"d2t": torch.full((240,), 500)},
    "names a token twice": {"d2t": -torch.arange(240)},
    "'d2t' and 't2d'": {"t2d": torch.ones(320, dtype=torch.bool)},
}


@pytest.mark.parametrize("text", BAD_TENSORS)
def test_bad_tensors_are_refused(models, tmp_path, text: str) -> None:
    head = make_eagle3_head(tmp_path / "head", models["MODEL"], layout="specforge")
    rewrite_tensors(head, **BAD_TENSORS[text])
    assert text in get_refusal(models, speculative_model=str(head))


BAD_CONFIGS = {
    "a vocabulary of 400 tokens, the target one of 320": {"vocab_size": 400},
    "hidden states of 48 features, the target's have 32": {"target_hidden_size": 48},
    "hidden states of layers [1, 2, 9], the target has 0 to 1": {"eagle_aux_hidden_state_layer_ids": [1, 2, 9]},
    "a draft_vocab_size of 500 out of 320": {"draft_vocab_size": 500},
    "has 2 layers": {"num_hidden_layers": 2},
    "not supported: norm_before_fc": {"eagle_config": {"norm_before_fc": True}},
    "is no EAGLE-3 head but LlamaForCausalLM": {"architectures": ["LlamaForCausalLM"]},
    "a model_type that is known": {"model_type": "unheard-of"},
}


@pytest.mark.parametrize("text", BAD_CONFIGS)
def test_bad_configurations_are_refused(models, tmp_path, text: str) -> None:
    head = make_eagle3_head(tmp_path / "head", models["MODEL"], **BAD_CONFIGS[text])
    assert text in get_refusal(models, spec_method="eagle3", speculative_model=str(head))


def test_files_that_hold_no_head_are_refused(models, tmp_path) -> None:
    head = make_eagle3_head(tmp_path / "head", models["MODEL"])
    (head / "pytorch_model.bin").write_bytes(b"not a pickle")
    assert "pytorch_model.bin cannot be read" in get_refusal(models, speculative_model=str(head))
    torch.save({"fc.weight": Surprise()}, head / "pytorch_model.bin")
    assert "pytorch_model.bin cannot be read" in get_refusal(models, speculative_model=str(head))
    assert not Surprise.sprung
    (head / "pytorch_model.bin").unlink()
    assert "neither *.safetensors nor pytorch_model.bin" in get_refusal(models, speculative_model=str(head))
    assert "--spec-method eagle3" in get_refusal(models, spec_method="draft_model", speculative_model=str(head))
    old = json.loads((head / "config.json").read_text()) | {"architectures": ["EagleLlamaForCausalLM"]}
    (head / "config.json").write_text(json.dumps(old))
    assert "is an EAGLE head" in get_refusal(models, speculative_model=str(head))


class Surprise:
    """What unpickling would run."""

    sprung = False

    def __reduce__(self):
        return _spring, ()


def _spring() -> None:
    Surprise.sprung = True


def test_dummy_weights_need_a_configuration_alone(models, tmp_path) -> None:
    head = make_eagle3_head(tmp_path / "head", models["MODEL"])
    (head / "pytorch_model.bin").unlink()
    speculative_config = {"adaptive": False, "forced_acceptance": 0.5}
    llm = LLM(
        model=str(models["MODEL"]),
        device="cpu",
        max_model_len=128,
        load_format="dummy",
        speculative_config=speculative_config,
        speculative_model=str(head),
    )
    seeded = [SamplingParams(max_tokens=64, ignore_eos=True, seed=seed) for seed in range(len(PROMPTS))]
    llm.generate(PROMPTS, seeded)  # chance decides by seed: few tokens of other seeds may well leave these bounds
    assert 0.2 < llm.get_stats()["spec_decode_draft_acceptance_rate"] < 0.6
    llm.shutdown()
