"""The example package of VeRA adapters serves, in steps that run as captured ones do, the model with its weights
changed. That they are what PEFT computes is tested in the package."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.adapters.conftest import load_adapters, load_reference
from tests.adapters.test_engine import Captured, assert_right, make_prompts

from quire import LLM, SamplingParams
from quire.core.adapters import LoRARequest
from quire.core.testing.tiny_adapters import get_module_shapes

ROOT = Path(__file__).parents[2]


@pytest.fixture
def vera(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(ROOT / "examples" / "plugins" / "vera")
    from quire_vera.method import Vera

    return Vera


def test_vera_is_served(make_llm, base: Path, vera, tmp_path: Path) -> None:
    shapes = {name: shape for name, shape in get_module_shapes(base).items() if "gate" not in name}
    folders, references = {}, {-1: load_reference(base)}
    for slot in (0, 2):
        folders[slot] = tmp_path / str(slot)
        deltas = vera.save_example_adapter(folders[slot], shapes, slot)
        references[slot] = load_reference(base)
        with torch.no_grad():
            for name, delta in deltas.items():
                references[slot].get_submodule(name).weight += delta
    llm = make_llm(
        executor=Captured, max_num_batched_tokens=64, max_num_seqs=4, adapter_method="quire_vera.method:Vera"
    )
    load_adapters(llm, folders)
    greedy = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    for slots in ([0, -1, 2, 0], [2], [-1]):
        prompts = make_prompts(slots, [5, 17, 9, 33][: len(slots)])
        assert_right(llm.generate(prompts, greedy), slots, references, greedy)


def test_vera_is_served_by_name(base: Path, vera, tmp_path: Path) -> None:
    """As a caller asks for it: nothing between the caller and the method knows LoRA."""
    shapes = {name: shape for name, shape in get_module_shapes(base).items() if "v_proj" in name}
    reference = load_reference(base)
    with torch.no_grad():
        for name, delta in vera.save_example_adapter(tmp_path / "a", shapes, 1).items():
            reference.get_submodule(name).weight += delta
    settings = {"device": "cpu", "max_model_len": 64, "enable_lora": True, "max_lora_rank": 16}
    llm = LLM(
        str(base), adapter_method="quire_vera.method:Vera", lora_modules={"mine": str(tmp_path / "a")}, **settings
    )
    greedy = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    [output] = llm.generate([{"prompt_token_ids": [5, 6, 7, 8]}], greedy, lora_request=LoRARequest("mine", 1))
    llm.shutdown()
    assert_right([output], [0], {0: reference}, greedy)
