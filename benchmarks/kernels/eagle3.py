"""What an EAGLE-3 head of the published 8B shape costs: microseconds in CUDA graphs, beside the bound of its bytes.

``PYTHONPATH=src python benchmarks/kernels/eagle3.py [--profile] [--cpu]``
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from quire.core.contracts.attention import AttentionBackend, AttentionBatch, AttentionLimits
from quire.core.contracts.model import Model
from quire.core.contracts.spec_decode import DraftSource, StepTokens, TargetState
from quire.core.layers.builder import LayerBuilder
from quire.core.loading.hf_config import read_hf_config
from quire.core.sample.sampler import GumbelSampler
from quire.core.worker.kv_cache import KVCache
from quire.core.worker.request_table import RequestTable
from quire.plugins.attention.torch_sdpa import TorchSDPABackend
from quire.plugins.quant.none import Unquantized
from quire.plugins.spec_decode.eagle3 import Eagle3Proposer
from quire.server.plugin_bench.timer import time_graph

MODELS = Path(__file__).resolve().parents[1] / "models"
SEQ_LEN, MAX_NUM_REQS, BLOCK_SIZE, NUM_DRAFTS = 1000, 64, 16, 4
READ_BANDWIDTH = 4.29e12
"""Bytes a second, H200."""


class EmbeddingOnlyTarget(Model):
    """All that a head needs of its target."""

    supports_aux_hidden_states = True

    def __init__(self, config, builder) -> None:
        super().__init__()
        self.embed_tokens = builder.make_embedding("embed", config.vocab_size, config.hidden_size)

    attention_specs = forward = compute_logits = checkpoint_map = None  # type: ignore[assignment]


EmbeddingOnlyTarget.__abstractmethods__ = frozenset()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--cpu", action="store_true", help="a small head, once, to see that this runs")
    args = parser.parse_args()
    device = torch.device("cpu" if args.cpu else "cuda")
    config, head = (read_hf_config(MODELS / name) for name in ("llama-3.1-8b", "llama-3.1-8b-eagle3"))
    if args.cpu:
        small = {"hidden_size": 128, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
        small |= {"vocab_size": 512, "draft_vocab_size": 100, "head_dim": 32}
        for hf_config in (config, head):
            for name, value in small.items():
                setattr(hf_config, name, value)
    with torch.inference_mode():
        proposer, target = make_proposer(config, head, device)
        for num_reqs in (1, 4, 16, 64):
            rows = torch.arange(num_reqs, device=device)
            columns = [f"{num_reqs:3} requests"]
            for query_len in (1, 1 + NUM_DRAFTS):
                observe_step = partial(proposer.observe_step, make_step(target, rows, query_len))
                columns.append(f"observe {query_len}: {time_launch(observe_step, args.cpu):7.1f} us")
            for num_tokens in (1, NUM_DRAFTS):
                for greedy in (True, False):
                    propose = partial(proposer.propose, rows, num_tokens, greedy=greedy)
                    columns.append(
                        f"{num_tokens} {'greedy' if greedy else 'random'}: {time_launch(propose, args.cpu):7.1f} us"
                    )
            print(", ".join(columns), flush=True)
        observe_us, draft_us = compute_bounds(proposer)
        print(f"bound: observe {observe_us:.1f} us, a draft {draft_us:.1f} us")
        if args.profile:
            print_kernels(proposer, target)


def make_proposer(config, head, device: torch.device) -> tuple[Eagle3Proposer, TargetState]:
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    builder = LayerBuilder(dtype, device, dtype, BLOCK_SIZE, Unquantized({}), max_positions=4096)
    proposer = Eagle3Proposer(NUM_DRAFTS)
    model = EmbeddingOnlyTarget(config, builder)
    proposer.load_weights(
        DraftSource(Path("dummy"), model, config, lambda _: builder, lambda: model, "dummy", head, 1024)
    )
    table = RequestTable(MAX_NUM_REQS, 4096, BLOCK_SIZE, 1, device, NUM_DRAFTS)
    backend_class: type[AttentionBackend] = TorchSDPABackend
    if device.type == "cuda":
        from quire.plugins.attention.triton.backend import TritonBackend

        backend_class = TritonBackend
    (spec,) = proposer.attention_specs()
    backend = backend_class(spec, device)
    backend.allocate_workspaces(AttentionLimits(MAX_NUM_REQS, 4096, device, 1 + NUM_DRAFTS))
    kv_cache, blocks_per_request = KVCache([backend], [0], device), -(-(SEQ_LEN + 16) // BLOCK_SIZE)
    sampler = GumbelSampler(config.vocab_size, device)
    sampler.prepare_graph_sampling(MAX_NUM_REQS * (1 + NUM_DRAFTS))
    target = TargetState(
        sampler,
        table.sampling,
        table.num_computed_tokens,
        table.block_tables[0],
        kv_cache.layers,
        [backend],
        [0],
        BLOCK_SIZE,
        4096,
        MAX_NUM_REQS,
    )
    proposer.attach_target(target)
    kv_cache.allocate(1 + MAX_NUM_REQS * blocks_per_request)
    table.num_tokens[:MAX_NUM_REQS], table.num_computed_tokens[:MAX_NUM_REQS] = SEQ_LEN, SEQ_LEN - 1
    table.temperature[:MAX_NUM_REQS], table.top_p[:MAX_NUM_REQS] = 0.8, 1.0
    table.token_ids.random_(0, config.vocab_size)
    for row in range(MAX_NUM_REQS):
        blocks = 1 + row * blocks_per_request + torch.arange(blocks_per_request)
        table.block_tables[0][row, :blocks_per_request] = blocks
    assert model.aux_hidden_states is not None
    model.aux_hidden_states.states.normal_()
    return proposer, target


def make_step(target: TargetState, rows: torch.Tensor, query_len: int) -> StepTokens:
    """A step that ends at every request's last token but one."""
    n = len(rows)
    positions = SEQ_LEN - 1 - query_len + torch.arange(query_len, device=rows.device).repeat(n)
    token_rows = rows.repeat_interleave(query_len)
    blocks = target.block_table[token_rows, positions // BLOCK_SIZE].long()
    slot_mapping = blocks * BLOCK_SIZE + positions % BLOCK_SIZE
    query_start_loc = query_len * torch.arange(n + 1, dtype=torch.int32, device=rows.device)
    seq_lens = torch.full((n,), SEQ_LEN - 1, dtype=torch.int32, device=rows.device)
    batch = AttentionBatch(
        query_start_loc, seq_lens, target.block_table[:n], n, n * query_len, query_len, 4096, n, query_len
    )
    return StepTokens(target.table.token_ids[token_rows, positions], positions, slot_mapping, rows, batch)


def time_launch(launch: Callable[[], object], once: bool, repeats: int = 30) -> float:
    """Median microseconds in a CUDA graph of four launches; 0 with ``once``, which only launches."""
    launch()
    if once:
        return 0.0

    def launch_four() -> None:
        for _ in range(4):
            launch()

    return 1e6 * time_graph(launch_four, 4, repeats, num_warmups=0)


def compute_bounds(proposer: Eagle3Proposer) -> tuple[float, float]:
    """Microseconds that reading the weights takes: (in ``observe_step``, for a draft)."""
    head = proposer.head
    observed, drafting = [head.fc, head.kv_proj], [head.q_proj, head.kv_proj, head.o_proj, head.mlp, head.lm_head]
    observe_us, draft_us = (
        sum(p.nbytes for layer in layers for p in layer.parameters()) / READ_BANDWIDTH * 1e6
        for layers in (observed, drafting)
    )
    return observe_us, draft_us


def print_kernels(proposer: Eagle3Proposer, target: TargetState) -> None:
    """Kernels of a greedy and of a random draft, and of observing five tokens."""
    rows = torch.zeros(1, dtype=torch.int64, device="cuda")
    launches: dict[str, Callable[[], object]] = {
        "greedy": partial(proposer.propose, rows, 1, greedy=True),
        "random": partial(proposer.propose, rows, 1),
        "observe": partial(proposer.observe_step, make_step(target, rows, 5)),
    }
    for name, launch in launches.items():
        launch()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            for _ in range(10):
                launch()
            torch.cuda.synchronize()
        print(name)
        for event in sorted(profile.key_averages(), key=lambda e: -e.self_device_time_total)[:24]:
            print(f"  {event.self_device_time_total / 10:7.1f} us {event.count / 10:4.1f} x {event.key[:90]}")


if __name__ == "__main__":
    main()
