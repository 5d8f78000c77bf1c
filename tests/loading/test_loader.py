"""Checkpoints into models: shards, dtypes, ranks, random weights, and every way a folder can be wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.models.paged import CLASSES, PagedRunner, load
from transformers import AutoModelForCausalLM

from quire.core.errors import CheckpointError, ConfigError
from quire.core.layers.parallel import TensorParallel
from quire.core.loading.hf_config import read_hf_config
from quire.core.loading.loader import load_model
from quire.core.testing.thread_ranks import run_on_ranks
from quire.core.testing.tiny_models import make_tiny_model
from quire.plugins.quant.none import Unquantized


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model("qwen3", tmp_path_factory.mktemp("qwen3"), attention_bias=True, num_hidden_layers=1)


@pytest.fixture
def copy(tiny: Path, tmp_path: Path) -> Path:
    for file in tiny.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def test_shards_equal_one_file(tiny: Path, tmp_path: Path) -> None:
    sharded = make_tiny_model("qwen3", tmp_path, attention_bias=True, num_hidden_layers=1, shards=3)
    assert len(list(sharded.glob("*.safetensors"))) == 3
    whole, parts = load(tiny).state_dict(), load(sharded).state_dict()
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_weights_are_converted_to_the_asked_dtype(tiny: Path) -> None:
    model = load(tiny, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_dummy_weights_come_from_the_seed(tiny: Path, copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    first, same, other = (load(copy, load_format="dummy", seed=seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not torch.equal(first["embed_tokens.weight"], other["embed_tokens.weight"])
    logits = PagedRunner(load(copy, load_format="dummy"), 1).step({0: list(range(20))})[0]
    assert logits.isfinite().all() and 0.1 < logits.std() < 10


@pytest.mark.parametrize(("rope", "length"), [("default", 256), ("linear", 1024), ("llama3", 256), ("yarn", 256)])
def test_rotary_tables_cover_the_context(tmp_path: Path, rope: str, length: int) -> None:
    model = load(make_tiny_model("llama", tmp_path, rope=rope))
    assert model.layers[0].self_attn.cos_sin.shape == (length, 16)


def test_unknown_load_format(tiny: Path) -> None:
    with pytest.raises(ConfigError, match="'pickle' is unknown; choose auto, safetensors or dummy"):
        load(tiny, load_format="pickle")


def test_a_quantized_checkpoint_is_not_read_as_a_plain_one(tiny: Path) -> None:
    config = read_hf_config(tiny)
    with pytest.raises(CheckpointError, match="is quantized with 'awq'; choose another with --quantization"):
        load_model(
            CLASSES["Qwen3ForCausalLM"],
            config,
            tiny,
            dtype=torch.float32,
            device=torch.device("cpu"),
            kv_dtype=torch.float32,
            block_size=16,
            quant=Unquantized({"quant_method": "awq"}),
        )


def test_tied_head_stored_or_not(tmp_path: Path) -> None:
    path = make_tiny_model("llama", tmp_path, tie_word_embeddings=True, num_hidden_layers=1)
    tensors = load_file(path / "model.safetensors")
    assert "lm_head.weight" not in tensors
    load(path)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    save_file(tensors, path / "model.safetensors")
    assert load(path).lm_head.tied


def test_index_of_an_earlier_save_beside_one_complete_file(tmp_path: Path) -> None:
    path = make_tiny_model("llama", tmp_path, num_hidden_layers=1)
    expected = load(path).state_dict()
    old = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    index = {"weight_map": {"model.norm.weight": old[0], "lm_head.weight": old[1]}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    for name in [None, *old]:  # also where the old files are still there
        if name is not None:
            save_file({"model.norm.weight": torch.zeros(64)}, path / name)
        actual = load(path).state_dict()
        assert all(torch.equal(actual[key], tensor) for key, tensor in expected.items())


def test_tensors_of_a_model_saved_without_its_head(tmp_path: Path) -> None:
    """Their names have no prefix; what is derived from config.json is passed over."""
    path = make_tiny_model("llama", tmp_path, tie_word_embeddings=True, num_hidden_layers=1)
    expected = load(path).state_dict()
    tensors = {name.removeprefix("model."): t for name, t in load_file(path / "model.safetensors").items()}
    tensors |= {f"layers.0.self_attn.rotary_emb.{name}": torch.ones(8) for name in ("inv_freq", "cos_cached")}
    save_file(tensors, path / "model.safetensors")
    actual = load(path).state_dict()
    assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("shards", [1, 3])
def test_head_beside_a_tied_embedding_is_used_if_it_differs(tmp_path: Path, shards: int) -> None:
    """Wherever it stands in the files, as transformers does."""
    path = make_tiny_model("qwen3", tmp_path, tie_word_embeddings=True, num_hidden_layers=1, shards=shards)
    [file] = [file for file in path.glob("*.safetensors") if "model.embed_tokens.weight" in load_file(file)]
    tensors = load_file(file)
    generator = torch.Generator().manual_seed(1)
    head = torch.randn(tensors["model.embed_tokens.weight"].shape, generator=generator) * 0.2
    if shards == 1:
        save_file({**tensors, "lm_head.weight": head}, file, metadata={"format": "pt"})
    else:
        save_file({"lm_head.weight": head}, path / "head.safetensors", metadata={"format": "pt"})
        index = json.loads((path / "model.safetensors.index.json").read_text())
        index["weight_map"]["lm_head.weight"] = "head.safetensors"
        (path / "model.safetensors.index.json").write_text(json.dumps(index))
    model, prompt = load(path), list(range(20))
    assert not model.lm_head.tied
    reference = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    with torch.inference_mode():
        expected = reference(torch.tensor([prompt])).logits[0, -1]
    logits = PagedRunner(model, 1).step({0: prompt})[0]
    torch.testing.assert_close(logits[-1] if logits.ndim == 2 else logits, expected, atol=5e-5, rtol=0)


# ---- every way to be wrong: one line, naming what and how to mend it -------------------------------------------------


def test_missing_tensors(copy: Path) -> None:
    change(copy, lambda t: [t.pop("model.norm.weight"), t.pop("model.layers.0.mlp.up_proj.weight")])
    message = refused(copy)
    assert "lacks 2 of" in message and "model.layers.0.mlp.up_proj.weight, model.norm.weight" in message


def test_unexpected_tensors(copy: Path) -> None:
    change(copy, lambda t: t.update({f"extra.{i}": torch.ones(1) for i in range(9)}))
    assert "has 9 tensors that this architecture does not use: extra.0, extra.1, extra.2 and 6 more" in refused(copy)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("model.layers.0.self_attn.k_proj.weight", (16, 64)),
        ("model.layers.0.self_attn.k_proj.bias", (7,)),
        ("model.layers.0.mlp.down_proj.weight", (64, 95)),
        ("model.embed_tokens.weight", (319, 64)),
        ("model.layers.0.self_attn.q_norm.weight", (8,)),
    ],
)
def test_wrong_shape(copy: Path, name: str, shape: tuple[int, ...]) -> None:
    change(copy, lambda t: t.update({name: torch.ones(shape)}))
    message = refused(copy)
    assert f"tensor {name!r} has shape {list(shape)}, but config.json asks for [" in message


@pytest.mark.parametrize("keep", [0, 5, 1000, -10])
def test_truncated_file(copy: Path, keep: int) -> None:
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    assert f"{file} is truncated or not a safetensors file" in refused(copy)


def test_missing_shard_and_bad_index(tmp_path: Path) -> None:
    path = make_tiny_model("llama", tmp_path, shards=2, num_hidden_layers=1)
    (path / "model-00002-of-00002.safetensors").unlink()
    assert "names model-00002-of-00002.safetensors, missing from" in refused(path)
    (path / "model.safetensors.index.json").write_text("{")
    assert "is not a valid index" in refused(path)


def test_no_safetensors(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    assert "has no *.safetensors file" in refused(copy)
    (copy / "pytorch_model.bin").touch()
    assert "has only pickled weights (pytorch_model.bin), which can run code when loaded" in refused(copy)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' in config.json is not supported"),
        (
            {"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [1.0] * 8}},
            "rope_type 'longrope' in config.json is not supported; this architecture knows default, dynamic, linear",
        ),
        ({"num_attention_heads": 3}, "3 attention heads cannot share 2 KV heads evenly"),
    ],
)
def test_configurations_that_cannot_be_served(copy: Path, change: dict, reason: str) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | change))
    with pytest.raises((CheckpointError, ConfigError), match=reason):
        load(copy)


# ---- tensor parallelism, its ranks as threads ------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "size", "overrides"), [
    ("llama", 2, {"attention_bias": True, "mlp_bias": True, "vocab_size": 321}),
    ("qwen2", 4, {}),
    ("qwen3", 2, {"tie_word_embeddings": True}),
    ("mistral", 4, {"num_key_value_heads": 1, "vocab_size": 321}),
])  # fmt: skip
def test_ranks_together_equal_one(family: str, size: int, overrides: dict, tmp_path: Path) -> None:
    """KV heads fewer than the ranks are held twice; a vocabulary that does not divide is padded."""
    path = make_tiny_model(family, tmp_path, **overrides)
    prompt = torch.randint(0, 256, (40,), generator=torch.Generator().manual_seed(0)).tolist()
    expected = PagedRunner(load(path), 1).step({0: prompt})[0]
    for logits in run_on_ranks(size, lambda parallel: PagedRunner(load(path, parallel=parallel), 1).step({0: prompt})):
        torch.testing.assert_close(logits[0], expected, atol=5e-5, rtol=0)


def test_ranks_that_do_not_divide(tiny: Path) -> None:
    with pytest.raises(ConfigError, match="3 ranks cannot share evenly"):
        load(tiny, parallel=TensorParallel(0, 3))


def change(path: Path, how) -> None:
    tensors = load_file(path / "model.safetensors")
    how(tensors)
    save_file(tensors, path / "model.safetensors")


def refused(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        load(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)
