"""Engines whose model is shared by ranks, each a thread, beside engines of the same model in one piece."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from tests.spec_decode.eagle3_reference import make_eagle3_head

from quire import LLM, RequestOutput, SamplingParams, StructuredOutputsParams
from quire.core.testing.tiny_models import make_tiny_model

EXECUTOR = "quire.core.testing.thread_executor:ThreadRanksExecutor"
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "mistral": {"num_key_value_heads": 1, "vocab_size": 321, "sliding_window": None},
    "qwen2": {"vocab_size": 323},
    "qwen3": {"tie_word_embeddings": True},
}
PROPOSERS: dict[str, dict[str, Any]] = {
    "none": {},
    "draft": {"spec_method": "draft_model", "speculative_model": "draft"},
    "eagle3": {"spec_method": "eagle3", "speculative_model": "head"},
    "ngram": {"spec_method": "ngram", "plugin_options": {"spec_decode": {"prompt_lookup_min": "1"}}},
    "suffix": {"spec_method": "suffix"},
}
SHARED = list(range(40, 75))
PROMPTS = [
    [*(SHARED if i % 3 else []), *([11 + i, 12, 13 + i] * (1 + i % 4)), *range(20, 20 + 3 * i)] for i in range(16)
]
"""Some share a beginning, some repeat themselves; lengths of 3 to 90."""


def make_params(max_tokens: int = 10) -> list[SamplingParams]:
    """One request of every kind of sampling."""
    fields: list[dict[str, Any]] = [
        {},
        {"temperature": 1.0},
        {"temperature": 0.8, "top_k": 5},
        {"temperature": 1.2, "top_k": 30, "top_p": 0.9},
        {"temperature": 0.9, "top_p": 0.8},
        {"temperature": 1.5, "min_p": 0.1},
        {"temperature": 0.7, "frequency_penalty": 0.5, "repetition_penalty": 1.1},
        {"logprobs": 3},
        {"temperature": 1.0, "logprobs": 1},
        {"bad_words": ["a", "b"]},
        {"logit_bias": {7: 4.0, 9: -3.0}},
        {"allowed_token_ids": [5, 70, 200, 300]},
        {"min_tokens": 5, "ignore_eos": False},
        {"n": 2, "temperature": 0.9},
        {"prompt_logprobs": 2},
        {"structured_outputs": StructuredOutputsParams(regex="[0-9]{3}-[a-f]{9}")},
    ]
    shared = {"temperature": 0.0, "max_tokens": max_tokens, "ignore_eos": True}
    return [SamplingParams(**({**shared, "seed": i} | each)) for i, each in enumerate(fields)]


class ModelFolders:
    """The models of each family, made when they are first asked for."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def get(self, family: str, kind: str = "model") -> Path:
        """A ``model``, a ``draft`` model of one layer, or an EAGLE-3 ``head``."""
        folder, sizes = self._root / family / kind, FAMILIES[family]
        if folder.exists():
            return folder
        if kind == "head":
            return make_eagle3_head(folder, self.get(family), PROMPTS[:3], num_heads=4)
        return make_tiny_model(
            family, folder, **sizes, **({"num_hidden_layers": 1, "seed": 3} if kind == "draft" else {})
        )


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> ModelFolders:
    return ModelFolders(tmp_path_factory.mktemp("parallel"))


@contextmanager
def open_engine(
    folders: ModelFolders, family: str, proposer: str = "none", size: int = 1, stages: int = 1, **arguments: Any
) -> Iterator[LLM]:
    """An engine of a family's model, its layers divided between ``stages``, and each shared by ``size`` ranks."""
    settings = dict(PROPOSERS[proposer])
    if "speculative_model" in settings:
        settings["speculative_model"] = str(folders.get(family, settings["speculative_model"]))
    if settings:
        settings |= {"speculative_config": {"adaptive": False}, "num_speculative_tokens": 3}
    if size * stages > 1:
        settings |= {"executor": EXECUTOR, "tensor_parallel_size": size, "pipeline_parallel_size": stages}
    sizes = {"max_model_len": 160, "max_num_seqs": 8, "block_size": 4, "max_num_batched_tokens": 48, "cpu_threads": 1}
    llm = LLM(str(folders.get(family)), device="cpu", **(sizes | settings | arguments))
    try:
        yield llm
    finally:
        llm.shutdown()


def make_two_layers(fixture: Path, folder: Path) -> Path:
    """A quantized checkpoint of one layer with that layer twice, which two stages can share."""
    folder.mkdir(parents=True)
    for file in fixture.iterdir():
        if file.suffix == ".json" and "index" not in file.name:
            text = file.read_text()
            if file.name == "config.json":
                config = json.loads(text) | {"num_hidden_layers": 2}
                if "layer_types" in config:
                    config["layer_types"] *= 2
                text = json.dumps(config)
            (folder / file.name).write_text(text)
    tensors = load_file(fixture / "model.safetensors")
    second = {name.replace("layers.0.", "layers.1."): tensor.clone() for name, tensor in tensors.items()}
    save_file(tensors | second, folder / "model.safetensors", {"format": "pt"})
    return folder


def assert_same(llm: LLM, expected: Sequence[RequestOutput], params: Sequence[SamplingParams]) -> None:
    """Raise unless ``llm`` continues ``PROMPTS`` as ``expected``, log-probabilities but for rounding."""
    outputs = llm.generate(PROMPTS[: len(params)], list(params))
    for output, reference, asked in zip(outputs, expected, params, strict=False):
        assert len(output.outputs) == len(reference.outputs)
        assert_near(output.prompt_logprobs, reference.prompt_logprobs)
        for one, other in zip(output.outputs, reference.outputs, strict=True):
            assert (one.token_ids, one.finish_reason) == (other.token_ids, other.finish_reason), asked
            assert_near(one.logprobs, other.logprobs)


def assert_near(actual: Any, expected: Any) -> None:
    assert (actual is None) == (expected is None)
    for one, other in zip(actual or [], expected or [], strict=True):
        assert (one is None) == (other is None)
        values = {token: each.logprob for token, each in (one or {}).items()}
        assert values == pytest.approx({token: each.logprob for token, each in (other or {}).items()}, abs=1e-3)
