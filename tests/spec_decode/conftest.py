"""One tiny model, a reference of it, and engines that draft in every way there is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from quire import LLM
from quire.core.testing.tiny_models import make_tiny_model
from quire.core.worker.model_runner import ModelRunner

from .heads import make_head

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


def runner_of(llm: LLM) -> ModelRunner:
    """What runs the steps of an engine, in this process."""
    return llm.engine_core.executor.worker.model_runner


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A target of few words, whose tokens often repeat, and a draft of half its layers."""
    folder = tmp_path_factory.mktemp("models")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 1}
    from .test_exact import prompts_for

    target = make_tiny_model("llama", folder / "target", **sizes)
    return {
        "MODEL": target,
        "HEAD": make_head(folder / "head", target, [*prompts_for(1, 8), *prompts_for(4, 4)]),
        "DRAFT": make_tiny_model("llama", folder / "draft", num_hidden_layers=1, seed=3, **sizes),
    }


@pytest.fixture(scope="session")
def reference(models):
    return AutoModelForCausalLM.from_pretrained(models["MODEL"], dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def engine(models):
    """``engine(proposer, **arguments)``: made once for the same arguments; no name: without speculation."""
    made: dict[str, LLM] = {}

    def get(proposer: str | None = None, **arguments) -> LLM:
        key = f"{proposer} {arguments}"
        if key not in made:
            wishes = dict(PROPOSERS[proposer]) if proposer else {}
            if "speculative_model" in wishes:
                wishes["speculative_model"] = str(models[wishes["speculative_model"]])
            if proposer:
                wishes.setdefault("speculative_config", {"adaptive": False})
            sizes = {"max_model_len": 128, "max_num_seqs": 8, "block_size": 4}
            made[key] = LLM(model=str(models["MODEL"]), device="cpu", **(sizes | wishes | arguments))
        return made[key]

    yield get
    for llm in made.values():
        llm.shutdown()
