"""What loaders do with checkpoints that are wrong, not supported, not quantized, or spelled by older tools."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.models.paged import PagedRunner
from tests.quant.test_fixtures import FIXTURES, load
from tests.quant.tolerances import FLOAT32, assert_near
from torch import Tensor, nn

from quire.core.errors import CheckpointError, PluginError
from quire.core.layers.kv_scales import KVScales
from quire.core.testing.tiny_models import make_tiny_model

ONE_OF_EACH = [
    "awq-gemm-llama",
    "awq-gemv-fast-qwen3",
    "ct-fp8-block-llama",
    "ct-fp8-dynamic-qwen3",
    "ct-mixed-llama",
    "ct-w4a16-asym-llama",
    "ct-w8a8-mistral",
    "gptq-act-order-qwen2",
    "gptq-dynamic-llama",
]
KV_FP8 = torch.float8_e4m3fn
TOKENS = torch.randint(0, 256, (20,), generator=torch.Generator().manual_seed(3)).tolist()


@pytest.fixture
def copy(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    shutil.copytree(FIXTURES / getattr(request, "param", "gptq-act-order-qwen2"), folder)
    return folder


def refused(path: Path, error: type[Exception] = CheckpointError, **options: Any) -> str:
    with pytest.raises(error) as caught:
        load(path, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def change(path: Path, tensors: dict[str, Tensor]) -> None:
    save_file({n: t.contiguous() for n, t in tensors.items()}, path / "model.safetensors")


def say(path: Path, **settings: Any) -> None:
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = {**config.get("quantization_config", {}), **settings}
    (path / "config.json").write_text(json.dumps(config))


def logits(path: Path, **options: Any) -> Tensor:
    return PagedRunner(load(path, **options), 1, max_len=32).step({0: TOKENS})[0]


# ---- wrong checkpoints -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("copy", ONE_OF_EACH, indirect=True)
def test_every_tensor_is_checked_and_named(copy: Path) -> None:
    whole = load_file(copy / "model.safetensors")
    for name, tensor in whole.items():
        if "gate" in name or "k_proj" in name or "o_proj" in name:
            continue  # like others
        if tensor.numel() > 1:
            change(copy, {**whole, name: tensor[:-1] if len(tensor) > 1 else torch.cat([tensor, tensor])})
            assert f"tensor {name!r} " in refused(copy)
        if name.rpartition(".")[2] not in ("weight", "bias", "g_idx"):
            change(copy, {n: t for n, t in whole.items() if n != name})
            assert f"lacks 1 of {len(whole)} tensors: {name};" in refused(copy)


@pytest.mark.parametrize("copy", ONE_OF_EACH, indirect=True)
def test_a_truncated_file_is_refused(copy: Path) -> None:
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert "is truncated or not a safetensors file" in refused(copy)


def test_numbers_that_cannot_be(copy: Path) -> None:
    whole = load_file(copy / "model.safetensors")
    name = "model.layers.0.mlp.down_proj"
    change(copy, {**whole, f"{name}.g_idx": whole[f"{name}.g_idx"] + 1})
    assert f"tensor '{name}.g_idx' has numbers from 1 to 4 where 0 to 3 are right" in refused(copy)
    change(copy, {**whole, f"{name}.scales": whole[f"{name}.scales"].to(torch.int32)})
    assert f"tensor '{name}.scales' is int32 where float16 or bfloat16 or float32 is right" in refused(copy)
    change(copy, {**whole, f"{name}.bias": torch.ones(64)})
    assert f"tensor '{name}.bias' is a bias that is not zero, but the architecture" in refused(copy)
    change(copy, {**whole, "model.layers.0.mlp.down_proj.weight": torch.ones(64, 128)})
    assert "has 1 tensors that this architecture does not use: model.layers.0.mlp.down_proj.weight" in refused(copy)


def test_a_bias_of_zeros_and_no_g_idx_are_as_good(copy: Path) -> None:
    shutil.rmtree(copy)
    shutil.copytree(FIXTURES / "gptq-llama", copy)
    whole = load_file(copy / "model.safetensors")
    before = logits_of_fixture(copy)
    changed = {n: t for n, t in whole.items() if not n.endswith("g_idx")}
    change(copy, {**changed, "model.layers.0.mlp.down_proj.bias": torch.zeros(64)})
    assert torch.equal(logits_of_fixture(copy), before)


def logits_of_fixture(path: Path) -> Tensor:
    return PagedRunner(load(path), 1, max_len=32).step({0: [1, 5, 9, 40]})[0]


@pytest.mark.parametrize("copy", ["ct-fp8-static-kv-llama"], indirect=True)
def test_the_caches_scales_are_the_checkpoints(copy: Path) -> None:
    whole, name = load_file(copy / "model.safetensors"), "model.layers.0.self_attn"
    plain = {n: t for n, t in whole.items() if n not in (f"{name}.k_scale", f"{name}.v_scale")}
    want = tuple(float(whole[f"{name}.{part}_scale"]) for part in "kv")
    assert 0 < want[0] != want[1] > 0
    assert scales_of(copy) == want
    change(copy, plain)
    assert scales_of(copy) == (1, 1)
    for spelling, value in (("kv_scale", (0.5, 0.5)), ("k_proj.output_scale", (0.5, 1)), ("v_proj.v_scale", (1, 0.5))):
        change(copy, {**plain, f"{name}.{spelling}": torch.tensor([0.5])})
        assert scales_of(copy) == value
    change(copy, {**plain, f"{name}.attn.k_scale": torch.tensor([[[0.5]], [[0.25]]]), f"{name}.q_scale": torch.ones(1)})
    assert scales_of(copy) == (0.5, 1), "of scales by head the largest; queries are not quantized"
    change(copy, {**plain, f"{name}.k_scale": torch.tensor(-1.0)})
    assert f"tensor '{name}.k_scale' is -1.0 where a positive scale is right" in refused(copy, kv_dtype=KV_FP8)
    change(copy, {**plain, f"{name}.k_scale": torch.tensor([1.0, math.inf])})
    assert "where a positive scale is right" in refused(copy, kv_dtype=KV_FP8)
    load(copy)  # a cache of another type has no use for them


def test_an_fp8_cache_uses_the_checkpoints_scales() -> None:
    """Keys and values in e4m3 have an error of 2 to 6 %; with the scales of another model they are far off."""
    name = "ct-fp8-static-kv-llama"
    expected = load_file(FIXTURES / name / "expected.safetensors")
    offs = []
    for wrong in (1, 1000):
        model = load(FIXTURES / name, kv_dtype=torch.float8_e4m3fn)
        scales = next(module for module in model.modules() if isinstance(module, KVScales))
        scales.v_scale /= wrong
        got = PagedRunner(model, 1, max_len=32).step({0: expected["tokens"].tolist()})[0]
        offs.append(((got - expected["logits"]).norm() / expected["logits"].norm()).item())
    assert offs[0] < 0.08 and offs[1] > 0.2, offs


def scales_of(path: Path) -> tuple[float, float]:
    scales = next(module for module in load(path, kv_dtype=KV_FP8).modules() if isinstance(module, KVScales))
    return float(scales.k_scale), float(scales.v_scale)


# ---- what is not supported is refused by name ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"quant_method": "bitsandbytes"}, "quantization 'bitsandbytes' is not known; choose from none, awq, gptq"),
        ({"quant_method": "awq", "bits": 3}, "AWQ with 3 bits is not supported; only 4 bits are"),
        ({"quant_method": "awq", "version": "marlin"}, "AWQ packing 'marlin' is not supported; only gemm, gemv"),
        ({"quant_method": "awq", "group_size": 0}, "AWQ group size 0 is not supported; it must be -1 or positive"),
        ({"quant_method": "awq", "version": "gemv", "group_size": 16}, "'gemv' has no group size 16; only 32, 64"),
        ({"quant_method": "gptq", "bits": 5}, "GPTQ with 5 bits is not supported; only 2, 3, 4 and 8 are"),
        ({"quant_method": "gptq", "checkpoint_format": "marlin"}, "GPTQ format 'marlin' is not supported; only gptq"),
        ({"quant_method": "gptq", "dynamic": {"+:.*": {"bits": 6}}}, "GPTQ with 6 bits is not supported"),
        ({"quant_method": "auto-round", "packing_format": "auto_round:exllamav2"}, "auto-round packing 'auto_round:ex"),
        ({"quant_method": "fp8", "fmt": "e5m2"}, "FP8 format 'e5m2' is not supported; only e4m3 is"),
        ({"quant_method": "fp8", "activation_scheme": "never"}, "activation_scheme 'never' is not supported; only dyn"),
        ({"quant_method": "fp8", "weight_block_size": [128]}, r"weight_block_size \[128\] with dynamic activations"),
        ({"quant_method": "compressed-tensors"}, "its quantization_config has no config_groups"),
        (
            {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"targets": ["Linear"], "weights": {
                "num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16},
                "format": "nvfp4-pack-quantized"}}},
            "group_0: symmetric 4-bit float weights by tensor_group in format 'nvfp4-pack-quantized' are not",
        ),
        (
            {"quant_method": "compressed-tensors", "format": "int-quantized", "config_groups": {"g": {
                "weights": {"num_bits": 8, "strategy": "channel"},
                "input_activations": {"num_bits": 8, "symmetric": False, "strategy": "tensor"}}}},
            "8-bit int weights by channel with asymmetric 8-bit int activations by tensor are not supported",
        ),
        (
            {"quant_method": "compressed-tensors", "sparsity_config": {"format": "sparse-24-bitmask"},
             "config_groups": {"g": {"weights": {}}}},
            r"sparse weights \('sparse-24-bitmask'\) are not supported",
        ),
    ],
)  # fmt: skip
def test_refused_before_a_byte_is_loaded(copy: Path, settings: dict[str, Any], reason: str) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    (copy / "model.safetensors").unlink()
    with pytest.raises((CheckpointError, PluginError), match=reason):
        load(copy)


def test_another_loader_than_the_checkpoints(copy: Path, tmp_path: Path) -> None:
    for name in ("awq", "fp8", "int8", "compressed-tensors", "none"):
        assert "is quantized with 'gptq'" in refused(copy, name=name)
    plain = make_tiny_model("llama", tmp_path / "plain", num_hidden_layers=1)
    for name in ("awq", "gptq", "compressed-tensors"):
        assert f"the checkpoint is not quantized with {name}: quantize it first" in refused(plain, name=name)
    assert "weights of another kind" in refused(FIXTURES / "ct-w8a8-mistral", name="fp8")


def test_the_kind_may_be_named_instead_of_the_library() -> None:
    assert torch.equal(*(tokens_of("ct-w8a8-mistral", name) for name in ("auto", "int8")))
    assert torch.equal(*(tokens_of("ct-fp8-dynamic-qwen3", name) for name in ("auto", "fp8")))


def tokens_of(fixture: str, name: str) -> Tensor:
    return PagedRunner(load(FIXTURES / fixture, name=name), 1, max_len=32).step({0: [1, 5, 9, 40]})[0]


# ---- spellings without a tool that still writes them -----------------------------------------------------------------


def quantized(weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """In e4m3, and what that means in float64."""
    q = (weight / scale).to(torch.float8_e4m3fn)
    return q, q.double() * scale.double()


def by_tensor(name: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    scale = weight.abs().max() / 448
    q, wide = quantized(weight, scale)
    return {f"{name}.weight": q, f"{name}.weight_scale": scale, f"{name}.input_scale": torch.tensor(0.03)}, wide


def by_row(name: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    scale = weight.abs().amax(1, keepdim=True) / 448
    q, wide = quantized(weight, scale)
    return {f"{name}.weight": q, f"{name}.weight_scale": scale}, wide


def by_block(name: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    rows, columns = (-(-size // 128) for size in weight.shape)
    scale = torch.rand(rows, columns, generator=torch.Generator().manual_seed(len(name))) + 0.5
    spread = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)[: weight.shape[0], : weight.shape[1]]
    q, wide = quantized(weight, spread)
    return {f"{name}.weight": q, f"{name}.weight_scale_inv": scale}, wide


def renamed(make: Callable[..., Any], *renames: tuple[str, str]) -> Callable[..., Any]:
    """``make``, with other names for tensors."""

    def make_renamed(name: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        tensors, wide = make(name, weight)
        for old, new in renames:
            tensors[f"{name}.{new}"] = tensors.pop(f"{name}.{old}")
        return tensors, wide

    return make_renamed


TRANSFORMERS = (("weight_scale", "weight_scale_inv"), ("input_scale", "activation_scale"))
FP8 = {
    "static": (by_tensor, {"quant_method": "fp8", "activation_scheme": "static"}),
    "fbgemm": (by_row, {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}),
    "block": (by_block, {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}),
    "static-transformers": (renamed(by_tensor, *TRANSFORMERS), {
        "quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None}),
    "static-act-scale": (renamed(by_tensor, ("input_scale", "act_scale")), {
        "quant_method": "fp8", "activation_scheme": "static"}),
    "dynamic-transformers": (renamed(by_tensor, *TRANSFORMERS), {"quant_method": "fp8", "weight_block_size": None}),
    "dynamic-with-input-scale": (by_tensor, {"quant_method": "fp8", "activation_scheme": "dynamic"}),
    "block-weight-scale": (renamed(by_block, ("weight_scale_inv", "weight_scale")), {
        "quant_method": "fp8", "weight_block_size": [128, 128]}),
}  # fmt: skip


@pytest.mark.parametrize("kind", FP8)
@pytest.mark.parametrize("hidden", [64, 256])
def test_fp8_checkpoints(kind: str, hidden: int, tmp_path: Path) -> None:
    """Fused projections with a scale each; blocks that the layer does not fill; layers that are left out."""
    from transformers import AutoModelForCausalLM

    make, settings = FP8[kind]
    path = make_tiny_model("llama", tmp_path, hidden_size=hidden, head_dim=hidden // 4, num_hidden_layers=1)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
    stored, left_out = load_file(path / "model.safetensors"), ["model.layers.0.mlp.up_proj", "lm_head"]
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name not in left_out:
            parts, wide = make(name, stored.pop(f"{name}.weight"))
            stored.update(parts)
            module.weight.data.copy_(wide)
    change(path, stored)
    say(path, modules_to_not_convert=left_out, **settings)
    want = model(torch.tensor([TOKENS])).logits[0].float()
    assert_near(logits(path), want, FLOAT32)


def test_auto_round_without_a_packing_and_with_rules_by_search(copy: Path) -> None:
    shutil.rmtree(copy)
    shutil.copytree(FIXTURES / "auto-round-qwen3", copy)
    before = logits_of_fixture(copy)
    config = json.loads((copy / "config.json").read_text())
    section = config["quantization_config"]
    assert section.pop("packing_format") == "auto_round:auto_gptq"
    section["extra_config"] = {r"self_attn\.[qkv]_proj$": {"bits": section["bits"]}, "proj": {"bits": 8}}
    section["bits"], bits = 16, section["bits"]
    section["extra_config"][r"(o|up|gate|down)_proj"] = {"bits": bits}
    (copy / "config.json").write_text(json.dumps(config))
    assert torch.equal(logits_of_fixture(copy), before)


def test_compression_config_of_older_llmcompressor(copy: Path) -> None:
    shutil.rmtree(copy)
    shutil.copytree(FIXTURES / "ct-fp8-dynamic-qwen3", copy)
    before = logits_of_fixture(copy)
    config = json.loads((copy / "config.json").read_text())
    section = config.pop("quantization_config")
    method = section.pop("quant_method")
    for older in ({**section, "quant_method": method}, section, {"quantization_config": section}):
        (copy / "config.json").write_text(json.dumps({**config, "compression_config": older}))
        assert torch.equal(logits_of_fixture(copy), before)


def test_files_of_older_tools(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    before, section = logits_of_fixture(copy), config.pop("quantization_config")
    (copy / "config.json").write_text(json.dumps(config))
    section.pop("quant_method")
    (copy / "quantize_config.json").write_text(json.dumps(section))
    assert torch.equal(logits_of_fixture(copy), before)
    (copy / "quantize_config.json").write_text("{")
    assert "quantize_config.json cannot be read" in refused(copy)
    (copy / "quantize_config.json").rename(copy / "hf_quant_config.json").write_text('{"quantization": {}}')
    with pytest.raises(PluginError, match="'modelopt' is not known"):
        load(copy)


# ---- quantized at load -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["fp8", "int8"])
def test_a_plain_checkpoint_is_quantized_at_load(name: str, tmp_path: Path) -> None:
    """By row, all but the head."""
    from transformers import AutoModelForCausalLM

    path = make_tiny_model("qwen2", tmp_path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
    for part, module in model.named_modules():
        if isinstance(module, nn.Linear) and part != "lm_head":
            weight = module.weight.data.float()
            scale = weight.abs().amax(1, keepdim=True) / (448 if name == "fp8" else 127)
            wide = quantized(weight, scale)[1] if name == "fp8" else (weight / scale).round().double() * scale.double()
            module.weight.data.copy_(wide)
    want = model(torch.tensor([TOKENS])).logits[0].float()
    assert_near(logits(path, name=name), want, FLOAT32)


@pytest.mark.parametrize("name", ["awq-gemm-llama", "gptq-llama", "ct-fp8-static-kv-llama", "ct-w8a8-mistral"])
def test_dummy_weights_keep_the_size_of_activations(name: str) -> None:
    model = load(FIXTURES / name, load_format="dummy")
    x = torch.randn(50, 64, generator=torch.Generator().manual_seed(0))
    for layer in model.modules():
        if hasattr(layer, "qkv_proj"):
            assert 0.5 < layer.qkv_proj(x).std() < 2
