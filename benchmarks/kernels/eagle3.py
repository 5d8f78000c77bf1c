"""What an EAGLE-3 head of the published 8B shape costs: microseconds in CUDA graphs, beside the floor of its bytes.

``PYTHONPATH=src python benchmarks/kernels/eagle3.py [--profile] [--cpu]``
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch

from quire.core.contracts.attention import AttentionBatch, AttentionLimits
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

MODELS = Path(__file__).resolve().parents[1] / "models"
LENGTH, MOST, BLOCK, DRAFTS = 1000, 64, 16, 4


class Embedding(Model):
    """All that a head needs of its target."""

    supports_aux_hidden_states = True

    def __init__(self, config, builder) -> None:
        super().__init__()
        self.embed_tokens = builder.make_embedding("embed", config.vocab_size, config.hidden_size)

    attention_specs = forward = compute_logits = checkpoint_map = None  # type: ignore[assignment]


Embedding.__abstractmethods__ = frozenset()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--cpu", action="store_true", help="a small head, once, to see that this runs")
    args = parser.parse_args()
    device = torch.device("cpu" if args.cpu else "cuda")
    config, head = (read_hf_config(MODELS / name) for name in ("llama-3.1-8b", "llama-3.1-8b-eagle3"))
    if args.cpu:
        small = {"hidden_size": 128, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
        for some in (config, head):
            some.update(small | {"vocab_size": 512, "draft_vocab_size": 100, "head_dim": 32})
    with torch.inference_mode():
        proposer = build(config, head, device)
        table = proposer._target.table
        sizes = (1, 4, 16, 64)
        for n in sizes:
            rows = torch.arange(n, device=device)
            line = [f"{n:3} requests"]
            for queries in (1, 1 + DRAFTS):
                step = tokens(proposer, rows, queries)
                line.append(
                    f"observe {queries}: {time(lambda step=step: proposer.observe_step(step), args.cpu):7.1f} us"
                )
            for count in (1, DRAFTS):
                for greedy in (True, False):
                    work = lambda n=rows, c=count, g=greedy: proposer.propose(n, c, greedy=g)  # noqa: E731
                    line.append(f"{count} {'greedy' if greedy else 'random'}: {time(work, args.cpu):7.1f} us")
            print(", ".join(line), flush=True)
        print(f"floor: observe {floor(proposer, False):.1f} us, a draft {floor(proposer, True):.1f} us")
        if args.profile:
            profile(proposer, table)


def build(config, head, device: torch.device) -> Eagle3Proposer:
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    builder = LayerBuilder(dtype, device, dtype, BLOCK, Unquantized({}), max_positions=4096)
    proposer = Eagle3Proposer(DRAFTS)
    target = Embedding(config, builder)
    proposer.load_weights(
        DraftSource(Path("dummy"), target, config, lambda _: builder, lambda: target, "dummy", head, 1024)
    )
    table = RequestTable(MOST, 4096, BLOCK, 1, device, DRAFTS)
    backend_class = TorchSDPABackend
    if device.type == "cuda":
        from quire.plugins.attention.triton.backend import TritonBackend as backend_class  # type: ignore[assignment]
    (spec,) = proposer.attention_specs()
    backend = backend_class(spec, device)
    backend.allocate_workspaces(AttentionLimits(MOST, 4096, device, 1 + DRAFTS))
    kv, blocks = KVCache([backend], [0], device), -(-(LENGTH + 16) // BLOCK)
    sampler = GumbelSampler(config.vocab_size, device)
    sampler.prepare_graph_sampling(MOST * (1 + DRAFTS))
    columns = (table.sampling, table.num_computed_tokens, table.block_tables[0])
    proposer.attach_target(TargetState(sampler, *columns, kv.layers, [backend], [0], BLOCK, 4096, MOST))
    kv.allocate(1 + MOST * blocks)
    table.num_tokens[:MOST], table.num_computed_tokens[:MOST] = LENGTH, LENGTH - 1
    table.temperature[:MOST], table.top_p[:MOST] = 0.8, 1.0
    table.token_ids.random_(0, config.vocab_size)
    for row in range(MOST):
        table.block_tables[0][row, :blocks] = 1 + row * blocks + torch.arange(blocks)
    proposer._aux_hidden_states.states.normal_()
    return proposer


def tokens(proposer: Eagle3Proposer, rows: torch.Tensor, queries: int) -> StepTokens:
    """A step that ends at every request's last token but one."""
    n, table, target = len(rows), proposer._target.table, proposer._target
    at = LENGTH - 1 - queries + torch.arange(queries, device=rows.device).repeat(n)
    owner = rows.repeat_interleave(queries)
    slots = target.block_table[owner, at // BLOCK].long() * BLOCK + at % BLOCK
    start = queries * torch.arange(n + 1, dtype=torch.int32, device=rows.device)
    lens = torch.full((n,), LENGTH - 1, dtype=torch.int32, device=rows.device)
    batch = AttentionBatch(start, lens, target.block_table[:n], n, n * queries, queries, 4096, n, queries)
    return StepTokens(table.token_ids[owner, at], at, slots, rows, batch)


def time(work: Callable[[], object], once: bool, repeats: int = 30) -> float:
    work()
    if once:
        return 0.0
    work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(4):
            work()
    took = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        took.append(start.elapsed_time(end) * 1e3 / 4)
    return statistics.median(took)


def floor(proposer: Eagle3Proposer, draft: bool) -> float:
    """Microseconds that the weights take at 4.29 TB/s."""
    head = proposer._head
    parts = [head.q_proj, head.kv_proj, head.o_proj, head.mlp, head.lm_head] if draft else [head.fc, head.kv_proj]
    return sum(p.nbytes for part in parts for p in part.parameters()) / 4.29e6


def profile(proposer: Eagle3Proposer, table: SimpleNamespace) -> None:
    """Kernels of a greedy and of a random draft, and of reading one token."""
    rows = torch.zeros(1, dtype=torch.int64, device="cuda")
    step = tokens(proposer, rows, 5)
    for name, work in {
        "greedy": lambda: proposer.propose(rows, 1, greedy=True),
        "random": lambda: proposer.propose(rows, 1),
        "observe": lambda: proposer.observe_step(step),
    }.items():
        work()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
            for _ in range(10):
                work()
            torch.cuda.synchronize()
        print(name, file=sys.stdout)
        for event in sorted(seen.key_averages(), key=lambda e: -e.self_device_time_total)[:24]:
            print(f"  {event.self_device_time_total / 10:7.1f} us {event.count / 10:4.1f} x {event.key[:90]}")


if __name__ == "__main__":
    main()
