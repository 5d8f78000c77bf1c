"""The contracts, one a kind of plugin, and what crosses them. Each is imported at its first use.

``NAMES_OF_MODULE`` says which name lives where: the docstrings there are the reference.
"""
# ruff: noqa: F403, F405 - the stars are for type checkers, and __all__ is checked by a test

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quire.core.adapters import AdapterActivity
    from quire.core.config import *
    from quire.core.contracts.adapter import *
    from quire.core.contracts.attention import *
    from quire.core.contracts.executor import *
    from quire.core.contracts.kv import *
    from quire.core.contracts.logits_processor import *
    from quire.core.contracts.metrics import *
    from quire.core.contracts.model import *
    from quire.core.contracts.op import *
    from quire.core.contracts.policy import *
    from quire.core.contracts.quant import *
    from quire.core.contracts.quantizer import *
    from quire.core.contracts.reasoning_parser import *
    from quire.core.contracts.router import *
    from quire.core.contracts.sampler import *
    from quire.core.contracts.spec_decode import *
    from quire.core.contracts.structured_output import *
    from quire.core.contracts.tool_parser import *
    from quire.core.contracts.tool_parser_text import *
    from quire.core.loading.peft_adapter import LoraWeights, PeftAdapter, PeftConfig, compute_content_hash, read_adapter
    from quire.core.messages import (
        BlockCopy,
        EngineCoreRequest,
        HostDraft,
        LogprobRows,
        ModelRunnerOutput,
        NewRequest,
        SchedulerOutput,
        TokenMasks,
    )
    from quire.core.parsing.json_calls import HeaderToolParser, JsonToolParser
    from quire.core.parsing.python_calls import PythonicToolParser
    from quire.core.parsing.xml_calls import XmlToolParser
    from quire.core.request import Request
    from quire.core.sampling_params import SamplingParams
    from quire.core.scheduling_params import SchedulingParams
    from quire.core.stats import ENGINE_STATS, QuarantinedPlugin, RequestStats, StepFailure, StepStats
    from quire.core.structured_outputs import StructuredOutputsParams
    from quire.core.worker.worker import Worker

__all__ = [
    "ENGINE_STATS",
    "JSON_SCHEMA_FORMATS",
    "MIN_PREFILL_TOKENS",
    "NO_DEADLINE",
    "OPERATIONS",
    "ActivationFormat",
    "AdapterActivity",
    "AdapterConfig",
    "AdapterLayer",
    "AdapterLimits",
    "AdapterMethod",
    "AdapterTensors",
    "Allocation",
    "AppendedTerm",
    "ArgumentFormat",
    "AttentionBackend",
    "AttentionBatch",
    "AttentionLimits",
    "AttentionSpec",
    "AuxHiddenStates",
    "BatchingPolicy",
    "BlockCopy",
    "CacheConfig",
    "CallFormat",
    "CompiledGrammar",
    "DeviceProposer",
    "DraftSource",
    "DraftTokens",
    "EngineConfig",
    "EngineCoreRequest",
    "Executor",
    "FinishedStep",
    "ForwardContext",
    "GrammarState",
    "Grants",
    "GraphKey",
    "GraphKind",
    "GroupColumns",
    "GroupKey",
    "HeaderToolParser",
    "HostDraft",
    "HostProposer",
    "InputFormat",
    "JsonToolParser",
    "KVAllocator",
    "KVCapacity",
    "KVGroup",
    "KVLayout",
    "KVStats",
    "LayerInfo",
    "LayerKV",
    "LinearMethod",
    "LogitsBatch",
    "LogitsProcessor",
    "LogprobRows",
    "LoraWeights",
    "LowRankShrink",
    "LowRankTerm",
    "MalformedCallError",
    "MarkerMatch",
    "Markers",
    "MaskRequest",
    "MetricsExporter",
    "Model",
    "ModelConfig",
    "ModelRunnerOutput",
    "NewRequest",
    "Operations",
    "ParallelConfig",
    "PeftAdapter",
    "PeftConfig",
    "PluginChoice",
    "PrefixMatch",
    "PythonicToolParser",
    "QuantActivation",
    "QuantizationJob",
    "QuantizationLoader",
    "Quantizer",
    "QuarantinedPlugin",
    "Reading",
    "ReasoningParser",
    "Refusal",
    "Reject",
    "ReplicaLoad",
    "Request",
    "RequestColumns",
    "RequestInfo",
    "RequestStats",
    "RoutedRequest",
    "Router",
    "Sampler",
    "SamplingBatch",
    "SamplingParams",
    "SamplingTable",
    "SchedulerConfig",
    "SchedulerOutput",
    "SchedulingParams",
    "ShrinkInProduct",
    "SpeculationConfig",
    "SpeculativeProposer",
    "StepFailure",
    "StepFuture",
    "StepReport",
    "StepStats",
    "StepTokens",
    "StepView",
    "StoredWeight",
    "StructuredOutputBackend",
    "StructuredOutputsParams",
    "TargetState",
    "TextReader",
    "TokenMasks",
    "TokenizerInfo",
    "ToolCalls",
    "ToolParser",
    "ToolQuantizer",
    "Usage",
    "Worker",
    "XmlToolParser",
    "compute_content_hash",
    "get_native_activation",
    "make_default_plan",
    "read_adapter",
]

