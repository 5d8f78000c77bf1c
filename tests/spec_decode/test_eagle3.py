"""EAGLE-3 heads: what they draft, by a reference of their own, and what is refused."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from quire import LLM, SamplingParams
from quire.core.sample.noise import gumbel
from quire.core.worker.cuda_graphs.prefill import PrefillGraphs, PrefillShapes

from .conftest import runner_of
from .heads import ReferenceHead, make_head
from .test_proposers import refused

SHARED = random.Random(1).sample(range(3, 250), 22)  # ends within a block of 4
PROMPTS = [SHARED[: (0, 22)[i % 3 > 0]] + [7 * i + j * j for j in range(3 + 2 * i)] * (1 + i % 2) for i in range(6)]


class Watched:
    """An engine whose every draft is noted, with the tokens that it was to continue, and how they were drawn."""

    def __init__(self, llm: LLM) -> None:
        runner = runner_of(llm)
        self.noted: list[tuple[list[int], list[int], float, int]] = []
        self._table, self._propose = runner.table, runner.draft_runner.proposer.propose
        runner.draft_runner.proposer.propose = self.propose

    def propose(self, who, count, *, greedy=False):
        drafts, table = self._propose(who, count, greedy=greedy), self._table
        for row, tokens in zip(who.tolist(), drafts.token_ids.tolist(), strict=True):
            known = table.token_ids[row, : int(table.num_tokens[row])].tolist()
            self.noted.append((known, tokens, float(table.temperature[row]), int(table.seed[row])))
        return drafts


@pytest.mark.parametrize("layout", ["eagle", "specforge", "speculators"])
def test_drafts_are_those_of_the_reference(models, reference, tmp_path, layout: str) -> None:
    """Prompts in chunks, prefixes that are shared and hit, preemption, drafts accepted and refused, with and without
    noise: that of the token in the target's vocabulary, so that both draw alike."""
    head = make_head(tmp_path / "head", models["MODEL"], PROMPTS, layout=layout)
    sizes = {"max_model_len": 128, "max_num_seqs": 4, "block_size": 4, "max_num_batched_tokens": 16}
    llm = LLM(
        model=str(models["MODEL"]), device="cpu", speculative_model=str(head), num_speculative_tokens=3,
        num_gpu_blocks_override=34, speculative_config={"adaptive": False}, **sizes,
    )  # fmt: skip
    watched, oracle = Watched(llm), ReferenceHead.of(head, reference)
    if layout == "specforge":  # steps with prompts laid out with padding, as they are captured on a GPU
        runner = runner_of(llm)
        shapes = PrefillShapes(num_prompt_tokens=(8, 16))
        runner.prefill_graphs = PrefillGraphs(runner.model, runner.backends, runner.kv_cache, runner.table, 16, shapes)
    for temperature in (0, 0, 0.4):
        wish = {"temperature": temperature, "max_tokens": 22, "ignore_eos": True}
        llm.generate(PROMPTS, [SamplingParams(**wish, seed=i) for i in range(len(PROMPTS))])
    stats = llm.get_stats()
    assert stats["num_preemptions_total"] > 0 and stats["prefix_cache_hits_total"] > 0
    assert all(stats[f"spec_decode_accepted_at_{i}_total"] > 0 for i in range(3))
    assert stats["spec_decode_draft_acceptance_rate"] < 0.9
    for known, drafts, temperature, seed in random.Random(0).sample(watched.noted, 90):

        def noise(place: int, seed: int = seed, temperature: float = temperature) -> torch.Tensor:
            return temperature * gumbel(torch.tensor([seed]), torch.tensor([place]), 320)[0].double()

        assert drafts == oracle.drafts(known, len(drafts), noise)
    llm.shutdown()


def test_an_embedding_that_is_the_targets_is_not_held_twice(models, tmp_path) -> None:
    head = make_head(tmp_path / "head", models["MODEL"], layout="specforge")
    theirs = load_file(models["MODEL"] / "model.safetensors")["model.embed_tokens.weight"]
    rewrite(head, **{"embed_tokens.weight": theirs})
    llm = LLM(model=str(models["MODEL"]), device="cpu", max_model_len=128, speculative_model=str(head))
    proposer = runner_of(llm).draft_runner.proposer
    assert not any(parameter.shape == theirs.shape for parameter in proposer.parameters())
    llm.shutdown()


def rewrite(head: Path, **changes) -> None:
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
    head = make_head(tmp_path / "head", models["MODEL"], layout="specforge")
    rewrite(head, **BAD_TENSORS[text])
    assert text in refused(models, speculative_model=str(head))


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
    head = make_head(tmp_path / "head", models["MODEL"], **BAD_CONFIGS[text])
    assert text in refused(models, spec_method="eagle3", speculative_model=str(head))


def test_files_that_hold_no_head_are_refused(models, tmp_path) -> None:
    head = make_head(tmp_path / "head", models["MODEL"])
    (head / "pytorch_model.bin").write_bytes(b"not a pickle")
    assert "pytorch_model.bin cannot be read" in refused(models, speculative_model=str(head))
    torch.save({"fc.weight": Surprise()}, head / "pytorch_model.bin")
    assert "pytorch_model.bin cannot be read" in refused(models, speculative_model=str(head))
    assert not Surprise.sprung
    (head / "pytorch_model.bin").unlink()
    assert "neither *.safetensors nor pytorch_model.bin" in refused(models, speculative_model=str(head))
    assert "--spec-method eagle3" in refused(models, spec_method="draft_model", speculative_model=str(head))
    old = json.loads((head / "config.json").read_text()) | {"architectures": ["EagleLlamaForCausalLM"]}
    (head / "config.json").write_text(json.dumps(old))
    assert "is an EAGLE head" in refused(models, speculative_model=str(head))


class Surprise:
    """What unpickling would run."""

    sprung = False

    def __reduce__(self):
        return _spring, ()


def _spring() -> None:
    Surprise.sprung = True


def test_dummy_weights_need_a_configuration_alone(models, tmp_path) -> None:
    head = make_head(tmp_path / "head", models["MODEL"])
    (head / "pytorch_model.bin").unlink()
    wish = {"adaptive": False, "forced_acceptance": 0.5}
    llm = LLM(
        model=str(models["MODEL"]), device="cpu", max_model_len=128, load_format="dummy", speculative_config=wish,
        speculative_model=str(head),
    )  # fmt: skip
    seeded = [SamplingParams(max_tokens=64, ignore_eos=True, seed=seed) for seed in range(len(PROMPTS))]
    llm.generate(PROMPTS, seeded)  # chance decides by seed: few tokens of other seeds may well leave these bounds
    assert 0.2 < llm.get_stats()["spec_decode_draft_acceptance_rate"] < 0.6
    llm.shutdown()
