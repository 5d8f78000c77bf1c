"""Constructs the plugins that a worker runs: model, quantization, attention, sampling, and a proposer on the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from quire.core.config import EngineConfig, PluginChoice
from quire.core.contracts.adapter import AdapterLimits, AdapterMethod
from quire.core.contracts.attention import AttentionBackend, AttentionLimits, AttentionSpec
from quire.core.contracts.logits_processor import LogitsProcessor
from quire.core.contracts.model import Model
from quire.core.contracts.op import Operations
from quire.core.contracts.quant import QuantizationLoader
from quire.core.contracts.sampler import Sampler
from quire.core.contracts.spec_decode import DeviceProposer, DraftSource, SpeculativeProposer, TargetState
from quire.core.errors import ConfigError
from quire.core.layers.adapters import ModelAdapters
from quire.core.layers.builder import LayerBuilder
from quire.core.layers.parallel import TensorParallel
from quire.core.layers.stage import PipelineStage
from quire.core.loading.hf_config import read_hf_config
from quire.core.loading.loader import load_model
from quire.core.ops.operation_table import OperationTable, check_operation_name
from quire.core.plugin.target import construct_chosen, load_target
from quire.core.sample.checked_sampler import CheckedSampler
from quire.core.sample.sampler import GumbelSampler
from quire.core.sample.vocab_parallel import VocabParallelSampler
from quire.core.worker.cuda_graphs.capture_sizes import compute_max_captured_tokens
from quire.core.worker.draft_runner import DraftRunner
from quire.core.worker.kv_cache import KVCache, group_layers
from quire.core.worker.pipeline import PipelineRunner, StageLink
from quire.core.worker.request_table import RequestTable

__all__ = ["AttentionGroups", "ComponentLoader"]


@dataclass(frozen=True, slots=True)
class AttentionGroups:
    """A backend for each group of layers with equal specs."""

    backends: list[AttentionBackend]
    """By group."""
    group_of: list[int]
    """By layer."""


class ComponentLoader:
    """Imports the class of each plugin that ``config`` names and constructs it on ``device`` with its own options.

    Names were resolved to ``module:Class`` strings before the worker started: nothing is looked up here. Models are
    the shard of the rank that ``parallel`` says; of the target this rank has the layers of ``stage``.
    """

    def __init__(
        self,
        config: EngineConfig,
        device: torch.device,
        parallel: TensorParallel | None = None,
        stage: PipelineStage | None = None,
    ) -> None:
        self._config = config
        self._device = device
        self._parallel = parallel or TensorParallel()
        self._stage = stage or PipelineStage()
        spec = config.speculation
        self.num_speculative_tokens = 0 if spec is None else spec.num_speculative_tokens
        """The most drafts that a step verifies for a request."""
        self._operations = self._make_operation_table()
        is_draft_whole = spec is None or spec.draft_tensor_parallel_size == 1
        self._draft_parallel = TensorParallel() if is_draft_whole else self._parallel

    def load_target_model(self, adapters: ModelAdapters | None = None) -> Model:
        """The model that is served, with its weights; ``adapters`` gets its layers."""
        stage, spec = self._stage, self._config.speculation
        if stage.size > 1 and stage.is_last and spec is not None:
            proposer_class = _load_plugin_class(self._config.plugin("spec_decode"), SpeculativeProposer)
            # One that reads the target's hidden states may take its embedding too.
            reads_target = issubclass(proposer_class, DeviceProposer) and proposer_class.observes_every_step
            stage = replace(stage, needs_embedding=reads_target)
        return self._load_model(self._config.model.path, "model", "quant", self._parallel, adapters, stage)

    def make_adapters(self) -> ModelAdapters | None:
        """What takes the layers that can have adapters; None where no request has any."""
        config = self._config.adapters
        if config is None:
            return None
        choice = self._config.plugin("adapter")
        method_class = _load_plugin_class(choice, AdapterMethod)
        limits = AdapterLimits(
            num_slots=config.max_loras,
            max_rank=config.max_lora_rank,
            max_num_tokens=self._max_padded_tokens,
            dtype=getattr(torch, self._config.model.dtype if config.dtype == "auto" else config.dtype),
            device=self._device,
        )
        method: AdapterMethod = construct_chosen(choice, method_class, limits)
        return ModelAdapters(method, config.target_modules)

    def load_proposer(self, target: Model) -> DeviceProposer | None:
        """The proposer that drafts on the device, with its weights; None where none does. It drafts on the last stage,
        behind the sampler."""
        spec = self._config.speculation
        if spec is None or not self._stage.is_last:
            return None
        choice = self._config.plugin("spec_decode")
        proposer_class = _load_plugin_class(choice, SpeculativeProposer)
        if not issubclass(proposer_class, DeviceProposer):
            return None
        proposer: DeviceProposer = construct_chosen(choice, proposer_class, spec.num_speculative_tokens)
        proposer.load_weights(self._make_draft_source(target, spec.draft_model_path))
        return proposer

    def make_attention_groups(
        self, layer_specs: Sequence[AttentionSpec], model_specs: Sequence[AttentionSpec] | None = None
    ) -> AttentionGroups:
        """Backends for layers with these specs, their workspaces allocated. Where they are one stage's, the groups are
        those of all layers of the model, which have ``model_specs``. Raises ``ConfigError`` where the chosen backend
        cannot serve one of them."""
        config = self._config
        choice = config.plugin("attention")
        backend_class = _load_plugin_class(choice, AttentionBackend)
        groups = group_layers(layer_specs, model_specs)
        for spec in groups.specs:
            if reasons := backend_class.unsupported(spec, self._device):
                raise ConfigError(
                    f"attention backend {choice.name!r} cannot run this model on {self._device.type}: "
                    f"{'; '.join(reasons)}; choose another with --attention-backend"
                )
        # A step that verifies drafts may reach this many tokens beyond the longest request: they are dropped later.
        num_drafts = self.num_speculative_tokens
        limits = AttentionLimits(
            max_num_reqs=config.scheduler.max_num_seqs,
            max_model_len=config.model.max_model_len + num_drafts,
            device=self._device,
            max_decode_query_len=1 + num_drafts,
        )
        backends = [construct_chosen(choice, backend_class, spec, self._device) for spec in groups.specs]
        for backend in backends:
            backend.allocate_workspaces(limits)
        return AttentionGroups(backends, groups.group_of)

    def make_sampler(self) -> Sampler:
        """The sampler of requests: in the place of a token it gives a fault (``row_faults``) where none can be
        sampled."""
        sampler = self.make_draft_sampler()
        if type(sampler) is not GumbelSampler:
            return CheckedSampler(sampler)
        sampler.marks_invalid_rows = True
        return sampler

    def make_draft_sampler(self) -> Sampler:
        """The sampler, for a proposer: it always gives tokens of the vocabulary."""
        choice = self._config.plugin("sampler")
        sampler_class = _load_plugin_class(choice, Sampler)
        sampler: Sampler = construct_chosen(choice, sampler_class, self._config.model.vocab_size, self._device)
        return sampler

    def make_vocab_sampler(self, model: Model, max_rows: int) -> VocabParallelSampler | None:
        """What samples from one rank's part of ``model``'s vocabulary, up to ``max_rows`` rows at once. None where the
        model is whole on a rank, or a sampler is chosen of which only whole logits are known to be right."""
        is_bundled = _load_plugin_class(self._config.plugin("sampler"), Sampler) is GumbelSampler
        if model.vocab_shard is None or not is_bundled:
            return None
        return VocabParallelSampler(model.vocab_shard, self._device, max_rows)

    def make_fallback_sampler(self) -> Sampler | None:
        """What takes over from the sampler if it fails: the bundled one. None if that is the sampler."""
        if _load_plugin_class(self._config.plugin("sampler"), Sampler) is GumbelSampler:
            return None
        fallback = GumbelSampler(self._config.model.vocab_size, self._device)
        fallback.marks_invalid_rows = True
        return fallback

    def make_logits_processors(self) -> list[tuple[str, LogitsProcessor]]:
        """Every chosen logits processor by name, in the order in which they are applied."""
        processors = []
        for choice in self._config.plugins_of("logits_processor"):
            processor_class = _load_plugin_class(choice, LogitsProcessor)
            processor = construct_chosen(choice, processor_class, self._config.model.vocab_size, self._device)
            processors.append((choice.name, processor))
        return processors

    def make_draft_runner(self, proposer: DeviceProposer, table: RequestTable, target_kv_cache: KVCache) -> DraftRunner:
        """What runs ``proposer``, attached to the target. Its own layers live under the block ids of the target's group
        of layers that keeps every token."""
        config = self._config
        full_groups = [g for g, group in enumerate(target_kv_cache.groups) if group.window is None]
        layer_specs = proposer.attention_specs()
        if layer_specs and not full_groups:
            raise ConfigError("every layer has a sliding window: no draft can share the cache; use --spec-method ngram")
        target_group = full_groups[0] if full_groups else 0
        attention = self.make_attention_groups(layer_specs)
        kv_cache = KVCache(attention.backends, attention.group_of, self._device)
        sampler = self.make_draft_sampler()
        sampler.prepare_graph_sampling(config.scheduler.max_num_seqs)
        proposer.attach_target(
            TargetState(
                sampler=sampler,
                table=table.sampling,
                num_computed_tokens=table.num_computed_tokens,
                block_table=table.block_tables[target_group],
                kv=kv_cache.layers,
                backends=attention.backends,
                group_of=attention.group_of,
                block_size=config.cache.block_size,
                max_model_len=config.model.max_model_len,
                max_num_reqs=config.scheduler.max_num_seqs,
            )
        )
        name = config.plugin("spec_decode").name
        return DraftRunner(name, proposer, table, config.model.vocab_size, kv_cache, target_group)

    def make_pipeline_runner(self, link: StageLink, model: Model, table: RequestTable) -> PipelineRunner:
        """What exchanges this stage's part of a step with the other stages."""
        config = self._config.model
        hidden_size = int(read_hf_config(Path(config.path)).get_text_config().hidden_size)
        runner = PipelineRunner(link, table, hidden_size, getattr(torch, config.dtype), self.num_speculative_tokens)
        runner.share_aux_hidden_states(model, self._max_padded_tokens)
        return runner

    def _make_operation_table(self) -> OperationTable:
        """What runs each operation of a forward pass. Raises ``ConfigError`` where a chosen plugin does not have it,
        or cannot run on this device."""
        plugins: dict[str, Operations] = {}
        made: dict[str, Operations] = {}
        chosen = {key.partition(":")[2]: c for key, c in self._config.plugins.items() if c.kind == "op"}
        for operation, choice in sorted(chosen.items(), key=lambda each: each[0] != "all"):  # a name has the last word
            plugin_class = _load_plugin_class(choice, Operations)
            if reasons := plugin_class.unsupported(self._device):
                raise ConfigError(
                    f"--op {operation}={choice.name}: it cannot run on {self._device.type}: {'; '.join(reasons)}; "
                    f"choose another, or leave the flag out"
                )
            if choice.target not in made:
                made[choice.target] = construct_chosen(choice, plugin_class, self._device)
            if operation != "all":
                check_operation_name(operation, plugin_class, choice.name)
            names = plugin_class.list_operations() if operation == "all" else [operation]
            plugins |= dict.fromkeys(names, made[choice.target])
        return OperationTable().replace_operations(plugins) if plugins else OperationTable()

    def _load_model(
        self,
        path: str,
        model_key: str,
        quant_key: str,
        parallel: TensorParallel,
        adapters: ModelAdapters | None = None,
        stage: PipelineStage = PipelineStage(),
    ) -> Model:
        model, cache = self._config.model, self._config.cache
        hf_config = read_hf_config(Path(path))
        dtype = getattr(torch, model.dtype)
        choice = self._config.plugin(model_key)
        return load_model(
            _load_plugin_class(choice, Model),
            hf_config,
            Path(path),
            dtype=dtype,
            device=self._device,
            kv_dtype=dtype if cache.dtype == "auto" else getattr(torch, cache.dtype),
            block_size=cache.block_size,
            quant=self._make_quantization_loader(quant_key, hf_config),
            load_format=model.load_format,
            seed=model.seed,
            parallel=parallel,
            progress=self._parallel.rank == 0 and self._stage.is_first,
            operations=self._operations,
            adapters=adapters,
            stage=stage,
            plugin_name=None if choice.is_bundled else f"model/{choice.name}",
        )

    def _make_draft_source(self, target: Model, draft_model_path: str | None) -> DraftSource:
        model = self._config.model
        dtype, block_size = getattr(torch, model.dtype), self._config.cache.block_size
        folder = None if draft_model_path is None else Path(draft_model_path)

        def make_builder(hf_config: Any) -> LayerBuilder:
            quant = self._make_quantization_loader("draft_quant", hf_config)
            return LayerBuilder(
                dtype,
                self._device,
                dtype,
                block_size,
                quant,
                self._draft_parallel,
                max_positions=model.max_model_len,
                operations=self._operations,
            )

        return DraftSource(
            path=folder,
            target=target,
            target_config=read_hf_config(Path(model.path)),
            make_builder=make_builder,
            load_model=partial(
                self._load_model, str(draft_model_path), "draft_model", "draft_quant", self._draft_parallel
            ),
            load_format=model.load_format,
            config=None if folder is None else read_hf_config(folder),
            max_num_tokens=self._max_padded_tokens,
        )

    @property
    def _max_padded_tokens(self) -> int:
        """A step of prompts runs with its tokens and the decodes beside it padded to a captured shape."""
        limits = self._config.scheduler
        return limits.max_num_batched_tokens + compute_max_captured_tokens(
            limits.max_num_seqs, self.num_speculative_tokens
        )

    def _make_quantization_loader(self, key: str, hf_config: Any) -> QuantizationLoader:
        choice = self._config.plugin(key)
        loader_class = _load_plugin_class(choice, QuantizationLoader)
        quant_config = getattr(hf_config, "quantization_config", None) or {}
        loader: QuantizationLoader = construct_chosen(choice, loader_class, quant_config)
        return loader


def _load_plugin_class(choice: PluginChoice, contract: type) -> Any:
    """The chosen class, checked to be one of ``contract``."""
    return load_target(choice.target, f"{contract.__module__}:{contract.__name__}")
