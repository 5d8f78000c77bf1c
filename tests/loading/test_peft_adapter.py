"""Adapters as PEFT writes them: what is read, and what is refused in one line that names it."""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import shutil
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from quire.core.errors import CheckpointError
from quire.core.loading.peft_adapter import compute_content_hash, read_adapter
from quire.core.testing.tiny_adapters import get_module_shapes, make_tiny_adapter
from quire.core.testing.tiny_models import make_tiny_model


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model("llama", tmp_path_factory.mktemp("base"), num_hidden_layers=2)


@pytest.fixture(scope="module")
def shapes(base: Path) -> dict[str, tuple[int, int]]:
    return get_module_shapes(base)


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    return make_tiny_adapter(base, tmp_path / "adapter", rank=4, alpha=8, target_modules=["q_proj", "down_proj"])


def change_config(folder: Path, **fields: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def test_what_peft_wrote_is_what_is_read(adapter: Path, shapes: dict[str, tuple[int, int]]) -> None:
    read = read_adapter(adapter, max_rank=16, module_shapes=shapes)
    stored = load_file(adapter / "adapter_model.safetensors")
    assert sorted(read.modules) == sorted(name for name in shapes if name.endswith(("q_proj", "down_proj")))
    for name, weights in read.modules.items():
        assert torch.equal(weights.a, stored[f"base_model.model.{name}.lora_A.weight"])
        assert torch.equal(weights.b, stored[f"base_model.model.{name}.lora_B.weight"])
        assert weights.scaling == 2.0
    assert read.max_rank == 4
    assert read.num_bytes == sum(tensor.nbytes for tensor in stored.values())


def test_an_adapter_of_the_model_without_its_head_is_read(adapter: Path, shapes: dict[str, tuple[int, int]]) -> None:
    names = set(read_adapter(adapter, max_rank=4, module_shapes=shapes).modules)

    def strip(tensors: dict[str, torch.Tensor]) -> None:
        for key in list(tensors):
            tensors[key.replace("model.model.", "model.", 1)] = tensors.pop(key)

    change_tensors(adapter, strip)
    assert set(read_adapter(adapter, max_rank=4, module_shapes=shapes).modules) == names
    assert set(read_adapter(adapter, max_rank=4).modules) == names


def test_ranks_and_scalings_by_pattern(base: Path, tmp_path: Path, shapes: dict[str, tuple[int, int]]) -> None:
    adapter = make_tiny_adapter(base, tmp_path / "a", rank=4, alpha=8, target_modules=["q_proj", "k_proj"])

    def widen(tensors: dict[str, torch.Tensor]) -> None:
        for key, tensor in tensors.items():
            if "layers.1.self_attn.k_proj" in key:
                tensors[key] = tensor.repeat(4, 1) if "lora_A" in key else tensor.repeat(1, 4)

    change_tensors(adapter, widen)
    change_config(
        adapter, use_rslora=True, rank_pattern={"layers.1.self_attn.k_proj": 16}, alpha_pattern={"k_proj": 2.0}
    )
    modules = read_adapter(adapter, max_rank=16, module_shapes=shapes).modules
    assert modules["model.layers.0.self_attn.q_proj"].scaling == pytest.approx(8 / 2)
    assert modules["model.layers.0.self_attn.k_proj"].scaling == pytest.approx(2 / 2)
    assert modules["model.layers.1.self_attn.k_proj"].scaling == pytest.approx(2 / 4)
    assert modules["model.layers.1.self_attn.k_proj"].rank == 16


def test_the_hash_is_of_the_content(adapter: Path, tmp_path: Path) -> None:
    first = read_adapter(adapter, max_rank=4).content_hash
    copy = shutil.copytree(adapter, tmp_path / "elsewhere")
    assert read_adapter(copy, max_rank=4).content_hash == first
    change_config(copy, lora_alpha=9)
    assert read_adapter(copy, max_rank=4).content_hash != first
    change_tensors(adapter, lambda tensors: tensors[min(tensors)].mul_(2))
    assert read_adapter(adapter, max_rank=4).content_hash != first
    with pytest.raises(CheckpointError, match="have changed since it was loaded"):
        read_adapter(adapter, max_rank=4, content_hash=first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_dtype_of_peft_is_read_bit_by_bit(adapter: Path, dtype: torch.dtype) -> None:
    file = adapter / "adapter_model.safetensors"
    stored = {key: tensor.to(dtype) for key, tensor in load_file(file).items()}
    save_file(stored, file, {"format": "pt", "shape": "of a kind", "dtype": "none"})
    for name, weights in read_adapter(adapter, max_rank=4).modules.items():
        for matrix, tensor in (("A", weights.a), ("B", weights.b)):
            expected = stored[f"base_model.model.{name}.lora_{matrix}.weight"]
            assert tensor.dtype == dtype and torch.equal(tensor, expected)


def test_reading_leaves_nothing_behind(adapter: Path) -> None:
    """Adapters come and go for as long as a server runs."""
    read_adapter(adapter, max_rank=4)
    tracemalloc.start()
    try:
        before = tracemalloc.take_snapshot()
        for _ in range(20):
            read_adapter(adapter, max_rank=4)
        gc.collect()
        left = tracemalloc.take_snapshot().compare_to(before, "lineno")
    finally:
        tracemalloc.stop()
    of_reader = [each for each in left if each.traceback[0].filename.endswith("peft_adapter.py")]
    assert sum(each.size_diff for each in of_reader) < 20 * 1000, of_reader[:3]


def test_weights_take_the_dtype_that_is_asked_for(adapter: Path) -> None:
    read = read_adapter(adapter, max_rank=4, dtype=torch.bfloat16)
    assert {tensor.dtype for each in read.modules.values() for tensor in (each.a, each.b)} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save \['lm_head'\]"),
        ({"peft_type": "IA3"}, "peft_type IA3"),
        ({"bias": "all"}, "bias all"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa"),
        ({"init_lora_weights": "lora_ga"}, "lora_ga: an adapter of a base with other weights"),
        ({"kasa_config": {"beta": 0.1}}, "KaSA"),
        ({"target_modules": ["q_proj", "query_key_value"]}, "target module 'query_key_value' is none of the model's"),
        ({"r": 64}, "rank 64 is above --max-lora-rank 16"),
        ({"r": 0}, "r must be at least 1"),
        ({"r": "many"}, r"Expected `int`, got `str` - at `\$.r`"),
        ({"r": 8}, r"lora_A of .* has shape \[4, "),
        ({"rank_pattern": {"(": 4}}, r"the pattern '\(' cannot be used: unclosed group"),
        ({"rank_pattern": {r"\w{200}": 4}}, r"the pattern .* cannot be used: it has a counted repeat"),
        ({"rank_pattern": {"x" * 257: 4}}, "a pattern has 257 characters, of at most 256"),
        ({"alpha_pattern": {f"{i}_proj": 4.0 for i in range(4097)}}, "have 4097 entries, of at most 4096"),
        ({"alpha_pattern": {"(?!up)_proj": 4}}, "look-around, including look-ahead and look-behind, is not supported"),
        ({"target_modules": ["q_proj", "lm_head"]}, "changes 'lm_head', and adapters cannot change .* the head"),
        ({"comment": "x" * (1 << 20)}, "has more than 1048576 bytes"),
    ],
)
def test_a_config_that_is_not_plain_lora_is_refused_by_name(
    adapter: Path, shapes: dict[str, tuple[int, int]], fields: dict[str, Any], says: str
) -> None:
    change_config(adapter, **fields)
    with pytest.raises(CheckpointError, match=says) as refused:
        read_adapter(adapter, max_rank=16, module_shapes=shapes)
    assert "\n" not in str(refused.value)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of transformers, about what peft imports
def test_every_variant_of_peft_is_refused_by_name(adapter: Path, shapes: dict[str, tuple[int, int]]) -> None:
    """All but that which changes training alone: a new one has to be looked at."""
    peft = pytest.importorskip("peft")
    variants = {field.name for field in dataclasses.fields(peft.LoraConfig) if field.metadata.get("is_lora_variant")}
    for name in sorted(variants - {"velora_config"}):
        config = (adapter / "adapter_config.json").read_text()
        change_config(adapter, **{name: [1, 2] if name == "alora_invocation_tokens" else {"field": 1}})
        if name.startswith("use_") and isinstance(getattr(peft.LoraConfig(), name), bool):
            change_config(adapter, **{name: True})
        with pytest.raises(CheckpointError, match=f"is not plain LoRA .*{name}"):
            read_adapter(adapter, max_rank=16, module_shapes=shapes)
        (adapter / "adapter_config.json").write_text(config)


def test_a_pattern_takes_no_longer_than_its_text(adapter: Path, shapes: dict[str, tuple[int, int]]) -> None:
    """It would hold the whole process where an engine that backtracks looked for it."""
    change_config(adapter, rank_pattern={r"(([a-z_.0-9])+)+!": 8}, alpha_pattern={r".*.*.*.*.*.*.*.*.*.*!": 1})
    begin = time.monotonic()
    read = read_adapter(adapter, max_rank=16, module_shapes=shapes)
    assert read.max_rank == 4 and time.monotonic() - begin < 5


def test_a_pattern_for_every_module_is_read_at_once(adapter: Path) -> None:
    """As PEFT writes them for adapters whose ranks it chose."""
    names = [f"model.layers.{layer}.mlp.{part}_proj" for layer in range(80) for part in ("gate", "up", "down")]
    change_config(adapter, rank_pattern=dict.fromkeys(names, 4), alpha_pattern=dict.fromkeys(names, 8.0))
    config = read_adapter(adapter, max_rank=16).config
    begin = time.thread_time()
    assert {config.get_scaling(name) for name in names} == {2.0}
    assert time.thread_time() - begin < 2


def test_patterns_that_are_null_are_none(adapter: Path) -> None:
    change_config(adapter, rank_pattern=None, alpha_pattern=None)
    assert read_adapter(adapter, max_rank=4).max_rank == 4


def test_a_configuration_without_end_is_refused_in_one_line(adapter: Path) -> None:
    file = adapter / "adapter_config.json"
    file.write_text('{"r": 4, "lora_alpha": 4, "layer_replication": ' + "[" * 10**5 + "]" * 10**5 + "}")
    with pytest.raises(CheckpointError, match="is not an adapter's configuration: maximum recursion depth"):
        read_adapter(adapter, max_rank=4)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_pipe_that_nobody_writes_to_is_refused_and_not_waited_for(adapter: Path, name: str) -> None:
    (adapter / name).unlink()
    os.mkfifo(adapter / name)
    for read in (lambda: read_adapter(adapter, max_rank=4), lambda: compute_content_hash(adapter)):
        with pytest.raises(CheckpointError, match=f"has {name}, which cannot be read .it is not a regular file"):
            read()


KEY = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t.update({f"{KEY}.lora_B.weight": torch.ones(3, 4)}), r"lora_B of .*q_proj' has shape \[3, 4\]"),
        (lambda t: t.update({f"{KEY}.lora_A.weight": torch.ones(4)}), r"lora_A of .*q_proj' has shape \[4\]"),
        (lambda t: t.pop(f"{KEY}.lora_B.weight"), "only one of lora_A and lora_B"),
        (lambda t: t[f"{KEY}.lora_B.weight"].fill_(float("nan")), "infinite or undefined"),
        (
            lambda t: t.update({f"{KEY}.lora_A.weight": torch.ones(4, 64, dtype=torch.int8)}),
            "is stored as I8; save it as 32 or",
        ),
        (lambda t: t.update({f"{KEY}.lora_magnitude_vector": torch.ones(64)}), "lora_magnitude_vector"),
        (lambda t: t.update({"base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(4, 320)}), "embed"),
        (
            lambda t: t.update({"model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(4, 64)}),
            "'base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight' and 'model.layers.0.* are of one module",
        ),
        (lambda t: t.update({"base_model.model.lm_head.lora_A.weight": torch.ones(4, 64)}), "changes 'lm_head', and"),
        (lambda t: t.clear(), "no tensors"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_name(
    adapter: Path, shapes: dict[str, tuple[int, int]], change: Callable[[dict[str, torch.Tensor]], object], says: str
) -> None:
    change_tensors(adapter, change)
    with pytest.raises(CheckpointError, match=says) as refused:
        read_adapter(adapter, max_rank=16, module_shapes=shapes)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("matrix", "value", "scaling", "says"),
    [
        ("A", 1e5, 1, r"lora_A of '.*q_proj' is beyond the range of torch.float16"),
        ("B", -1e5, 1, r"lora_B of '.*q_proj' times its scaling of 1 is beyond"),
        ("B", 4e4, 2, r"lora_B of '.*q_proj' times its scaling of 2 is beyond"),
    ],
)
def test_numbers_beyond_the_range_that_is_asked_for_are_refused(
    adapter: Path, matrix: str, value: float, scaling: int, says: str
) -> None:
    """They would be infinite in the slot, and logits of others that read it no numbers."""
    change_config(adapter, lora_alpha=4 * scaling)
    change_tensors(adapter, lambda tensors: tensors[f"{KEY}.lora_{matrix}.weight"][0].fill_(value))
    with pytest.raises(CheckpointError, match=says) as refused:
        read_adapter(adapter, max_rank=4, dtype=torch.float16)
    assert str(adapter) in str(refused.value) and "\n" not in str(refused.value)
    read_adapter(adapter, max_rank=4, dtype=torch.bfloat16)


def test_an_adapter_of_another_base_says_which(base: Path, tmp_path: Path, shapes: dict[str, tuple[int, int]]) -> None:
    other = make_tiny_model("llama", tmp_path / "other", hidden_size=96)
    adapter = make_tiny_adapter(other, tmp_path / "adapter", base_model_name_or_path="acme/other")
    with pytest.raises(CheckpointError, match=r"trained on 'acme/other'.* is not an adapter of this model"):
        read_adapter(adapter, max_rank=16, module_shapes=shapes)
    deeper = make_tiny_model("llama", tmp_path / "deeper", num_hidden_layers=3)
    adapter = make_tiny_adapter(deeper, tmp_path / "deeper-adapter")
    with pytest.raises(CheckpointError, match=r"weights for 'model\.layers\.2\..*no linear layer of this model"):
        read_adapter(adapter, max_rank=16, module_shapes=shapes)


def test_folders_without_what_is_needed(adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere' is not a folder"):
        read_adapter(tmp_path / "nowhere", max_rank=4)
    weights = adapter / "adapter_model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match="is truncated or not a safetensors file"):
        read_adapter(adapter, max_rank=4)
    os.truncate(weights, 1 << 40)  # which takes no place on the disk, and a quarter of an hour to hash
    begin = time.monotonic()
    for read in (lambda: read_adapter(adapter, max_rank=4), lambda: compute_content_hash(adapter)):
        with pytest.raises(CheckpointError, match="is truncated or not a safetensors file"):
            read()
    assert time.monotonic() - begin < 5
    weights.write_bytes(data[: len(data) // 2])
    weights.rename(adapter / "adapter_model.bin")
    with pytest.raises(CheckpointError, match=r"only adapter_model\.bin, a pickle"):
        read_adapter(adapter, max_rank=4)
    (adapter / "adapter_model.bin").unlink()
    with pytest.raises(CheckpointError, match=r"has no adapter_model\.safetensors"):
        read_adapter(adapter, max_rank=4)
    (adapter / "adapter_config.json").write_text("{")
    weights.write_bytes(data)
    with pytest.raises(CheckpointError, match="is not an adapter's configuration"):
        read_adapter(adapter, max_rank=4)
    (adapter / "adapter_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no adapter_config\.json"):
        read_adapter(adapter, max_rank=4)
