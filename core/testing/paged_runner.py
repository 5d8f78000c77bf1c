"""The smallest thing that can run a model: one paged cache, shuffled block tables, chunks of any size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from quire.core.contracts.attention import AttentionBackend, AttentionBatch, AttentionLimits, LayerKV
from quire.core.contracts.model import ForwardContext, Model
from quire.core.plugin.manager import PluginManager

__all__ = ["PagedRunner"]


class PagedRunner:
    """Runs several sequences through ``model``, each step any number of tokens of each. What no sequence has written
    is NaN."""

    def __init__(
        self,
        model: Model,
        num_seqs: int,
        max_len: int = 256,
        backend: type[AttentionBackend] | None = None,
        seed: int = 0,
    ) -> None:
        backend_class: Any = backend or PluginManager().load_class("attention", "torch_sdpa")
        self.model = model
        specs = model.attention_specs()
        groups = list(dict.fromkeys(specs))
        self.device = next(model.parameters()).device
        self.size = specs[0].block_size
        self.backends: list[AttentionBackend] = [backend_class(spec, self.device) for spec in groups]
        for attention_backend in self.backends:
            attention_backend.allocate_workspaces(AttentionLimits(num_seqs, max_len, self.device))
        self.group_of = [groups.index(spec) for spec in specs]
        width = -(-max_len // self.size)
        generator = torch.Generator().manual_seed(seed)
        order = [torch.randperm(num_seqs * width, generator=generator) + 1 for _ in groups]
        self.tables = [ids.view(num_seqs, width).int().to(self.device) for ids in order]
        self.kv: list[LayerKV] = []
        for g in self.group_of:
            layout = self.backends[g].kv_layout()
            raw = torch.full((num_seqs * width + 1, layout.bytes_per_block), 0xFF, dtype=torch.uint8)  # NaN everywhere
            self.kv.append(layout.view(raw.to(self.device)))
        self.computed = [0] * num_seqs

    @torch.inference_mode()
    def step(self, chunks: dict[int, Sequence[int]]) -> dict[int, Tensor]:
        """Tokens by sequence -> (len(tokens), vocab) logits by sequence. Single tokens count as decodes."""
        order = sorted(chunks, key=lambda i: len(chunks[i]) > 1)
        lens = [len(chunks[i]) for i in order]
        positions = torch.cat(
            [torch.arange(self.computed[i], self.computed[i] + n) for i, n in zip(order, lens, strict=True)]
        )
        positions = positions.to(self.device)
        owner = torch.repeat_interleave(torch.tensor(order), torch.tensor(lens)).to(self.device)
        ids = torch.tensor([t for i in order for t in chunks[i]], dtype=torch.int32, device=self.device)
        slots = []
        for backend, table in zip(self.backends, self.tables, strict=True):
            slots.append(table[owner, positions // self.size].long() * self.size + positions % self.size)
            batch = AttentionBatch(
                query_start_loc=torch.tensor([0, *torch.tensor(lens).cumsum(0)], dtype=torch.int32).to(self.device),
                seq_lens=torch.tensor(
                    [self.computed[i] + n for i, n in zip(order, lens, strict=True)], dtype=torch.int32
                ).to(self.device),
                block_table=table[torch.tensor(order, device=self.device)],
                num_reqs=len(order),
                num_tokens=len(ids),
                max_query_len=max(lens),
                max_seq_len=max(self.computed[i] + n for i, n in zip(order, lens, strict=True)),
                num_decodes=sum(n == 1 for n in lens),
            )
            backend.prepare_metadata(batch)
        context = ForwardContext(self.backends, slots, self.kv, self.group_of)
        logits = self.model.compute_logits(self.model(ids, positions, context))
        for i, n in zip(order, lens, strict=True):
            self.computed[i] += n
        return dict(zip(order, logits.split(lens), strict=True))
