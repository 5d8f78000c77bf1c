"""Requests with adapters get the tokens of transformers with the adapter merged into its weights, whatever is beside
them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.adapters.conftest import FIRST_ADAPTER_TOKEN, SlotByToken, load_adapters, load_reference, merge_adapter
from tests.spec_decode.captured_steps import RepeatingCapturer
from tests.spec_decode.conftest import PROPOSERS

from quire import SamplingParams
from quire.core.contracts.executor import KVCapacity
from quire.core.testing.tiny_adapters import make_tiny_adapter
from quire.core.testing.tiny_models import make_tiny_model
from quire.core.worker.cuda_graphs.decode import DecodeGraphs
from quire.core.worker.cuda_graphs.prefill import PrefillGraphs
from quire.plugins.spec_decode.eagle3 import Eagle3Proposer
from quire.testing import assert_matches_reference

SLOTS = [-1, 0, 1, 2, 3, 0, -1, 2]
LENGTHS = [5, 17, 9, 1, 33, 2, 12, 40]


class Captured(SlotByToken):
    """Runs steps padded as they are captured, by the code of the graphs: a replay launches once more."""

    num_runs: dict[str, int] = {}

    def start(self) -> KVCapacity:
        capacity = super().start()
        runner = self.worker.model_runner
        with torch.inference_mode():
            for backend in runner.backends:
                backend.graph_support = frozenset({"decode", "verify"})
            runner.decode_graphs = DecodeGraphs(
                runner.model, runner.backends, runner.kv_cache, runner.table, runner.block_size, None,
                runner.max_draft_tokens, adapters=runner.adapters,
            )  # fmt: skip
            runner.decode_graphs.capture_graphs(RepeatingCapturer())
            runner.prefill_graphs = PrefillGraphs(
                runner.model, runner.backends, runner.kv_cache, runner.table, 64, adapters=runner.adapters
            )
        for name, graphs in (("decode", runner.decode_graphs), ("prefill", runner.prefill_graphs)):
            self.count_runs(name, graphs)
        return capacity

    def count_runs(self, name: str, graphs: Any) -> None:
        run_model = graphs.run_model

        def run_counted(*arguments: Any) -> Any:
            Captured.num_runs[name] = Captured.num_runs.get(name, 0) + 1
            return run_model(*arguments)

        graphs.run_model = run_counted


def make_prompts(slots: list[int], lengths: list[int]) -> list[list[int]]:
    first = [50 if slot < 0 else FIRST_ADAPTER_TOKEN + slot for slot in slots]
    return [
        [token, *((7 * i + 3 * j) % 90 + 5 for j in range(length - 1))]
        for i, (token, length) in enumerate(zip(first, lengths, strict=True))
    ]


def assert_right(outputs: list[Any], slots: list[int], references: dict[int, Any], params: SamplingParams) -> None:
    for output, slot in zip(outputs, slots, strict=True):
        for completion in output.outputs:
            seed = 0 if params.greedy else (params.seed or 0) + completion.index
            assert_matches_reference(
                references[slot], output.prompt_token_ids, completion.token_ids, params, seed=seed, tolerance=2e-3
            )


APPENDED = {"plugin_options": {"adapter": {"append_to_weight": True}}}


@pytest.mark.parametrize("settings", [{}, APPENDED], ids=["default", "appended"])
def test_batches_mix_adapters(make_llm, folders, references, settings: dict[str, Any]) -> None:
    llm = make_llm(**settings)
    load_adapters(llm, folders)
    greedy = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    outputs = llm.generate(make_prompts(SLOTS, LENGTHS), greedy)
    assert_right(outputs, SLOTS, references, greedy)
    assert len({tuple(output.outputs[0].token_ids) for output in outputs}) == len(outputs)
    alone = llm.generate(make_prompts([0], [300 // 3]), greedy)  # one adapter for all tokens
    assert_right(alone, [0], references, greedy)


def test_chunks_preemption_several_answers_and_cached_prefixes(make_llm, folders, references) -> None:
    llm = make_llm(
        max_num_seqs=6, max_num_batched_tokens=12, max_model_len=72, block_size=4, num_gpu_blocks_override=24
    )
    load_adapters(llm, folders)
    params = SamplingParams(temperature=0.8, seed=5, n=2, max_tokens=20, ignore_eos=True)
    prompts = make_prompts(SLOTS, LENGTHS)
    for _ in range(2):  # the second time with what is cached of the first
        assert_right(llm.generate(prompts, params), SLOTS, references, params)
    stats = llm.get_stats()
    assert stats["num_preemptions_total"] > 0 and stats["prefix_cache_hits_total"] > 0


@pytest.mark.parametrize("proposer", ["itself", "eagle3", "ngram", "suffix", "random", "repeater"])
def test_drafts_have_no_adapter_and_change_nothing(
    make_llm, base, folders, references, tmp_path: Path, proposer: str
) -> None:
    settings = dict(PROPOSERS[proposer])
    if "speculative_model" in settings:
        settings["speculative_model"] = str(base)
    if proposer == "eagle3":  # it reads hidden states of the target, the adapters' part in them
        Eagle3Proposer.save_example_model(base, tmp_path)
        settings["speculative_model"] = str(tmp_path)
    llm = make_llm(num_speculative_tokens=2, speculative_config={"adaptive": False}, **settings)
    load_adapters(llm, folders)
    greedy = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    prompts = make_prompts(SLOTS[:5], LENGTHS[:5])
    prompts = [[*prompt, *prompt[1:], *prompt[1:]] for prompt in prompts]  # texts that repeat themselves
    for _ in range(2 if proposer == "suffix" else 1):  # that one drafts what it has seen before
        assert_right(llm.generate(prompts, greedy), SLOTS[:5], references, greedy)
    assert llm.get_stats()["spec_decode_num_draft_tokens_total"] > 0


@pytest.mark.parametrize("settings", [{}, APPENDED], ids=["default", "appended"])
@pytest.mark.parametrize("with_drafts", [False, True], ids=["decodes", "drafts"])
def test_captured_steps(make_llm, folders, references, with_drafts: bool, settings: dict[str, Any]) -> None:
    """Decode and prompt steps padded as on a GPU, with and without adapters in turn."""
    drafts = {"num_speculative_tokens": 2, "speculative_config": {"adaptive": False}, **PROPOSERS["ngram"]}
    if with_drafts:
        options = drafts["plugin_options"] | settings.get("plugin_options", {})
        settings = drafts | {"plugin_options": options}
    llm = make_llm(executor=Captured, max_num_batched_tokens=64, max_num_seqs=4, **settings)
    load_adapters(llm, folders)
    Captured.num_runs.clear()
    greedy = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    for slots in ([-1, -1], [0, -1, 3], [2], [1, 1, 2, 0]):
        prompts = make_prompts(slots, LENGTHS[: len(slots)])
        assert_right(llm.generate(prompts, greedy), slots, references, greedy)
    assert min(Captured.num_runs.values()) >= 4 and len(Captured.num_runs) == 2


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3"])
def test_families(make_llm, tmp_path: Path, family: str) -> None:
    model = make_tiny_model(family, tmp_path / family, num_hidden_layers=1)
    folders = {0: make_tiny_adapter(model, tmp_path / "a", rank=6, seed=1)}
    llm = make_llm(model)
    load_adapters(llm, folders)
    references = {-1: load_reference(model), 0: merge_adapter(load_reference(model), folders[0])}
    greedy = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    assert_right(llm.generate(make_prompts([0, -1, 0], [9, 4, 20]), greedy), [0, -1, 0], references, greedy)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of transformers, about what peft calls
def test_peft_computes_the_same(base: Path, folders: dict[int, Path], references: dict[int, Any]) -> None:
    """The references of these tests are PEFT's."""
    peft = pytest.importorskip("peft")
    ids = torch.arange(5, 40)[None]
    for slot, folder in folders.items():
        adapted = peft.PeftModel.from_pretrained(load_reference(base), folder).eval()
        with torch.inference_mode():
            assert torch.allclose(adapted(ids).logits, references[slot](ids).logits, atol=2e-3)
