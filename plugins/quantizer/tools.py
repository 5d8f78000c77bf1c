"""Drives the tool that quantizes, in a process of its own: reads a job as JSON from stdin, writes the result to
the file that the job names.

Run as a file, perhaps by the interpreter of another environment: it imports the tool and nothing of Quire. Job:
``tool``, ``scheme``, ``model`` and ``out`` (folders), ``samples`` (token ids of equal length; may be empty),
``group_size``, ``device`` (auto, cpu, cuda), ``result`` (a path; gets ``{"version": ...}`` or ``{"error": ...}``).
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

__all__ = ["TOOLS", "main"]

Job = Mapping[str, Any]


def _choose_device(job: Job) -> str:
    import torch

    if job["device"] != "auto":
        return str(job["device"])
    return "cuda" if torch.cuda.is_available() else "cpu"


def run_autoawq(job: Job) -> None:
    """Activation-aware weight quantization (Lin et al. 2023), 4 bits with zero points. On a CPU in float32, for float16
    is slow there; what is saved is float16 all the same."""
    import torch
    from awq import AutoAWQForCausalLM
    from awq.models.base import TRANSFORMERS_AUTO_MAPPING_DICT

    kind = json.loads((Path(job["model"]) / "config.json").read_text("utf-8"))["model_type"]
    if kind not in TRANSFORMERS_AUTO_MAPPING_DICT:
        raise RuntimeError(f"autoawq knows no model of type {kind!r}; use --method gptq")
    device = _choose_device(job)
    model = AutoAWQForCausalLM.from_pretrained(
        job["model"],
        torch_dtype=torch.float32 if device == "cpu" else torch.float16,
        device_map=device,
        trust_remote_code=False,
        safetensors=True,
    )
    samples = job["samples"]
    settings = {"zero_point": True, "q_group_size": job["group_size"], "w_bit": 4, "version": job["scheme"]}
    model.quantize(
        None,
        quant_config=settings,
        calib_data=samples,
        max_calib_samples=len(samples),
        max_calib_seq_len=len(samples[0]),
        duo_scaling=False,  # else plain rounding is not among what is searched, and often better than what is
    )
    model.model.half()
    model.model.config.dtype = torch.float16
    model.save_quantized(job["out"])


def run_llmcompressor(job: Job) -> None:
    """FP8, INT8 and GPTQ in the format of compressed-tensors; every linear layer but the last."""
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier
    from transformers import AutoModelForCausalLM

    def quantize_linear(modifier: Any, scheme: str) -> Any:
        return modifier(targets="Linear", scheme=scheme, ignore=["lm_head"])

    def smoothquant_modifiers() -> list[Any]:
        from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier

        return [SmoothQuantModifier(smoothing_strength=0.8), quantize_linear(GPTQModifier, "W8A8")]

    recipes: dict[str, Callable[[], list[Any]]] = {
        "dynamic": lambda: [quantize_linear(QuantizationModifier, "FP8_DYNAMIC")],
        "static": lambda: [quantize_linear(QuantizationModifier, "FP8")],
        "block": lambda: [quantize_linear(QuantizationModifier, "FP8_BLOCK")],
        "smoothquant": smoothquant_modifiers,
        "rounded": lambda: [quantize_linear(QuantizationModifier, "W8A8")],
        "plain": lambda: [GPTQModifier(config_groups=_four_bit_groups(job), ignore=["lm_head"])],
        "act_order": lambda: [GPTQModifier(config_groups=_four_bit_groups(job), ignore=["lm_head"], actorder="group")],
    }
    model = AutoModelForCausalLM.from_pretrained(
        job["model"], dtype="auto", device_map=_choose_device(job), trust_remote_code=False, use_safetensors=True
    )
    samples, calibration = job["samples"], {}
    if samples:
        rows = [{"input_ids": tokens, "attention_mask": [1] * len(tokens)} for tokens in samples]
        calibration = {
            "dataset": Dataset.from_list(rows),
            "max_seq_length": len(samples[0]),
            "num_calibration_samples": len(samples),
        }
    oneshot(model=model, recipe=recipes[job["scheme"]](), **calibration)
    model.save_pretrained(job["out"], save_compressed=True)


def run_optimum(job: Job) -> None:
    """GPTQ (Frantar et al. 2022) in its own format, by ``GPTQQuantizer`` over gptqmodel; symmetric."""
    import torch
    from optimum.gptq import GPTQQuantizer
    from transformers import AutoModelForCausalLM

    device = _choose_device(job)
    model = AutoModelForCausalLM.from_pretrained(
        job["model"],
        dtype=torch.float32 if device == "cpu" else torch.float16,
        device_map=device,
        trust_remote_code=False,
        use_safetensors=True,
    )
    samples = [{"input_ids": [tokens], "attention_mask": [[1] * len(tokens)]} for tokens in job["samples"]]
    quantizer = GPTQQuantizer(
        bits=4,
        dataset=samples,
        group_size=job["group_size"],
        desc_act=job["scheme"] == "act_order",
        sym=True,
        model_seqlen=len(job["samples"][0]),
    )
    model = quantizer.quantize_model(model)
    quantizer.dataset = None  # else every sample is written into the configuration
    settings = model.config.quantization_config
    settings["dataset"] = None
    for parameter in model.parameters():  # transformers refuses to cast a quantized model
        parameter.data = parameter.data.half()
    model.config.dtype = torch.float16
    quantizer.save(model, job["out"])
    config_file = Path(job["out"]) / "config.json"  # written before the zero points were converted to the older format
    config = json.loads(config_file.read_text("utf-8"))
    config["quantization_config"]["format"] = quantizer.format
    config_file.write_text(json.dumps(config, indent=2), "utf-8")


#: By name: what quantizes, and the distribution whose version is reported.
TOOLS: Mapping[str, tuple[Callable[[Job], None], str]] = MappingProxyType(
    {
        "autoawq": (run_autoawq, "autoawq"),
        "llmcompressor": (run_llmcompressor, "llmcompressor"),
        "optimum": (run_optimum, "gptqmodel"),
    }
)


def _four_bit_groups(job: Job) -> dict[str, Any]:
    """Symmetric weights of 4 bits, in groups of the job's size."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    groups = {"strategy": "channel"} if job["group_size"] == -1 else {"group_size": job["group_size"]}
    weights = QuantizationArgs(num_bits=4, type="int", symmetric=True, **groups)
    return {"group_0": QuantizationScheme(targets=["Linear"], weights=weights)}


def main() -> int:
    """Do the job on stdin. What the tools print goes to stderr."""
    job = json.load(sys.stdin)
    sys.stdout = sys.stderr
    quantize, distribution = TOOLS[job["tool"]]
    try:
        quantize(job)
        outcome = {"version": importlib.metadata.version(distribution)}
    except Exception as error:
        traceback.print_exc()
        outcome = {"error": " ".join(f"{type(error).__name__}: {error}".split())[:400]}
    Path(job["result"]).write_text(json.dumps(outcome), "utf-8")
    return 0 if "version" in outcome else 1


if __name__ == "__main__":
    sys.exit(main())