NAMES_OF_MODULE = {
    "quire.core.contracts.adapter": ("AdapterLayer", "AdapterLimits", "AdapterMethod", "AdapterTensors"),
    "quire.core.contracts.attention": (
        "AttentionBackend", "AttentionBatch", "AttentionLimits", "AttentionSpec", "GraphKey", "GraphKind",
        "KVLayout", "LayerKV",
    ),
    "quire.core.contracts.kv": ("Allocation", "KVAllocator", "KVGroup", "KVStats", "PrefixMatch"),
    "quire.core.contracts.policy": (
        "MIN_PREFILL_TOKENS", "NO_DEADLINE", "BatchingPolicy", "FinishedStep", "Grants", "GroupColumns", "GroupKey",
        "Refusal", "Reject", "RequestColumns", "RequestInfo", "StepReport", "StepView", "Usage", "make_default_plan",
    ),
    "quire.core.contracts.quant": (
        "ActivationFormat", "AppendedTerm", "InputFormat", "LayerInfo", "LinearMethod", "LowRankShrink", "LowRankTerm",
        "QuantActivation", "QuantizationLoader", "ShrinkInProduct", "StoredWeight", "get_native_activation",
    ),
    "quire.core.contracts.model": ("AuxHiddenStates", "ForwardContext", "Model"),
    "quire.core.contracts.op": ("OPERATIONS", "Operations"),
    "quire.core.contracts.sampler": ("Sampler", "SamplingBatch", "SamplingTable"),
    "quire.core.contracts.logits_processor": ("LogitsBatch", "LogitsProcessor"),
    "quire.core.contracts.spec_decode": (
        "DeviceProposer", "DraftSource", "DraftTokens", "HostProposer", "SpeculativeProposer", "StepTokens",
        "TargetState",
    ),
    "quire.core.contracts.structured_output": (
        "JSON_SCHEMA_FORMATS", "CompiledGrammar", "GrammarState", "MaskRequest", "StructuredOutputBackend",
        "TokenizerInfo",
    ),
    "quire.core.contracts.executor": ("Executor", "KVCapacity", "StepFuture"),
    "quire.core.contracts.metrics": ("MetricsExporter",),
    "quire.core.contracts.tool_parser": ("ArgumentFormat", "CallFormat", "ToolCalls", "ToolParser"),
    "quire.core.contracts.tool_parser_text": ("MalformedCallError", "MarkerMatch", "Markers", "Reading", "TextReader"),
    "quire.core.contracts.reasoning_parser": ("ReasoningParser",),
    "quire.core.parsing.json_calls": ("HeaderToolParser", "JsonToolParser"),
    "quire.core.parsing.xml_calls": ("XmlToolParser",),
    "quire.core.parsing.python_calls": ("PythonicToolParser",),
    "quire.core.contracts.quantizer": ("QuantizationJob", "Quantizer", "ToolQuantizer"),
    "quire.core.contracts.router": ("ReplicaLoad", "RoutedRequest", "Router"),
    "quire.core.config": (
        "AdapterConfig", "CacheConfig", "EngineConfig", "ModelConfig", "ParallelConfig", "PluginChoice",
        "SchedulerConfig", "SpeculationConfig",
    ),
    "quire.core.loading.peft_adapter": (
        "LoraWeights", "PeftAdapter", "PeftConfig", "compute_content_hash", "read_adapter",
    ),
    "quire.core.messages": (
        "BlockCopy", "EngineCoreRequest", "HostDraft", "LogprobRows", "ModelRunnerOutput", "NewRequest",
        "SchedulerOutput", "TokenMasks",
    ),
    "quire.core.request": ("Request",),
    "quire.core.sampling_params": ("SamplingParams",),
    "quire.core.scheduling_params": ("SchedulingParams",),
    "quire.core.worker.worker": ("Worker",),
    "quire.core.structured_outputs": ("StructuredOutputsParams",),
    "quire.core.adapters": ("AdapterActivity",),
    "quire.core.stats": ("ENGINE_STATS", "QuarantinedPlugin", "RequestStats", "StepFailure", "StepStats"),
}  # fmt: skip
_MODULE_OF_NAME = {name: module for module, names in NAMES_OF_MODULE.items() for name in names}


def __getattr__(name: str) -> Any:
    if name in _MODULE_OF_NAME:
        return getattr(importlib.import_module(_MODULE_OF_NAME[name]), name)
    raise AttributeError(f"module 'quire.sdk.contracts' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
