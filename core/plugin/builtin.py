"""The bundled plugins, registered as those of any other distribution. The only module that names bundled ones."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any

from quire.core.plugin.hookspecs import hookimpl
from quire.core.plugin.registry import Choice, Registrar


@hookimpl
def quire_register_attention(register: Registrar) -> None:
    """Register the bundled attention backends."""
    register(
        "torch_sdpa",
        "quire.plugins.attention.torch_sdpa:TorchSDPABackend",
        "PyTorch's scaled dot-product attention over paged KV; the reference, runs anywhere",
        aliases=("sdpa",),
    )
    register(
        "triton",
        "quire.plugins.attention.triton.backend:TritonBackend",
        "Triton kernels over paged KV; needs a CUDA GPU, or the interpreter",
        requires=("triton",),
        aliases=("triton_attn",),
    )


@hookimpl
def quire_register_kv(register: Registrar) -> None:
    """Register the bundled KV allocators."""
    register("paged", "quire.plugins.kv.paged:PagedAllocator", "blocks of tokens with a hash-chained prefix cache")


@hookimpl
def quire_register_policy(register: Registrar) -> None:
    """Register the bundled batching policies."""
    register("fcfs", "quire.plugins.sched.fcfs:FCFSPolicy", "decode first, then waiting requests in order of arrival")
    register("priority", "quire.plugins.sched.priority:PriorityPolicy", "by the request's priority, with aging")
    register("sjf", "quire.plugins.sched.sjf:SJFPolicy", "shortest job first, with aging")


@hookimpl
def quire_register_quant(register: Registrar) -> None:
    """Register the bundled quantization loaders."""
    register("none", "quire.plugins.quant.none:Unquantized", "weights as they are in the checkpoint")
    register("awq", "quire.plugins.quant.awq:AWQ", "AWQ checkpoints, 4 bits", aliases=("awq_marlin",))
    register("gptq", "quire.plugins.quant.gptq:GPTQ", "GPTQ checkpoints, 2 to 8 bits", aliases=("gptq_marlin",))
    register("auto-round", "quire.plugins.quant.auto_round:AutoRound", "auto-round's own checkpoints, 2 to 8 bits")
    register(
        "fp8",
        "quire.plugins.quant.fp8:Fp8",
        "FP8 weights and activations, from the checkpoint or quantized at load",
        aliases=("fbgemm_fp8",),
    )
    register("int8", "quire.plugins.quant.int8:Int8", "INT8 weights and activations, quantized at load")
    target = "quire.plugins.quant.compressed_tensors:CompressedTensors"
    register("compressed-tensors", target, "FP8, INT8 and packed 2- to 8-bit checkpoints of llmcompressor")


@hookimpl
def quire_register_model(register: Registrar) -> None:
    """Register the bundled model architectures."""
    register("LlamaForCausalLM", "quire.plugins.models.llama:LlamaForCausalLM", "Llama 2 and 3, and quire-tiny")
    register("MistralForCausalLM", "quire.plugins.models.mistral:MistralForCausalLM", "Mistral, with sliding window")
    register("Qwen2ForCausalLM", "quire.plugins.models.qwen2:Qwen2ForCausalLM", "Qwen2 and Qwen2.5, dense")
    register("Qwen3ForCausalLM", "quire.plugins.models.qwen3:Qwen3ForCausalLM", "Qwen3, dense")


@hookimpl
def quire_register_sampler(register: Registrar) -> None:
    """Register the bundled samplers."""
    register("gumbel", "quire.core.sample.sampler:GumbelSampler", "argmax of logits over temperature plus seeded noise")


@hookimpl
def quire_register_logits_processor(register: Registrar) -> None:
    """Register the bundled logits processors."""
    register("min_tokens", "quire.plugins.logits.min_tokens:MinTokens", "forbids stop tokens before min_tokens")
    register("logit_bias", "quire.plugins.logits.logit_bias:LogitBias", "adds the request's logit_bias")
    target = "quire.plugins.logits.allowed_token_ids:AllowedTokenIds"
    register("allowed_token_ids", target, "forbids all tokens but the request's allowed_token_ids")
    register("bad_words", "quire.plugins.logits.bad_words:BadWords", "forbids the request's bad_words")


@hookimpl
def quire_register_spec_decode(register: Registrar) -> None:
    """Register the bundled speculative proposers."""
    where = "quire.plugins.spec_decode"
    register("draft_model", f"{where}.draft_model:DraftModelProposer", "a smaller model with the same vocabulary")
    register("eagle3", f"{where}.eagle3:Eagle3Proposer", "an EAGLE-3 head over hidden states of the model")
    register("ngram", f"{where}.ngram:NgramProposer", "what followed the last tokens earlier in the request")
    register("suffix", f"{where}.suffix:SuffixProposer", "what followed the longest suffix seen before, in any request")
    register("synthetic", f"{where}.synthetic:SyntheticProposer", "drafts that cost nothing, for benchmarks")


@hookimpl
def quire_register_executor(register: Registrar) -> None:
    """Register the bundled executors."""
    register("uniproc", "quire.core.worker.uniproc_executor:UniprocExecutor", "one worker in the engine's own process")


@hookimpl
def quire_register_metrics(register: Registrar) -> None:
    """Register the bundled metrics exporters."""
    target = "quire.plugins.metrics.prometheus:PrometheusExporter"
    register("prometheus", target, "Prometheus text at /metrics, under quire: and vllm: names")


@hookimpl(trylast=True)
def quire_detect_quantization(hf_config: Mapping[str, Any]) -> str | None:
    """Read ``quantization_config.quant_method``, as every checkpoint on the hub spells it."""
    section = hf_config.get("quantization_config") or hf_config.get("compression_config")
    method = section.get("quant_method") if isinstance(section, Mapping) else None
    return method and str(method).removeprefix("intel/")


@hookimpl(trylast=True)
def quire_choose_default(kind: str, config: Mapping[str, Any]) -> Choice | None:
    """Say what ``auto`` means when no other plugin has an opinion."""
    if kind == "attention":
        return _choose_attention(str(config.get("device", "cpu")))
    if kind == "model":
        architectures = list(config.get("architectures") or ())
        return Choice(architectures[0], "the checkpoint's architecture") if architectures else None
    if kind == "spec_decode":
        if "eagle3" in str(getattr(config.get("draft_config"), "architectures", "")).lower():
            return Choice("eagle3", "an EAGLE-3 head is given")
        return Choice("draft_model", "a draft model is given")
    plain = {
        "kv": Choice("paged", "the default"),
        "policy": Choice("fcfs", "the default"),
        "quant": Choice("none", "the checkpoint names no quantization" if config.get("hf_config") else "the default"),
        "sampler": Choice("gumbel", "the default"),
        "executor": Choice("uniproc", "one device needs one process"),
        "metrics": Choice("prometheus", "the default"),
    }
    return plain.get(kind)


def _choose_attention(device: str) -> Choice:
    if not device.startswith("cuda"):
        return Choice("torch_sdpa", f"the device is {device}", {"triton": "it is fast only on a CUDA GPU"})
    if importlib.util.find_spec("triton") is None:
        return Choice("torch_sdpa", "triton is not installed", {"triton": "not installed; pip install triton"})
    return Choice("triton", "the device is a CUDA GPU", {"torch_sdpa": "slower on a GPU"})
