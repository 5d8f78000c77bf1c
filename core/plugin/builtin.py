"""The bundled plugins, registered as those of any other distribution. The only module that names bundled ones."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from quire.core.plugin.hookspecs import hookimpl
from quire.core.plugin.registry import Choice, Registrar, Requirement


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
    where = "quire.plugins.sched"
    register("fcfs", f"{where}.fcfs:FCFSPolicy", "decode first, then waiting requests in order of arrival")
    register("priority", f"{where}.priority:PriorityPolicy", "by the request's priority, with aging")
    register("sjf", f"{where}.sjf:SJFPolicy", "shortest job first, with aging")
    register("fair_share", f"{where}.fair_share:FairSharePolicy", "groups share by tokens served (VTC), by weight")
    register("edf", f"{where}.edf:EDFPolicy", "earliest deadline first; refuses what comes too late if told to")
    register(
        "prefix_affinity", f"{where}.prefix_affinity:PrefixAffinityPolicy", "longest cached prefix first, with age"
    )
    register("fairbatch", f"{where}.fairbatch:FairBatchPolicy", "steps by slack to targets of first and further tokens")
    register("ewsjf", f"{where}.ewsjf:EWSJFPolicy", "queues by prompt length, waiting time over work")


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
    target = f"{where}.forced_tokens:ForcedTokensProposer"
    register("forced_tokens", target, "what a schema or grammar leaves no choice about: keys and braces")
    register("ngram", f"{where}.ngram:NgramProposer", "what followed the last tokens earlier in the request")
    register("suffix", f"{where}.suffix:SuffixProposer", "what followed the longest suffix seen before, in any request")
    register("synthetic", f"{where}.synthetic:SyntheticProposer", "drafts that cost nothing, for benchmarks")


@hookimpl
def quire_register_structured_output(register: Registrar) -> None:
    """Register the bundled structured-output backends."""
    register(
        "llguidance",
        "quire.plugins.structured_output.guidance:GuidanceBackend",
        "JSON schemas, expressions, Lark and GBNF grammars by llguidance, which refuses what it cannot enforce",
        requires=("llguidance",),
        aliases=("guidance",),
    )
    target = "quire.plugins.structured_output.xgrammar:XGrammarBackend"
    register("xgrammar", target, "plain JSON schemas, expressions and EBNF by XGrammar", requires=("xgrammar",))
    register(
        "none", "quire.plugins.structured_output.none:NoBackend", "no structured output; requests for it are refused"
    )


@hookimpl
def quire_register_adapter(register: Registrar) -> None:
    """Register the bundled adapter methods."""
    register("lora", "quire.plugins.adapters.lora.method:Lora", "LoRA, several adapters of any rank in one batch")


@hookimpl
def quire_register_executor(register: Registrar) -> None:
    """Register the bundled executors."""
    register(
        "uniproc",
        "quire.core.worker.uniproc_executor:UniprocExecutor",
        "one worker in the engine's own process",
        aliases=("uni",),
    )
    register(
        "multiproc",
        "quire.core.worker.multiproc.executor:MultiprocExecutor",
        "a process for each device of this host",
        aliases=("mp",),
    )
    register(
        "ray",
        "quire.core.worker.ray.executor:RayExecutor",
        "a process for each device, on the hosts of a Ray cluster",
        requires=(Requirement("ray", "pip install 'quire[ray]'"),),
    )


@hookimpl
def quire_register_metrics(register: Registrar) -> None:
    """Register the bundled metrics exporters."""
    target = "quire.plugins.metrics.prometheus:PrometheusExporter"
    register("prometheus", target, "Prometheus text at /metrics, under quire: and vllm: names")


@hookimpl
def quire_register_tool_parser(register: Registrar) -> None:
    """Register the bundled tool-call parsers."""
    where = "quire.plugins.parsers.tool_calls"
    register("none", f"{where}:NoToolCalls", "calls stay text")
    register("hermes", f"{where}:Hermes", "Hermes 2 Pro, Qwen2.5, Qwen3, quire-tiny: JSON between tags")
    register("llama3_json", f"{where}:Llama3Json", "Llama 3.1 to 3.3: bare JSON", aliases=("llama4_json",))
    register("llama4_pythonic", f"{where}:Llama4Pythonic", "Llama 4: a Python list between special tokens")
    register("pythonic", f"{where}:Pythonic", "Llama 3.2 and others: a Python list")
    register("mistral", f"{where}:Mistral", "Mistral: JSON after a special token")
    register("qwen3_coder", f"{where}:Qwen3Coder", "Qwen3-Coder: parameters between tags", aliases=("qwen3_xml",))
    register(
        "deepseek_v3",
        f"{where}:DeepSeekV3",
        "DeepSeek: JSON between special tokens",
        aliases=("deepseek_v31",),
    )
    register("glm45", f"{where}:Glm45", "GLM-4.5 and later: keys and values between tags", aliases=("glm47",))
    register("kimi_k2", f"{where}:KimiK2", "Kimi K2: JSON between special tokens")
    register("granite", f"{where}:Granite", "Granite 3: a JSON list after a special token")
    register("phi4_mini", f"{where}:Phi4Mini", "Phi-4-mini: a JSON list after a word", aliases=("phi4_mini_json",))
    register("openai", f"{where}:Harmony", "gpt-oss: the commentary channel of harmony", aliases=("harmony",))


_THINK_TAGS = ("glm45", "kimi_k2", "deepseek_v3", "deepseek_v31")
"""vLLM's names of reasoning parsers that look for think tags."""


