"""One rank: loads the model, sizes and allocates the KV cache, and runs steps."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from quire.core.config import EngineConfig, PluginChoice
from quire.core.contracts.attention import AttentionBackend, AttentionLimits, AttentionSpec
from quire.core.contracts.executor import KVCapacity
from quire.core.contracts.logits_processor import LogitsProcessor
from quire.core.contracts.model import Model
from quire.core.contracts.quant import QuantizationLoader
from quire.core.contracts.sampler import Sampler
from quire.core.contracts.spec_decode import DeviceProposer, DraftSource, SpeculativeProposer, TargetState
from quire.core.env import num_threads
from quire.core.errors import ConfigError
from quire.core.layers.builder import LayerBuilder
from quire.core.loading.hf_config import read_hf_config
from quire.core.loading.loader import load_model
from quire.core.messages import SchedulerOutput
from quire.core.ops.device_profile import check_device
from quire.core.ops.pinned import reserve_pinned_memory
from quire.core.plugin.options import parse_options
from quire.core.plugin.target import load_target
from quire.core.sample.forced_acceptance import ForcedAcceptance
from quire.core.sample.verify import verify_drafts
from quire.core.worker.compilation import CompileCounter, precompile_kernels
from quire.core.worker.cuda_graphs.decode import choose_verify_query_lens, compute_max_captured_tokens
from quire.core.worker.draft_runner import DraftRunner
from quire.core.worker.kv_cache import (
    KVCache,
    compute_num_blocks,
    group_layers,
    measure_device_bytes,
    validate_max_model_len,
)
from quire.core.worker.model_runner import ModelRunner
from quire.core.worker.readback import Readback
from quire.core.worker.request_table import RequestTable
from quire.core.worker.sampling import SamplingRunner
from quire.core.worker.stopwatch import StartupTimer
from quire.core.worker.warmup import make_largest_step, make_warmup_steps

__all__ = ["Worker"]

_log = logging.getLogger("quire.worker")


class Worker:
    """Built in one go: afterwards ``capacity`` is final and ``execute_step`` may be called."""

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._device = torch.device(config.model.device)
        check_device(self._device)
        self._watch = StartupTimer()
        torch.manual_seed(config.model.seed)
        if self._device.type == "cpu":  # one core is left to the engine and the front: beside them, more is slower
            torch.set_num_threads(config.cpu_threads or num_threads() or max(1, (os.cpu_count() or 2) - 1))
        model = self._load(config.model.path, "model", "quant")
        proposer = self._proposer(model)
        self._watch.end_phase("weights")
        backends, group_of = self._attention(model.attention_specs())
        kv = KVCache(backends, group_of, self._device)
        limits, block_size, spec = config.scheduler, config.cache.block_size, config.speculation
        rows, longest, ahead = (
            limits.max_num_seqs,
            config.model.max_model_len,
            0 if spec is None else spec.num_speculative_tokens,
        )
        table = RequestTable(rows, longest, block_size, len(backends), self._device, ahead)
        sampler = self._sampler()
        forced = None if spec is None else spec.forced_acceptance
        verifier = verify_drafts if forced is None else ForcedAcceptance(forced)
        sampling_runner = SamplingRunner(
            sampler, self._processors(), table, compute_max_captured_tokens(rows, ahead), verifier
        )
        self._runner = ModelRunner(
            model, backends, kv, table, sampling_runner, block_size, config.model.vocab_size, ahead
        )
        if proposer is not None:
            self._runner.draft_runner = self._drafting(proposer, sampler, table, kv)
        self.capacity = self._make_cache(rows * longest)
        self._watch.end_phase("KV cache")
        if self._runner.decode_graphs is not None:
            foreign = any(not choice.target.startswith("quire.") for choice in config.plugins.values())
            graphs = measure_device_bytes(partial(self._runner.capture_graphs, launch_first=foreign))
            self.capacity = replace(self.capacity, graph_bytes=graphs)
            self._watch.end_phase("graphs")
        if self._device.type == "cuda":
            reserve_pinned_memory()
        self._compiled = CompileCounter() if self._device.type == "cuda" else None
        _log.info("started: %s", self._watch)

    def _make_cache(self, most_tokens: int) -> KVCapacity:
        """Measure what memory is left, and allocate the cache."""
        config, runner = self._config, self._runner
        weights = sum(p.numel() * p.itemsize for p in runner.parameters())
        activations = self._profile() if self._device.type == "cuda" else 0
        spare = self._kv_bytes(weights, activations)
        num_blocks = compute_num_blocks(spare, runner.bytes_per_block, config.cache, most_tokens)
        validate_max_model_len(num_blocks, config.cache.block_size, config.model.max_model_len)
        runner.allocate_kv_cache(num_blocks)
        return KVCapacity(runner.kv_cache.groups, num_blocks, runner.bytes_per_block, weights, activations)

    def execute_step(self, step: SchedulerOutput) -> Readback:
        """Launch a step; returns before its tokens are known."""
        try:
            under_way = self._runner.execute_step(step)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            raise
        if self._compiled is not None:
            under_way.num_compiled_kernels = self._compiled.take_count()
        return under_way

    def _load(self, path: str, model_key: str, quant_key: str) -> Model:
        model = self._config.model
        hf_config = read_hf_config(Path(path))
        dtype = getattr(torch, model.dtype)
        return load_model(
            _load(self._config.plugin(model_key), Model),
            hf_config,
            Path(path),
            dtype=dtype,
            device=self._device,
            kv_dtype=dtype if self._config.cache.dtype == "auto" else getattr(torch, self._config.cache.dtype),
            block_size=self._config.cache.block_size,
            quant=self._quant(quant_key, hf_config),
            load_format=model.load_format,
            seed=model.seed,
        )

    def _quant(self, key: str, hf_config: Any) -> QuantizationLoader:
        choice = self._config.plugin(key)
        cls = _load(choice, QuantizationLoader)
        return cls(getattr(hf_config, "quantization_config", None) or {}, _options(cls, choice))

    def _proposer(self, model: Model) -> DeviceProposer | None:
        """Who drafts on the device, with its weights."""
        spec = self._config.speculation
        if spec is None:
            return None
        choice = self._config.plugin("spec_decode")
        cls = _load(choice, SpeculativeProposer)
        if not issubclass(cls, DeviceProposer):
            return None
        proposer = cls(spec.num_speculative_tokens, _options(cls, choice))
        path, mine, limits = spec.draft_model_path, self._config.model, self._config.scheduler
        dtype, block_size = getattr(torch, mine.dtype), self._config.cache.block_size

        def make_builder(hf_config: Any) -> LayerBuilder:
            quant = self._quant("draft_quant", hf_config)
            return LayerBuilder(dtype, self._device, dtype, block_size, quant, max_positions=mine.max_model_len)

        load_model = partial(self._load, str(path), "draft_model", "draft_quant")
        config, folder = read_hf_config(Path(mine.path)), None if path is None else Path(path)
        most = limits.max_num_batched_tokens + compute_max_captured_tokens(
            limits.max_num_seqs, spec.num_speculative_tokens
        )
        own = None if folder is None else read_hf_config(folder)
        proposer.load_weights(DraftSource(folder, model, config, make_builder, load_model, mine.load_format, own, most))
        return proposer

    def _drafting(self, proposer: DeviceProposer, sampler: Sampler, table: RequestTable, kv: KVCache) -> DraftRunner:
        """The proposer's own layers live under the block ids of the group of layers that keeps every token."""
        config = self._config
        whole = [g for g, group in enumerate(kv.groups) if group.window is None]
        specs = proposer.attention_specs()
        if specs and not whole:
            raise ConfigError("every layer has a sliding window: no draft can share the cache; use --spec-method ngram")
        follows = whole[0] if whole else 0
        backends, group_of = self._attention(specs)
        own = KVCache(backends, group_of, self._device)
        sizes = (config.cache.block_size, config.model.max_model_len, config.scheduler.max_num_seqs)
        columns = (table.sampling, table.num_computed_tokens, table.block_tables[follows])
        proposer.attach_target(TargetState(sampler, *columns, own.layers, backends, group_of, *sizes))
        name = config.plugin("spec_decode").name
        return DraftRunner(name, proposer, table, config.model.vocab_size, own, follows)

    def _attention(self, layers: Sequence[AttentionSpec]) -> tuple[list[AttentionBackend], list[int]]:
        choice = self._config.plugin("attention")
        backend_class = _load(choice, AttentionBackend)
        specs, group_of = group_layers(layers)
        for spec in specs:
            if reasons := backend_class.unsupported(spec, self._device):
                raise ConfigError(
                    f"attention backend {choice.name!r} cannot run this model on {self._device.type}: "
                    f"{'; '.join(reasons)}; choose another with --attention-backend"
                )
        ahead = 0 if self._config.speculation is None else self._config.speculation.num_speculative_tokens
        limits = AttentionLimits(
            self._config.scheduler.max_num_seqs,
            self._config.model.max_model_len + ahead,
            self._device,
            1 + ahead,
        )
        options = _options(backend_class, choice)
        backends = [backend_class(spec, self._device, options) for spec in specs]
        for backend in backends:
            backend.allocate_workspaces(limits)
        return backends, group_of

    def _sampler(self) -> Sampler:
        choice = self._config.plugin("sampler")
        cls = _load(choice, Sampler)
        return cls(self._config.model.vocab_size, self._device, _options(cls, choice))

    def _processors(self) -> list[tuple[str, LogitsProcessor]]:
        made = []
        for choice in self._config.plugins_of("logits_processor"):
            cls = _load(choice, LogitsProcessor)
            made.append((choice.name, cls(self._config.model.vocab_size, self._device, _options(cls, choice))))
        return made

    def _kv_bytes(self, weights: int, activations: int) -> int:
        cache = self._config.cache
        if self._device.type == "cpu":
            return cache.cpu_bytes
        free, total = torch.cuda.mem_get_info()
        used = total - free
        spare = int(total * cache.gpu_memory_utilization) - used - activations
        if spare <= 0:
            raise ConfigError(
                f"gpu_memory_utilization {cache.gpu_memory_utilization} leaves nothing for the KV cache: weights take "
                f"{weights / 2**30:.1f} GiB, a step {activations / 2**30:.1f} GiB, of {total / 2**30:.1f} GiB; raise it"
            )
        return spare

    def _profile(self) -> int:
        """Compile what steps need, then measure the bytes that the largest takes beside weights and cache. All tokens
        go to the padding block."""
        limits, longest = self._config.scheduler, self._config.model.max_model_len
        queries = choose_verify_query_lens(self._runner.max_draft_tokens)
        self._runner.allocate_kv_cache(1)
        captured = not self._config.enforce_eager
        if captured and not all("decode" in backend.graph_support for backend in self._runner.backends):
            name, captured = self._config.plugin("attention").name, False
            _log.info("attention backend %s cannot be captured: running eagerly", name)

        def run_warmup() -> None:
            for step in make_warmup_steps(limits, longest, queries):
                self._runner.execute_step(step)
            if captured:
                self._runner.warm_up_graphs(limits.max_num_batched_tokens)

        precompile_kernels(run_warmup)
        if captured and self._runner.decode_graphs is None:  # the warm-up failed
            self._runner.warm_up_graphs(limits.max_num_batched_tokens)
        self._watch.end_phase("kernels")
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        self._runner.execute_step(make_largest_step(limits, longest)).result()
        peak = torch.cuda.max_memory_allocated() - before
        torch.cuda.empty_cache()
        self._watch.end_phase("profile")
        return peak


def _load(choice: PluginChoice, contract: type) -> Any:
    return load_target(choice.target, f"{contract.__module__}:{contract.__name__}")


def _options(cls: type, choice: PluginChoice) -> Any:
    return parse_options(cls, choice.options)
