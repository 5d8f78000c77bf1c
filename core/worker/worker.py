"""One rank: loads the model, sizes and allocates the KV cache, captures CUDA graphs, and runs steps."""

from __future__ import annotations

import logging
import os
import sys
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial

import msgspec
import torch

from quire.core.config import EngineConfig
from quire.core.contracts.executor import KVCapacity
from quire.core.contracts.model import Model
from quire.core.contracts.spec_decode import DeviceProposer
from quire.core.control import ControlMethods
from quire.core.env import count_cpus, num_threads
from quire.core.layers.adapters import ModelAdapters
from quire.core.layers.parallel import TensorParallel
from quire.core.layers.stage import PipelineStage
from quire.core.messages import SchedulerOutput, TokenMasks
from quire.core.ops.device_profile import check_device
from quire.core.ops.pinned import reserve_pinned_memory
from quire.core.sample.forced_acceptance import ForcedAcceptance
from quire.core.sample.verify import verify_drafts
from quire.core.sched.limits import compute_max_held_tokens
from quire.core.worker.adapter_runner import AdapterRunner, CopyLimits
from quire.core.worker.compilation import CompileCounter, precompile_kernels
from quire.core.worker.component_loader import ComponentLoader
from quire.core.worker.cuda_graphs.capture_sizes import (
    choose_capture_sizes,
    choose_verify_query_lens,
    compute_max_captured_tokens,
)
from quire.core.worker.kv_cache import (
    KVCache,
    compute_kv_cache_bytes,
    compute_num_blocks,
    measure_kept_bytes,
    measure_peak_bytes,
    validate_max_model_len,
)
from quire.core.worker.model_runner import ModelRunner
from quire.core.worker.pipeline import StageLink, share_attention_specs, share_module_shapes
from quire.core.worker.readback import Readback
from quire.core.worker.request_table import RequestTable
from quire.core.worker.sampling import SamplingRunner
from quire.core.worker.startup_timer import StartupTimer
from quire.core.worker.token_mask_buffer import TokenMaskBuffer
from quire.core.worker.warmup import make_largest_step, make_open_masks, run_warmup

__all__ = ["MemoryProfile", "Worker", "WorkerInfo"]

_log = logging.getLogger("quire.worker")
_SPARE_BYTES = 20 << 20
"""A segment of torch's allocator, for what a step allocates beside its activations."""


@dataclass(frozen=True, slots=True)
class MemoryProfile:
    """What one rank measured before its KV cache was allocated."""

    weight_bytes: int
    activation_bytes: int
    """What the largest step needs beside weights and cache; 0 on a CPU, where it is not measured."""
    num_blocks: int
    """Blocks per group that fit. Where several ranks share a model, each allocates the least of theirs."""


class WorkerInfo(msgspec.Struct):
    """What one rank says of itself."""

    rank: int
    pid: int
    device: str
    allocated_bytes: int
    """Of the device's memory, by tensors; 0 on a CPU."""
    peak_bytes: int
    """The most since the start."""
    stage: int = 0
    """Of the pipeline."""