@hookimpl
def quire_register_reasoning_parser(register: Registrar) -> None:
    """Register the bundled reasoning parsers."""
    where = "quire.plugins.parsers.reasoning"
    register("none", f"{where}:NoReasoning", "reasoning stays text")
    register("qwen3", f"{where}:Qwen3", "Qwen3 and others: think tags, where the answer has them", aliases=_THINK_TAGS)
    register("deepseek_r1", f"{where}:DeepSeekR1", "DeepSeek-R1: answers begin with reasoning")
    register("granite", f"{where}:GraniteReasoning", "Granite 3.2 and 3.3")
    register("openai_gptoss", f"{where}:HarmonyReasoning", "gpt-oss: harmony", aliases=("openai", "harmony"))


@hookimpl
def quire_register_op(register: Registrar) -> None:
    """Register the bundled implementations of operations."""
    where = "quire.core.ops.implementations"
    register("torch", f"{where}:TorchOperations", "every operation in torch, on any device; the reference")
    target = f"{where}:TritonOperations"
    register("triton", target, "fused kernels for norm, activation and rotary positions", requires=("triton",))


@hookimpl
def quire_register_quantizer(register: Registrar) -> None:
    """Register the bundled quantizers. ``--tool`` chooses among those of one method."""
    where = "quire.plugins.quantizer.quantizers"
    register("awq", f"{where}:AWQQuantizer", "AWQ, 4 bits, by autoawq")
    register("gptq", f"{where}:GPTQQuantizer", "GPTQ, 4 bits, by llmcompressor")
    register("gptq-optimum", f"{where}:OptimumGPTQQuantizer", "GPTQ, 4 bits, by optimum over gptqmodel")
    register("fp8", f"{where}:Fp8Quantizer", "FP8 weights, by llmcompressor")
    register("int8", f"{where}:Int8Quantizer", "INT8 weights and activations, by llmcompressor")


