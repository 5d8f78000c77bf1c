"""Makes the quantized checkpoints that tests/quant reads, with the tools people use. Runs outside CI.

    python tools/make_quant_fixtures.py TOOL [NAME ...]      # TOOL: autoawq, llmcompressor, gptqmodel, auto-round

Each tool wants an environment of its own, and ``PYTHONPATH=src``: ``pip install autoawq==0.2.9 "transformers>=5.14"``,
``pip install llmcompressor==0.14.*``, ``pip install auto-round==0.16.*``, or, after ``pip install numpy==2.2.6 ninja``,
``GPTQMODEL_CPU_WORKERS=2 pip install --no-build-isolation gptqmodel==7.6.*``.

A fixture is a tiny random model: config.json, model.safetensors, and expected.safetensors with tokens and the logits
that transformers computes in float64 from the weights as the tool itself dequantizes them.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor as Weight

from quire.core.testing.tiny_models import make_tiny_model

FIXTURES = Path(__file__).parent.parent / "tests" / "quant" / "fixtures"
VOCAB = 64
Weights = Mapping[str, Weight]
Maker = Callable[[Path, Path], Weights]


def base(folder: Path, family: str, **overrides: Any) -> Path:
    """A tiny float16 model of ``family``."""
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "eos_token_id": 1,
    }
    make_tiny_model(family, folder, dtype=torch.float16, **(sizes | overrides))
    tokenizer = Tokenizer(WordLevel({str(i): i for i in range(VOCAB)}, unk_token="0"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    words = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "1", "pad_token": "2"}
    (folder / "tokenizer_config.json").write_text(json.dumps(words))
    return folder


def texts(count: int = 32, length: int = 64) -> list[list[int]]:
    """Calibration tokens, far from uniform, so that activations differ in size."""
    generator = torch.Generator().manual_seed(7)
    odds = 1.0 / torch.arange(1, VOCAB + 1).float()
    return [torch.multinomial(odds, length, True, generator=generator).tolist() for _ in range(count)]


def finish(plain: Path, quantized_folder: Path, name: str, weights: Weights) -> None:
    """Keep config and weights, and write the logits of ``plain`` with ``weights`` in place of its own, in float64."""
    from transformers import AutoModelForCausalLM

    folder = FIXTURES / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    config = json.loads((quantized_folder / "config.json").read_text())
    config["quantization_config"].get("meta", {}).pop("offload_to_disk_path", None)
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    tensors = {n: t for file in sorted(quantized_folder.glob("*.safetensors")) for n, t in load_file(file).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    model = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float64)
    unused = model.load_state_dict({n: t.double() for n, t in weights.items()}, strict=False).unexpected_keys
    assert not unused, unused
    tokens = torch.tensor(texts(1, 24)[0])
    with torch.no_grad():
        logits = model(tokens[None]).logits[0]
    save_file({"tokens": tokens, "logits": logits.float().contiguous()}, folder / "expected.safetensors")
    size = sum(file.stat().st_size for file in folder.iterdir())
    print(f"{name}: {len(tensors)} tensors, {size / 1000:.0f} kB")


# ---- autoawq


def autoawq(version: str, group: int) -> Maker:
    def make(plain: Path, out: Path) -> Weights:
        from awq import AutoAWQForCausalLM
        from awq.utils.packing_utils import dequantize_gemm
        from transformers import AutoTokenizer

        weights: dict[str, Weight] = {}
        for kind in dict.fromkeys(("GEMM", version)):  # it can dequantize the GEMM packing alone
            model = AutoAWQForCausalLM.from_pretrained(str(plain), device_map="cpu", dtype=torch.float16)
            settings = {"zero_point": True, "q_group_size": group, "w_bit": 4, "version": kind}
            tokenizer = AutoTokenizer.from_pretrained(plain)
            model.quantize(tokenizer, quant_config=settings, calib_data=texts(), max_calib_seq_len=64, apply_clip=False)
            model.save_quantized(str(out))
            if kind == "GEMM":
                stored = load_file(out / "model.safetensors")
                weights = {n: t for n, t in stored.items() if not n.endswith(("qweight", "qzeros", "scales"))}
                for name in [n.removesuffix(".qweight") for n in stored if n.endswith("qweight")]:
                    packed = (stored[f"{name}.{part}"] for part in ("qweight", "qzeros", "scales"))
                    size = stored[f"{name}.qweight"].shape[0] if group == -1 else group
                    q, z, s = packed
                    weights[f"{name}.weight"] = dequantize_gemm(q, z, s.double(), 4, size).T
        return weights

    return make


# ---- llmcompressor


def llmcompressor(scheme: Any = None, *, gptq: bool = False, smooth: bool = False, **settings: Any) -> Maker:
    def make(plain: Path, out: Path) -> Weights:
        from datasets import Dataset
        from llmcompressor import oneshot
        from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float16)
        options = {"targets": ["Linear"], "ignore": ["lm_head"], **settings}
        if scheme is not None:
            options["scheme"] = scheme
        recipe = [(GPTQModifier if gptq else QuantizationModifier)(**options)]
        if smooth:
            from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier

            recipe.insert(0, SmoothQuantModifier(smoothing_strength=0.5))
        data = Dataset.from_list([{"input_ids": t, "attention_mask": [1] * len(t)} for t in texts()])
        oneshot(model=model, dataset=data, recipe=recipe, num_calibration_samples=32, max_seq_length=64)
        model.save_pretrained(out, save_compressed=True)
        return decompressed(out)

    return make


def decompressed(folder: Path) -> Weights:
    """A compressed-tensors checkpoint, module by module, as that library reads it; its own arithmetic in float64."""
    from compressed_tensors.compressors.base import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme

    stored = {n: t for file in folder.glob("*.safetensors") for n, t in load_file(file).items()}
    raw = json.loads((folder / "config.json").read_text())["quantization_config"]
    config = QuantizationConfig(**{k: v for k, v in raw.items() if k in QuantizationConfig.model_fields})
    weights: dict[str, Weight] = {}
    for module in sorted({name.rpartition(".")[0] for name in stored}):
        tensors = {n.rpartition(".")[2]: t for n, t in stored.items() if n.rpartition(".")[0] == module}
        if "weight_scale" in tensors:
            scheme = next(s for s in config.config_groups.values() if isinstance(s, QuantizationScheme))
            if len(config.config_groups) > 1:
                scheme = next(s for s in config.config_groups.values() if any(_hits(t, module) for t in s.targets))
            tensors["weight_scale"] = tensors["weight_scale"].double()
            tensors = BaseCompressor.get_value_from_registry(scheme.format or config.format).decompress(tensors, scheme)
        kept = {f"{module}.{n}": t for n, t in tensors.items() if n in ("weight", "bias")}
        weights.update(kept)
    return weights


def _hits(target: str, name: str) -> bool:
    import re

    return target == name or (target.startswith("re:") and re.match(target[3:], name) is not None)


# ---- gptqmodel


def gptqmodel(bits: int, group: int, **settings: Any) -> Maker:
    def make(plain: Path, out: Path) -> Weights:
        from gptqmodel import BACKEND, GPTQModel, QuantizeConfig

        config = QuantizeConfig(bits=bits, group_size=group, **settings)
        model = GPTQModel.load(str(plain), config, device="cpu")
        model.quantize([{"input_ids": t, "attention_mask": [1] * len(t)} for t in texts()], batch_size=1)
        model.save(str(out))
        stored = {n: t for file in out.glob("*.safetensors") for n, t in load_file(file).items()}
        weights = {n: t for n, t in stored.items() if n.endswith((".weight", ".bias"))}
        for name, module in GPTQModel.load(str(out), backend=BACKEND.TORCH, device="cpu").model.named_modules():
            if hasattr(module, "dequantize_weight"):
                module.scales = stored[f"{name}.scales"].double()  # it reads them as bfloat16
                weights[f"{name}.weight"] = module.dequantize_weight().T
        return weights

    return make


# ---- auto-round


def auto_round(form: str, bits: int, group: int, sym: bool) -> Maker:
    def make(plain: Path, out: Path) -> Weights:
        from auto_round import AutoRound
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32)
        data = [torch.tensor([t]) for t in texts()]
        tool = AutoRound(
            model,
            AutoTokenizer.from_pretrained(plain),
            bits=bits,
            group_size=group,
            sym=sym,
            iters=2,
            seqlen=64,
            dataset=data,
            nsamples=32,
            batch_size=4,
            device_map="cpu",
        )
        tool.quantize()
        weights = {n: p.detach().clone() for n, p in tool.model.named_parameters()}
        tool.save_quantized(str(out), format=form, inplace=True)
        return weights

    return make


WIDE = {"hidden_size": 128, "head_dim": 32, "intermediate_size": 128}
KV = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
FIXED: Mapping[str, Mapping[str, tuple[str, Mapping[str, Any], Maker]]] = {
    "autoawq": {
        "awq-gemm-llama": ("llama", {}, autoawq("GEMM", 64)),
        "awq-gemm-g32-qwen2": ("qwen2", {"tie_word_embeddings": True}, autoawq("GEMM", 32)),
        "awq-gemv-mistral": ("mistral", {}, autoawq("GEMV", 64)),
        "awq-gemv-fast-qwen3": ("qwen3", WIDE, autoawq("GEMV_FAST", 128)),
    },
    "llmcompressor": {
        "ct-w4a16-g32-qwen2": ("qwen2", {}, llmcompressor(gptq=True, config_groups={"group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32},
        }})),
        "ct-w4a16-asym-llama": ("llama", {}, llmcompressor(config_groups={"group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "group", "group_size": 64},
        }})),
        "ct-w8a8-mistral": ("mistral", {}, llmcompressor("W8A8")),
        "ct-w8a8-smooth-qwen2": ("qwen2", {}, llmcompressor("W8A8", gptq=True, smooth=True)),
        "ct-fp8-dynamic-qwen3": ("qwen3", {}, llmcompressor("FP8_DYNAMIC")),
        "ct-fp8-static-kv-llama": ("llama", {}, llmcompressor("FP8", kv_cache_scheme=KV)),
        "ct-fp8-block-llama": ("llama", WIDE | {"tie_word_embeddings": True}, llmcompressor("FP8_BLOCK")),
        "ct-mixed-llama": ("llama", {}, llmcompressor(
            ignore=["lm_head", "re:.*v_proj"],
            config_groups={
                "group_0": {"targets": ["re:.*q_proj", "re:.*down_proj"], "weights": {
                    "num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}},
                "group_1": {"targets": ["re:.*k_proj", "re:.*o_proj", "re:.*gate_proj", "re:.*up_proj"], "weights": {
                    "num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}},
            })),
    },
    "gptqmodel": {
        "gptq-llama": ("llama", {}, gptqmodel(4, 32, desc_act=False, sym=True)),
        "gptq-act-order-qwen2": ("qwen2", {}, gptqmodel(4, 32, desc_act=True, sym=True)),
        "gptq-asym-v2-mistral": ("mistral", {}, gptqmodel(4, 32, desc_act=False, sym=False, format="gptq_v2")),
        "gptq-asym-v1-mistral": ("mistral", {}, gptqmodel(4, 32, desc_act=False, sym=False, format="gptq")),
        "gptq-2bit-llama": ("llama", {}, gptqmodel(2, 32, desc_act=False, sym=False, format="gptq_v2")),
        "gptq-3bit-qwen3": ("qwen3", {}, gptqmodel(3, 32, desc_act=False, sym=True)),
        "gptq-8bit-head-llama": ("llama", {}, gptqmodel(
            8, -1, desc_act=False, sym=True, lm_head=True, act_group_aware=False)),
        "gptq-dynamic-llama": ("llama", {}, gptqmodel(4, 32, desc_act=False, sym=True, dynamic={
            r"-:.*\.k_proj": {}, r"+:.*\.down_proj": {"bits": 8}})),
    },
    "auto-round": {
        "auto-round-gptq-qwen3": ("qwen3", {}, auto_round("auto_gptq", 4, 32, True)),
        "auto-round-gptq-asym-llama": ("llama", {}, auto_round("auto_gptq", 4, 32, False)),
        "auto-round-awq-qwen2": ("qwen2", {}, auto_round("auto_awq", 4, 32, False)),
        "auto-round-qwen3": ("qwen3", {}, auto_round("auto_round", 4, 64, True)),
    },
}  # fmt: skip


def main() -> None:
    tool, *names = sys.argv[1:]
    torch.set_num_threads(2)
    for name, (family, overrides, maker) in FIXED[tool].items():
        if names and name not in names:
            continue
        with tempfile.TemporaryDirectory() as folder:
            plain, quantized_folder = base(Path(folder) / "plain", family, **overrides), Path(folder) / "quantized"
            finish(plain, quantized_folder, name, maker(plain, quantized_folder))


if __name__ == "__main__":
    main()
