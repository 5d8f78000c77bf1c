"""On a GPU: steps with adapters, captured and eager, follow transformers with the adapters merged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.adapters.conftest import SlotByToken, call_worker, merge_adapter
from tests.adapters.test_engine import make_prompts
from transformers import AutoModelForCausalLM

from quire import LLM, SamplingParams
from quire.core.testing.oracle import compute_worst_gap
from quire.core.testing.tiny_adapters import make_tiny_adapter

pytestmark = pytest.mark.gpu

MODEL = Path(__file__).resolve().parents[2] / "core" / "assets" / "quire-tiny"
GREEDY = SamplingParams(temperature=0, max_tokens=32, ignore_eos=True)
SLOTS = [-1, 0, 1, 2, 3, 0, -1, 2, 1, 1, 1, -1]
LENGTHS = [5, 170, 90, 1, 330, 2, 12, 40, 60, 61, 62, 700]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    where = tmp_path_factory.mktemp("adapters")
    make = {
        0: {"rank": 16},
        1: {"rank": 1, "target_modules": ["q_proj", "v_proj"]},
        2: {"rank": 64, "target_modules": ["up_proj", "down_proj"]},
        3: {"rank": 17},
    }
    return {
        slot: make_tiny_adapter(MODEL, where / str(slot), seed=slot, scale=0.1, **settings)
        for slot, settings in make.items()
    }


@pytest.fixture(scope="module")
def references(folders: dict[int, Path]) -> dict[int, Any]:
    def load() -> Any:
        return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()

    return {-1: load().cuda(), **{slot: merge_adapter(load(), path).cuda() for slot, path in folders.items()}}


@pytest.mark.parametrize("eager", [False, True], ids=["graphs", "eager"])
@pytest.mark.parametrize(
    ("settings", "tolerance"),
    [
        ({"dtype": "float32"}, 5e-3),
        ({"dtype": "bfloat16"}, 0.6),
        ({"dtype": "bfloat16", "plugin_options": {"adapter": {"append_to_weight": True}}}, 0.6),
        ({"quantization": "fp8"}, 2.0),
        ({"dtype": "bfloat16", "plugin_options": {"adapter": {"append_to_weight": False}}}, 0.6),
    ],
    ids=["float32", "bfloat16", "appended", "fp8", "behind"],
)
def test_tokens_follow_the_merged_model(
    folders, references, settings: dict[str, Any], tolerance: float, eager: bool, waiting_forbidden: None
) -> None:
    llm = LLM(
        str(MODEL),
        executor=f"{SlotByToken.__module__}:{SlotByToken.__qualname__}",
        enforce_eager=eager,
        num_gpu_blocks_override=2000,
        max_num_seqs=24,
        max_num_batched_tokens=256,
        **settings,
    )
    load_on_gpu(llm, folders)
    for slots, lengths in ((SLOTS, LENGTHS), ([0], [200]), (SLOTS[:6], LENGTHS[:6]), ([-1] * 3, [4, 5, 6])):
        for output, slot in zip(llm.generate(make_prompts(slots, lengths), GREEDY), slots, strict=True):
            gap = compute_worst_gap(references[slot], output.prompt_token_ids, output.outputs[0].token_ids, GREEDY)
            assert gap <= tolerance, f"slot {slot}"
    llm.shutdown()


def load_on_gpu(llm: LLM, folders: dict[int, Path]) -> None:
    for slot, folder in folders.items():
        while not call_worker(llm, "stage_adapter", adapter_id=slot + 1, path=str(folder)):
            pass
        while not call_worker(llm, "load_adapter", slot=slot, adapter_id=slot + 1):
            pass