@hookimpl
def quire_register_router(register: Registrar) -> None:
    """Register the bundled routers."""
    register("round_robin", "quire.plugins.router.round_robin:RoundRobinRouter", "one replica after the other")
    register("least_loaded", "quire.plugins.router.least_loaded:LeastLoadedRouter", "the replica with fewest requests")
    target = "quire.plugins.router.prefix_aware:PrefixAwareRouter"
    register("prefix_aware", target, "the replica that has most of the prompt cached, unless it has too much to do")


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
    if kind == "op":
        on_gpu = _choose_attention(str(config.get("device", "cpu"))).name == "triton"
        return Choice("triton", "on a GPU, for what it has") if on_gpu else Choice("torch", "no CUDA GPU")
    if kind == "model":
        architectures = list(config.get("architectures") or ())
        return Choice(architectures[0], "the checkpoint's architecture") if architectures else None
    if kind == "spec_decode":
        if "eagle3" in str(getattr(config.get("draft_config"), "architectures", "")).lower():
            return Choice("eagle3", "an EAGLE-3 head is given")
        return Choice("draft_model", "a draft model is given")
    if kind in _TEMPLATE_SIGNS:
        return _choose_parser(kind, str(config.get("chat_template") or ""))
    if kind == "structured_output":
        if importlib.util.find_spec("llguidance") is None:
            return Choice("none", "llguidance is not installed", {"llguidance": "pip install llguidance"})
        return Choice("llguidance", "the default")
    plain = {
        "kv": Choice("paged", "the default"),
        "policy": Choice("fcfs", "the default"),
        "quant": Choice("none", "the checkpoint names no quantization" if config.get("hf_config") else "the default"),
        "sampler": Choice("gumbel", "the default"),
        "adapter": Choice("lora", "the default"),
        "executor": _choose_executor(
            int(config.get("tensor_parallel_size") or 1) * int(config.get("pipeline_parallel_size") or 1)
        ),
        "metrics": Choice("prometheus", "the default"),
        "router": Choice("least_loaded", "the default"),
        "quantizer": Choice("fp8", "it needs no text"),
    }
    return plain.get(kind)


def _choose_executor(num_workers: int) -> Choice:
    if num_workers > 1:
        return Choice("multiproc", f"{num_workers} devices share the model")
    return Choice("uniproc", "one device needs one process")


def _choose_attention(device: str) -> Choice:
    if not device.startswith("cuda"):
        return Choice("torch_sdpa", f"the device is {device}", {"triton": "it is fast only on a CUDA GPU"})
    if importlib.util.find_spec("triton") is None:
        return Choice("torch_sdpa", "triton is not installed", {"triton": "not installed; pip install triton"})
    return Choice("triton", "the device is a CUDA GPU", {"torch_sdpa": "slower on a GPU"})


def _choose_parser(kind: str, template: str) -> Choice:
    """By what the chat template writes into a conversation, the rarest sign first."""
    for name, signs in _TEMPLATE_SIGNS[kind]:
        sign = next((sign for sign in signs if sign in template), None)
        if sign is not None:
            return Choice(name, f"the chat template has {sign!r}")
    return Choice("none", "the chat template has no sign of a known family" if template else "no chat template")


_TEMPLATE_SIGNS: Mapping[str, tuple[tuple[str, tuple[str, ...]], ...]] = MappingProxyType({
    "tool_parser": (
        ("openai", ("<|channel|>commentary", "<|constrain|>")),
        ("kimi_k2", ("<|tool_call_argument_begin|>", "<|tool_calls_section_begin|>")),
        ("deepseek_v3", ("<｜tool▁calls▁begin｜>",)),
        ("glm45", ("<arg_key>",)),
        ("qwen3_coder", ("<function=",)),
        ("mistral", ("[TOOL_CALLS]",)),
        ("llama4_pythonic", ("<|python_start|>",)),
        ("phi4_mini", ("functools", "<|/tool_call|>", "<|/tool|>")),
        ("granite", ("<|tool_call|>", "<|start_of_role|>")),
        ("hermes", ("<tool_call>",)),
        ("pythonic", ("func_name1(", "[func1(")),
        ("llama3_json", ("<|python_tag|>", '"parameters": dictionary of argument name')),
    ),
    "reasoning_parser": (
        ("openai_gptoss", ("<|channel|>analysis", "<|channel|>final")),
        ("granite", ("Here is my thought process:", "Here's my thought process:", "<response></response>")),
        ("deepseek_r1", ("<｜Assistant｜><think>",)),
        ("qwen3", ("<think>", "</think>")),
    ),
})  # fmt: skip
"""By kind: the name of a family, and texts of which its chat templates have one."""
