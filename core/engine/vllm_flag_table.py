"""What became of vLLM's flags that are not Quire's: the one table of them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

__all__ = ["ABSENT_FLAGS", "MULTIMODAL", "SHORT_FLAGS", "VLLM_FLAGS", "VllmFlag"]


@dataclass(frozen=True, slots=True)
class VllmFlag:
    """A flag of vLLM's that Quire understands and that is not its own.

    ``message`` is logged once, or is the reason of the refusal. A refused flag is accepted with ``accepted_values``,
    which ask for what Quire does; with 0 among them, so is any text whose numbers are all 0.
    """

    name: str
    message: str
    refused: bool = False
    takes_value: bool = False
    accepted_values: tuple[str, ...] = ()
    sets: tuple[str, object] | None = None
    off_is_refused: bool = False
    """Whether ``--no-...`` asks for what Quire cannot do."""

    @property
    def off_reason(self) -> str:
        """Why it cannot be turned off."""
        return f"not supported: {self.message.removeprefix(_NOT_NEEDED)}"

    def is_accepted(self, value: str) -> bool:
        """Whether a refused flag may have this value."""
        return value in self.accepted_values or (
            "0" in self.accepted_values and bool(re.fullmatch("[^1-9]*0[^1-9]*", value))
        )


_NOT_NEEDED = "no longer needed: "
MULTIMODAL = "images, audio and video are not supported yet"
_HF_CONFIG = "not supported: change config.json in the model's folder"
_COMPILATION = "there is nothing to choose; --enforce-eager turns CUDA graphs off"
_TEXT_ALONE = "not supported: Quire generates text alone"
_DISTRIBUTED = "not supported yet; the GPUs of one host share a model with --tensor-parallel-size"
_EXPERTS = "not supported yet: experts are not spread over GPUs"
_HOSTS = "several hosts are joined by Ray: --executor ray"
_KV_TRANSFER = "not supported yet: the KV cache stays on the device"
_TUNED = "decided by the engine; a scheduling policy of your own can be chosen with --scheduling-policy"
_SPECULATION = "now a key of --speculative-config"
_UNCHANGED = "not supported: speculation changes no token"
_TRACES = "not supported: fetch the last steps with `quire trace`"
_ONE_PORT = "not supported: the server listens on --host and --port"
_MAMBA = "not supported: there are no models with such a state"
_PRIVATE = "not supported: prompts and answers are never logged"
_PROMPT_ADAPTERS = "prompt adapters are not supported"


def _accept(message: str, *names: str) -> list[VllmFlag]:
    """Flags that need nothing; those that end with ``=`` take a value."""
    return [VllmFlag(name.rstrip("="), _NOT_NEEDED + message, takes_value=name.endswith("=")) for name in names]


def _refuse_but(message: str, accepted: Mapping[str, str]) -> list[VllmFlag]:
    """Flags that are refused but for some values, divided by spaces."""
    return [VllmFlag(name, message, True, True, tuple(values.split())) for name, values in accepted.items()]


VLLM_FLAGS: tuple[VllmFlag, ...] = (
    VllmFlag("--enable-log-requests", "now --no-disable-log-requests", sets=("disable_log_requests", False)),
    VllmFlag("--disable-custom-all-reduce", "now --all-reduce nccl", sets=("all_reduce", "nccl")),
    VllmFlag("--worker-use-ray", "now --executor ray", sets=("executor", "ray")),
    VllmFlag("--async-scheduling", _NOT_NEEDED + "scheduling is always asynchronous", off_is_refused=True),
    *_accept("metrics are always served at /metrics, under old names and new", "--enable-prometheus",
             "--show-hidden-metrics-for-version="),
    *_accept("preempted requests are recomputed, not swapped", "--swap-space="),
    *_accept("there is one block manager", "--use-v2-block-manager", "--disable-hybrid-kv-cache-manager"),
    *_accept("scheduling is always ahead of the device", "--num-scheduler-steps=", "--multi-step-stream-outputs",
             "--disable-async-output-proc"),
    *_accept("graphs do not depend on the context length", "--max-seq-len-to-capture=",
             "--max-context-len-to-capture="),
    *_accept("the engine core has a process of its own", "--disable-frontend-multiprocessing", "--engine-use-ray"),
    *_accept("requests are logged with --no-disable-log-requests alone", "--disable-uvicorn-access-log",
             "--disable-access-log-for-endpoints="),
    *_accept("--log-level is for all of it", "--uvicorn-log-level="),
    *_accept("prompts are never logged", "--max-log-len="),
    *_accept("the log has the trace of every fault of the server", "--log-error-stack"),
    *_accept("the load is always at /load", "--enable-server-load-tracking"),
    *_accept("usage always has them", "--enable-prompt-tokens-details"),
    *_accept("answers always have X-Request-Id", "--enable-request-id-headers"),
    *_accept("templates see no tools then", "--exclude-tools-when-tool-choice-none"),
    *_accept("the template decides how it takes content", "--chat-template-content-format="),
    *_accept("headers may take 64 KiB", "--h11-max-incomplete-event-size=", "--h11-max-header-count="),
    *_accept("reasoning is split off by --reasoning-parser", "--enable-reasoning"),
    *_accept("there is one backend, and no fallback", "--guided-decoding-disable-fallback"),
    *_accept("there is one", "--prefix-caching-hash-algo=", "--disable-cascade-attn"),
    *_accept("only safetensors files are downloaded, and they are mapped", "--ignore-patterns=",
             "--safetensors-load-strategy=", "--model-loader-extra-config="),
    *_accept("weights are read without a progress bar", "--use-tqdm-on-load"),
    *_accept("Quire never runs code that comes with a model", "--code-revision="),
    *_accept("tokenizing needs no pool", "--tokenizer-pool-size=", "--tokenizer-pool-type=",
             "--tokenizer-pool-extra-config="),
    *_accept("adapters are split over GPUs as their layers are", "--fully-sharded-loras"),
    *_accept("steps are captured for several numbers of adapters", "--specialize-active-lora"),
    *_accept("an adapter that adds tokens is refused", "--lora-extra-vocab-size="),
    *_accept("there is text alone", "--skip-mm-profiling", "--language-model-only", "--disable-chunked-mm-input",
             "--disable-mm-preprocessor-cache"),
    *_refuse_but("there is one mode: the fast tokenizer", {"--tokenizer-mode": "auto"}),
    *_refuse_but("one engine is one server; start several behind a load balancer",
                 {"--data-parallel-size": "1", "--data-parallel-size-local": "1"}),
    *_refuse_but("a server has one API process; 1 is the only count", {"--api-server-count": "1"}),
    *_refuse_but(_HOSTS, {"--nnodes": "1", "--node-rank": "0"}),
    *_refuse_but(_TEXT_ALONE, {"--task": "auto generate", "--runner": "auto generate", "--convert": "auto none"}),
    *_refuse_but(MULTIMODAL, {"--limit-mm-per-prompt": "0", "--mm-processor-cache-gb": "0"}),
    *_refuse_but("the limit is always 20", {"--max-logprobs": "20"}),
    *_refuse_but("log-probabilities are those of the model, before sampling parameters",
                 {"--logprobs-mode": "raw_logprobs"}),
    *_refuse_but("not supported: a chunk is sent for every step", {"--stream-interval": "1"}),
    *_refuse_but("models are plugins, chosen by the checkpoint", {"--model-impl": "auto vllm"}),
    *_refuse_but("config.json is read", {"--config-format": "auto hf"}),
    *_refuse_but("the role is always assistant", {"--response-role": "assistant"}),
    *_refuse_but("not supported: the weights stay on the device; take a quantized checkpoint",
                 {"--cpu-offload-gb": "0"}),
    *_refuse_but(_TUNED, {
        "--preemption-mode": "recompute", "--scheduler-delay-factor": "0", "--num-lookahead-slots": "0",
        "--max-num-partial-prefills": "1", "--max-long-partial-prefills": "1", "--long-prefill-token-threshold": "0",
        "--performance-mode": "balanced",
    }),
    *_refuse_but(_COMPILATION, {"--optimization-level": "1 2 3", "--compilation-config": "1 2 3 {}"}),
    *_refuse_but(_UNCHANGED, {"--spec-decoding-acceptance-method": "rejection_sampler"}),
    *_refuse_but("not supported yet", {"--decode-context-parallel-size": "1", "--prefill-context-parallel-size": "1"}),
    *_refuse_but("every method and header is allowed to the pages that --allowed-origins names",
                 {"--allowed-methods": '* ["*"]', "--allowed-headers": '* ["*"]'}),
)  # fmt: skip
"""Flags that are accepted, or refused for a value."""

_ABSENT = {
    "--allowed-local-media-path --allowed-media-domains --mm-processor-kwargs --media-io-kwargs --mm-encoder-tp-mode "
    "--mm-processor-cache-type --mm-shm-cache-max-object-size-mb --interleave-mm-strings --video-pruning-rate "
    "--enable-mm-embeds --default-mm-loras --enable-tower-connector-lora": MULTIMODAL,
    "--hf-overrides --rope-scaling --rope-theta --rope-parameters --hf-config-path": _HF_CONFIG,
    "--cuda-graph-sizes --cudagraph-capture-sizes --max-cudagraph-capture-size": _COMPILATION,
    "--enable-ssl-refresh": "not supported: restart the server for a new certificate",
    "--uds --headless --grpc": _ONE_PORT,
    "--override-pooler-config --pooler-config --io-processor-plugin --tokens-only": _TEXT_ALONE,
    "--data-parallel-rank --data-parallel-start-rank --data-parallel-address --data-parallel-rpc-port "
    "--data-parallel-backend --data-parallel-hybrid-lb --data-parallel-external-lb --max-parallel-loading-workers":
        _DISTRIBUTED,
    "--master-addr --master-port --ray-workers-use-nsight": _HOSTS,
    "--enable-expert-parallel --all2all-backend --enable-eplb --eplb-config --num-redundant-experts "
    "--eplb-window-size --eplb-step-interval --expert-placement-strategy --enable-dbo --dbo-decode-token-threshold "
    "--dbo-prefill-token-threshold --moe-backend": _EXPERTS,
    "--kv-transfer-config --kv-events-config --ec-transfer-config --kv-offloading-size --kv-offloading-backend":
        _KV_TRANSFER,
    "--kv-cache-memory-bytes --kv-cache-memory": "now --gpu-memory-utilization, or --num-gpu-blocks-override",
    "--calculate-kv-scales --quantization-param-path": "not supported: scales of an FP8 cache come from the checkpoint",
    "--mamba-cache-dtype --mamba-ssm-cache-dtype --mamba-block-size --kv-sharing-fast-prefill": _MAMBA,
    "--scheduler-cls": "now --scheduling-policy MODULE:CLASS",
    "--speculative-disable-by-batch-size --ngram-prompt-lookup-max --ngram-prompt-lookup-min": _SPECULATION,
    "--speculative-max-model-len --speculative-model-quantization --speculative-disable-mqa-scorer":
        "decided by the engine: the draft model is read as its checkpoint says",
    "--typical-acceptance-sampler-posterior-threshold --typical-acceptance-sampler-posterior-alpha "
    "--disable-logprobs-during-spec-decoding": _UNCHANGED,
    "--otlp-traces-endpoint --collect-detailed-traces --enable-layerwise-nvtx-tracing --profiler-config "
    "--enable-logging-iteration-details": _TRACES,
    "--kv-cache-metrics --kv-cache-metrics-sample --cudagraph-metrics --enable-mfu-metrics":
        "not supported: /metrics has what there is",
    "--enable-log-outputs --enable-log-deltas": _PRIVATE,
    "--worker-cls --worker-extension-cls": "now a plugin: --executor",
    "--middleware": "now a plugin: --plugin DIST, with the hook quire_extend_app",
    "--logits-processor-pattern --logits-processors": "now a plugin: --logits-processor MODULE:CLASS",
    "--tool-parser-plugin": "now a plugin: --tool-call-parser MODULE:CLASS",
    "--reasoning-parser-plugin": "now a plugin: --reasoning-parser MODULE:CLASS",
    "--tool-server": "not supported: the client runs the tools",
    "--trust-request-chat-template": "not supported: templates in requests are not run; give --chat-template",
    "--return-tokens-as-token-ids": "now return_tokens_as_token_ids in requests",
    "--enable-tokenizer-info-endpoint": "not supported: use /tokenize and /detokenize",
    "--disable-fastapi-docs": "not supported: let a proxy hide /docs and /openapi.json",
    "--allow-credentials": "not supported: requests of pages send keys, not cookies",
    "--guided-decoding-disable-any-whitespace": "now --structured-output-backend-option disable_any_whitespace=true",
    "--guided-decoding-disable-additional-properties":
        "now --structured-output-backend-option disable_additional_properties=true",
    "--structured-outputs-config": "now --structured-output-backend",
    "--attention-config": "now --attention-backend",
    "--kernel-config --additional-config --override-neuron-config --override-attention-dtype --weight-transfer-config":
        "not supported: Quire has no such setting",
    "--hf-token": "set HF_TOKEN instead",
    "--tokenizer-revision": "give a folder with --tokenizer",
    "--skip-tokenizer-init": "not supported: the server reads and writes text",
    "--enable-prompt-embeds": "not supported: prompts are text or token ids",
    "--pt-load-map-location": "not supported: weights are read from safetensors files alone",
    "--enable-sleep-mode": "not supported yet",
    "--disable-sliding-window": "not supported: the model's own windows are used",
    "--log-config-file": "now --log-level",
    "--enable-lora-bias": "not supported: an adapter with trained biases is refused",
    "--long-lora-scaling-factors": "not supported: train the adapter on a model with the longer context",
    "--qlora-adapter-name-or-path": "now --lora-modules NAME=PATH",
    "--prompt-adapter --enable-prompt-adapter --max-prompt-adapters --max-prompt-adapter-token": _PROMPT_ADAPTERS,
}  # fmt: skip

ABSENT_FLAGS: Mapping[str, str] = MappingProxyType(
    {name: reason for names, reason in _ABSENT.items() for name in names.split()}
)
"""Flags that Quire does not take, and what became of each."""

SHORT_FLAGS: Mapping[str, str] = MappingProxyType({
    "-asc": "--api-server-count",
    "-dp": "--data-parallel-size",
    "-dpl": "--data-parallel-size-local",
    "-dpn": "--data-parallel-rank",
    "-dpr": "--data-parallel-start-rank",
    "-dpa": "--data-parallel-address",
    "-dpp": "--data-parallel-rpc-port",
    "-dpb": "--data-parallel-backend",
    "-dph": "--data-parallel-hybrid-lb",
    "-dpe": "--data-parallel-external-lb",
    "-dcp": "--decode-context-parallel-size",
    "-pcp": "--prefill-context-parallel-size",
    "-ep": "--enable-expert-parallel",
    "-cc": "--compilation-config",
    "-O": "--optimization-level",
})  # fmt: skip
"""Short forms of vLLM's flags, and the flags."""