class Worker:
    """Once started, ``capacity`` is final and ``execute_step`` may be called.

    ``start`` drives the stages of a start in this order: ``load_model``, ``build_model_runner``, ``profile_memory``,
    ``allocate_kv_cache``, ``capture_graphs``, ``end_start``. An executor of several ranks drives them itself, since
    the ranks agree between two of them.
    """

    model_runner: ModelRunner
    """What runs the steps. Public for tests and tools, which look inside through it alone."""
    capacity: KVCapacity

    _model: Model
    _proposer: DeviceProposer | None
    _adapters: ModelAdapters | None
    _memory_profile: MemoryProfile

    def __init__(
        self, config: EngineConfig, parallel: TensorParallel | None = None, link: StageLink | None = None
    ) -> None:
        """``parallel``: the place of this rank among those that share every layer, on the current GPU of its process.
        None: layers are whole. ``link`` connects it with the other stages; None: there is one."""
        self._config = config
        self._parallel = parallel or TensorParallel()
        self._link = link
        self._stage = PipelineStage() if link is None else link.stage
        self._device = torch.device(config.model.device)
        if config.parallel.num_workers > 1 and self._device.type == "cuda":
            self._device = torch.device("cuda", torch.cuda.current_device())
        check_device(self._device)
        self.startup_timer = StartupTimer()
        """What has to do with the start, and how long it took; ``end_start`` logs it."""
        self.control = ControlMethods("worker")
        """What ``collective_rpc`` may call, between two steps."""
        self.control.add_method("describe_worker", self.describe_worker)
        self._components = ComponentLoader(config, self._device, self._parallel, self._stage)
        self._compile_counter: CompileCounter | None = None
        torch.manual_seed(config.model.seed)
        if self._device.type == "cpu":  # one core is left to the scheduler and the API process, or they slow the worker
            num_cores = max(1, (count_cpus() - 1) // config.parallel.num_workers)
            torch.set_num_threads(config.cpu_threads or num_threads() or num_cores)

    def start(self) -> None:
        """Do everything that comes before the first step, as the only rank."""
        self.load_model()
        self.build_model_runner()
        self.allocate_kv_cache(self.profile_memory().num_blocks)
        self.capture_graphs()
        self.end_start()

    def load_model(self) -> None:
        """Load the weights: the target's, and those of a proposer that drafts on the device."""
        self._adapters = self._components.make_adapters()
        self._model = self._components.load_target_model(self._adapters)
        if self._adapters is not None and self._link is not None:
            share_module_shapes(self._link, self._adapters)
        if self._adapters is not None:
            self._adapters.check_target_modules()
        self._proposer = self._components.load_proposer(self._model)
        self.startup_timer.end_phase("weights")

    def build_model_runner(self) -> None:
        """Construct what runs steps around the model. The KV cache has no memory yet."""
        config, components = self._config, self._components
        max_num_seqs, num_drafts = config.scheduler.max_num_seqs, components.num_speculative_tokens
        block_size, vocab_size = config.cache.block_size, config.model.vocab_size
        layer_specs = self._model.attention_specs()
        model_specs = layer_specs if self._link is None else share_attention_specs(self._link, layer_specs)
        attention = components.make_attention_groups(layer_specs, model_specs)
        kv_cache = KVCache(attention.backends, attention.group_of, self._device)
        table = RequestTable(
            max_num_seqs,
            config.model.max_model_len,
            block_size,
            len(attention.backends),
            self._device,
            lookahead=num_drafts,
        )
        forced_acceptance = None if config.speculation is None else config.speculation.forced_acceptance
        max_logits_rows = compute_max_captured_tokens(max_num_seqs, num_drafts)
        sampling_runner = SamplingRunner(
            components.make_sampler(),
            components.make_logits_processors(),
            table,
            max_logits_rows,
            verify_drafts if forced_acceptance is None else ForcedAcceptance(forced_acceptance),
            self._make_token_mask_buffer(num_drafts),
            components.make_vocab_sampler(self._model, max(max_logits_rows, max_num_seqs * (1 + num_drafts))),
        )
        self.model_runner = ModelRunner(
            self._model, attention.backends, kv_cache, table, sampling_runner, block_size, vocab_size, num_drafts
        )
        if self._adapters is not None:
            copy_limits = CopyLimits() if self._device.type == "cuda" else None
            self._add_adapter_runner(AdapterRunner(self._adapters, table.num_rows, self._device, copy_limits))
        if self._link is not None:
            self.model_runner.pipeline = components.make_pipeline_runner(self._link, self._model, table)
        if self._proposer is not None:
            self.model_runner.draft_runner = components.make_draft_runner(self._proposer, table, kv_cache)

    def _add_adapter_runner(self, runner: AdapterRunner) -> None:
        self.model_runner.adapters = runner
        for method in (runner.stage_adapter, runner.load_adapter, runner.unload_adapter, runner.forget_adapter):
            self.control.add_method(method.__name__, method)

    def _make_token_mask_buffer(self, num_drafts: int) -> TokenMaskBuffer | None:
        """None where no request may have a grammar."""
        config = self._config
        if config.plugin("structured_output").name == "none":
            return None
        max_num_seqs = config.scheduler.max_num_seqs
        max_masks = max_num_seqs * (1 + num_drafts)
        max_logits_rows = max(max_masks, compute_max_captured_tokens(max_num_seqs, num_drafts))
        return TokenMaskBuffer(max_masks, max_logits_rows, config.model.vocab_size, self._device)

    def profile_memory(self) -> MemoryProfile:
        """Compile the kernels of every kind of step, measure what the largest takes, and compute how many blocks of KV
        cache fit beside it."""
        config, runner = self._config, self.model_runner
        weight_bytes = sum(p.numel() * p.itemsize for p in runner.parameters())
        activation_bytes = 0
        if self._device.type == "cuda":
            runner.allocate_kv_cache(1)  # the padding block, in which every token of the warm-up is written
            self._warm_up_kernels()
            self.startup_timer.end_phase("kernels")
            largest_step = make_largest_step(config.scheduler, config.model.max_model_len, self._num_adapter_slots)
            # Where there can be masks it has them: its logits are copied then, as for penalties.
            masks = make_open_masks(largest_step, self._masked_vocab_size) if self._masked_vocab_size else None
            activation_bytes = measure_peak_bytes(lambda: runner.execute_step(largest_step, masks).result())
            self.startup_timer.end_phase("profile")
        kv_cache_bytes = compute_kv_cache_bytes(config.cache, self._device, weight_bytes, activation_bytes)
        # More blocks than all requests can fill at their longest would lie idle.
        max_tokens = config.scheduler.max_num_seqs * config.model.max_model_len
        num_blocks = compute_num_blocks(kv_cache_bytes, runner.bytes_per_block, config.cache, max_tokens)
        self._memory_profile = MemoryProfile(weight_bytes, activation_bytes, num_blocks)
        return self._memory_profile

    def allocate_kv_cache(self, num_blocks: int) -> None:
        """Allocate ``num_blocks`` blocks in every group. Raises ``ConfigError`` where they do not hold one request of
        the maximum length."""
        config, runner = self._config, self.model_runner
        block_size, max_model_len = config.cache.block_size, config.model.max_model_len
        max_held_tokens = compute_max_held_tokens(
            runner.kv_cache.groups,
            block_size,
            max_model_len,
            config.scheduler.max_num_batched_tokens,
            self._components.num_speculative_tokens,
        )
        validate_max_model_len(num_blocks, block_size, max_model_len, max_held_tokens)
        runner.allocate_kv_cache(num_blocks)
        self.capacity = KVCapacity(
            groups=runner.kv_cache.groups,
            num_blocks=num_blocks,
            bytes_per_block=runner.bytes_per_block,
            weight_bytes=self._memory_profile.weight_bytes,
            activation_bytes=self._memory_profile.activation_bytes,
        )
        self.startup_timer.end_phase("KV cache")

    def capture_graphs(self) -> None:
        """Capture the CUDA graphs that the warm-up prepared. They hold addresses in the cache, so it comes first."""
        if self.model_runner.decode_graphs is not None:
            # Kernels of other packages may tune themselves when first launched, which cannot happen in a capture.
            third_party = any(not choice.target.startswith("quire.") for choice in self._config.plugins.values())
            graph_bytes = measure_kept_bytes(partial(self.model_runner.capture_graphs, launch_first=third_party))
            self.capacity = replace(self.capacity, graph_bytes=graph_bytes)
            self.startup_timer.end_phase("graphs")
        if self._device.type == "cuda":
            reserve_pinned_memory()
            if self.model_runner.adapters is not None:
                self.model_runner.adapters.reserve_pinned_memory()

    def end_start(self) -> None:
        """The last stage: from here on traffic may come, and the worker survives what plugins do."""
        if self.model_runner.pipeline is not None:
            self.model_runner.pipeline.connect()
        # Before traffic a sampler that fails ends the start.
        if (fallback := self._components.make_fallback_sampler()) is not None:
            self.model_runner.sampling_runner.guard_sampler(self._config.plugin("sampler").name, fallback)
        # From here on a compilation is a stall that requests feel, so each is counted and reported.
        self._compile_counter = CompileCounter() if self._device.type == "cuda" else None
        _log.info("started: %s", self.startup_timer)

    def execute_step(self, step: SchedulerOutput) -> Readback:
        """Launch a step; returns before its tokens are known."""
        self.execute_model(step)
        return self.sample_tokens()

    def execute_model(self, step: SchedulerOutput) -> None:
        """Launch a step up to its logits; ``sample_tokens`` comes next."""
        try:
            self.model_runner.execute_model(step)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            self._recover_from(error, step)
            raise

    def sample_tokens(self, masks: TokenMasks | None = None) -> Readback:
        """Launch the rest of the step; returns before its tokens are known."""
        step = self.model_runner.launched_step
        try:
            readback = self.model_runner.sample_tokens(masks)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            self._recover_from(error, step)
            raise
        if self._compile_counter is not None:
            readback.num_compiled_kernels = self._compile_counter.take_count()
        return readback

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self._device

    @property
    def num_unchecked_tokens(self) -> int:
        """Steps of at most so many tokens need no ``has_memory_for``: those without prompts, which CUDA graphs run in
        memory of their own. What fits into a host's memory cannot be known."""
        return sys.maxsize if self._device.type == "cpu" else self._config.scheduler.max_num_seqs

    def has_memory_for(self, num_tokens: int) -> bool:
        """Whether a step of so many tokens fits, by the measured need of the largest. Where several ranks run it, all
        are asked before any begins: one that ran out of memory in the middle would leave the others waiting for it."""
        if num_tokens <= self.num_unchecked_tokens:
            return True
        share = num_tokens / self._config.scheduler.max_num_batched_tokens
        needed = int(self._memory_profile.activation_bytes * share)
        for _ in range(2):
            try:  # What torch keeps may lie in pieces, so that its sum says little. Both go back to it at once.
                _ = [torch.empty(size, dtype=torch.uint8, device=self._device) for size in (needed, _SPARE_BYTES)]
                return True
            except torch.OutOfMemoryError:
                torch.cuda.empty_cache()  # and give the smaller steps that follow what lies in pieces
        return False

    @property
    def is_compiling(self) -> bool:
        """Whether a kernel is being compiled, by the step that runs."""
        return self._compile_counter is not None and self._compile_counter.is_compiling

    def shutdown(self) -> None:
        """The last call. Memory is freed with the worker."""
        if self._compile_counter is not None:
            self._compile_counter.close()

    def describe_worker(self) -> WorkerInfo:
        """Where this rank runs, and the memory that it holds."""
        on_gpu = self._device.type == "cuda"
        allocated = torch.cuda.memory_allocated(self._device) if on_gpu else 0
        peak = torch.cuda.max_memory_allocated(self._device) if on_gpu else 0
        return WorkerInfo(self._rank, os.getpid(), str(self._device), allocated, peak, self._stage.index)

    @property
    def _rank(self) -> int:
        """Among those of all stages."""
        return self._stage.index * self._parallel.size + self._parallel.rank

    @property
    def _num_adapter_slots(self) -> int:
        return 0 if self._config.adapters is None else self._config.adapters.max_loras

    @property
    def _masked_vocab_size(self) -> int:
        """Of the logits, where there can be masks of grammars; else 0."""
        token_masks = self.model_runner.sampling_runner.token_masks
        return 0 if token_masks is None else self._config.model.vocab_size

    def _recover_from(self, error: BaseException, step: SchedulerOutput) -> None:
        if (pipeline := self.model_runner.pipeline) is not None:
            with suppress(RuntimeError):  # as below
                pipeline.finish_failed_step()
        if isinstance(error, torch.OutOfMemoryError):
            torch.cuda.empty_cache()  # give the smaller steps that follow what lies in pieces
        # A step launched behind this one may still hold its rows, whose blocks it may not have learned.
        with suppress(RuntimeError):  # a device that has failed: what happened first is the error to report
            self.model_runner.table.clear_block_tables(step.rows)

    def _warm_up_kernels(self) -> None:
        config, runner = self._config, self.model_runner
        use_graphs = not config.enforce_eager
        if use_graphs and not all("decode" in backend.graph_support for backend in runner.backends):
            use_graphs = False
            name = config.plugin("attention").name
            _log.info("attention backend %s cannot be captured: running eagerly", name)
        query_lens = choose_verify_query_lens(runner.max_draft_tokens)
        max_tokens = config.scheduler.max_num_batched_tokens

        def launch_all() -> None:
            max_model_len, num_slots = config.model.max_model_len, self._num_adapter_slots
            limits = config.scheduler
            # Graphs launch every size themselves.
            decode_sizes = () if use_graphs else choose_capture_sizes(limits.max_num_seqs)
            masked_vocab_size = self._masked_vocab_size
            run_warmup(
                runner.execute_step, limits, max_model_len, query_lens, num_slots, masked_vocab_size, decode_sizes
            )
            if use_graphs:
                runner.warm_up_graphs(max_tokens)
            else:
                runner.warm_up_drafts()

        precompile_kernels(launch_all, self._rank, config.parallel.num_workers)
        if not use_graphs:  # a second token is drafted from the first, which only a launch samples
            runner.launch_longest_drafts()
        if use_graphs and runner.decode_graphs is None:  # the warm-up failed before it came to the graphs
            runner.warm_up_graphs(max_tokens)
