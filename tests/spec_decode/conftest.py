"""One tiny model, a reference of it, engines with every kind of proposer, and what tests give and compare."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from quire import LLM
from quire.core.errors import QuireError
from quire.core.testing.tiny_models import make_tiny_model
from quire.core.worker.model_runner import ModelRunner

from .eagle3_reference import make_eagle3_head

PROPOSERS = {
    "draft": {"spec_method": "draft_model", "speculative_model": "DRAFT"},
    "itself": {"spec_method": "draft_model", "speculative_model": "MODEL"},
    "eagle3": {"spec_method": "eagle3", "speculative_model": "HEAD"},
    "ngram": {"spec_method": "ngram", "plugin_options": {"spec_decode": {"prompt_lookup_min": "1"}}},
    "suffix": {"spec_method": "suffix"},
    "random": {"spec_method": "quire.core.testing.proposers:AdversarialDeviceProposer"},
    "outside": {
        "spec_method": "quire.core.testing.proposers:AdversarialDeviceProposer",
        "plugin_options": {"spec_decode": {"kind": "outside"}},
    },
    "long": {
        "spec_method": "quire.core.testing.proposers:AdversarialDeviceProposer",
        "plugin_options": {"spec_decode": {"kind": "long"}},
    },
    "short": {
        "spec_method": "quire.core.testing.proposers:AdversarialDeviceProposer",
        "plugin_options": {"spec_decode": {"kind": "short"}},
    },
    "host adversary": {"spec_method": "quire.core.testing.proposers:AdversarialHostProposer"},
    "failing": {"spec_method": "quire.core.testing.proposers:FailingProposer"},
    "repeater": {"spec_method": "quire.core.testing.proposers:LastTokenProposer"},
}


def get_model_runner(llm: LLM) -> ModelRunner:
    """The runner of an engine in this process."""
    return llm.engine_core.executor.worker.model_runner


def get_refusal(models: dict[str, Path], **arguments) -> str:
    """The one-line message with which an engine with these arguments refuses to start."""
    with pytest.raises(QuireError) as caught:
        LLM(model=str(models["MODEL"]), device="cpu", max_model_len=128, **arguments)
    message = str(caught.value)
    assert "\n" not in message
    return message


def make_prompts(seed: int, count: int) -> list[list[int]]:
    """Prompts of which some share a prefix and some repeat themselves."""
    rng = random.Random(seed)
    shared_prefix = [rng.randrange(3, 250) for _ in range(24)]
    prompts = []
    for i in range(count):
        suffix = [rng.randrange(3, 250) for _ in range(rng.randrange(1, 20))]
        prompts.append(shared_prefix[: rng.choice([0, 8, 24])] + suffix * (1 + i % 3))
    return prompts


def assert_same_outputs(actual, expected) -> None:
    """The same tokens, ends and texts, and log-probabilities but for rounding."""
    for one, other in zip(actual.outputs, expected.outputs, strict=True):
        assert one.token_ids == other.token_ids
        assert (one.finish_reason, one.stop_reason, one.text) == (other.finish_reason, other.stop_reason, other.text)
        assert (one.logprobs is None) == (other.logprobs is None)
        for left, right in zip(one.logprobs or [], other.logprobs or [], strict=True):
            chosen = next(iter(left))
            assert chosen == next(iter(right)) and left[chosen].rank == right[chosen].rank
            values = ([each.logprob for each in position.values()] for position in (left, right))
            assert next(values) == pytest.approx(next(values), abs=1e-4)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A target of few words, whose tokens often repeat, and a draft of half its layers."""
    folder = tmp_path_factory.mktemp("models")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 1}
    target = make_tiny_model("llama", folder / "target", **sizes)
    return {
        "MODEL": target,
        "HEAD": make_eagle3_head(folder / "head", target, [*make_prompts(1, 8), *make_prompts(4, 4)]),
        "DRAFT": make_tiny_model("llama", folder / "draft", num_hidden_layers=1, seed=3, **sizes),
    }


@pytest.fixture(scope="session")
def reference(models):
    return AutoModelForCausalLM.from_pretrained(models["MODEL"], dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def engine(models):
    """``engine(proposer, **arguments)``: one for each set of arguments; without a proposer: without speculation."""
    engines: dict[str, LLM] = {}

    def get(proposer: str | None = None, **arguments) -> LLM:
        key = f"{proposer} {arguments}"
        if key not in engines:
            settings = dict(PROPOSERS[proposer]) if proposer else {}
            if "speculative_model" in settings:
                settings["speculative_model"] = str(models[settings["speculative_model"]])
            if proposer:
                settings.setdefault("speculative_config", {"adaptive": False})
            sizes = {"max_model_len": 128, "max_num_seqs": 8, "block_size": 4}
            engines[key] = LLM(model=str(models["MODEL"]), device="cpu", **(sizes | settings | arguments))
        return engines[key]

    yield get
    for llm in engines.values():
        llm.shutdown()
