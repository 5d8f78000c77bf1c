"""Plugins that misbehave, for ``test_hostile.py``: a server has to outlive them, or to refuse them by name.

Those that are called in a step misbehave for one request alone, a prompt of ``TRIGGER`` tokens, where their contract
tells them of it.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading
import time
from typing import Any

import numpy as np
import torch

from quire.core.ops.implementations import TorchOperations
from quire.core.sample.sampler import GumbelSampler
from quire.core.worker.uniproc_executor import UniprocExecutor
from quire.plugins.attention.torch_sdpa import TorchSDPABackend
from quire.plugins.kv.paged import PagedAllocator
from quire.plugins.quant.none import Unquantized
from quire.plugins.sched.fcfs import FCFSPolicy
from quire.sdk import HostProposer, LogitsBatch, LogitsProcessor, MetricsExporter, NewRequest, Sampler

TRIGGER = 33
kept: list[Any] = []


class UnreadableError(Exception):
    def __str__(self) -> str:
        raise RuntimeError("the secret is 4711")


class Attention(TorchSDPABackend):
    def run(self, layer: int, q: Any, kv: Any, out: Any, **options: Any) -> None:
        super().run(layer, q, kv, out, **options)
        if len(q) == TRIGGER:
            self.misbehave(out)

    def misbehave(self, out: Any) -> None:
        raise NotImplementedError


class AttentionRaises(Attention):
    def misbehave(self, out: Any) -> None:
        raise RuntimeError("the secret is 4711")


class AttentionExits(Attention):
    def misbehave(self, out: Any) -> None:
        sys.exit(3)


class AttentionOfAnotherShape(Attention):
    def misbehave(self, out: Any) -> None:
        out.copy_(torch.zeros(3, 5))


class AttentionOfNaN(Attention):
    def misbehave(self, out: Any) -> None:
        out.fill_(float("nan"))


class AttentionChangesSettings(Attention):
    """Right, but for what it leaves behind in the process."""

    def misbehave(self, out: Any) -> None:
        torch.set_default_dtype(torch.float64)
        torch.set_grad_enabled(True)
        os.write(2, b"noise " * 2_000)


class AttentionStartsThreads(Attention):
    def misbehave(self, out: Any) -> None:
        kept.extend(threading.Thread(target=time.sleep, args=(1,), daemon=True) for _ in range(50))
        for thread in kept[-50:]:
            thread.start()


class AttentionKeepsTensors(Attention):
    def misbehave(self, out: Any) -> None:
        kept.append(out)


class AttentionRaisesAnUnreadableError(Attention):
    def misbehave(self, out: Any) -> None:
        raise UnreadableError


class OperationOfNothing(TorchOperations):
    def silu_and_mul(self, gate_up: Any, output_format: Any) -> Any:
        return None if len(gate_up) == TRIGGER else super().silu_and_mul(gate_up, output_format)


class OperationOfAnotherShape(TorchOperations):
    def silu_and_mul(self, gate_up: Any, output_format: Any) -> Any:
        result: Any = super().silu_and_mul(gate_up, output_format)
        return result[:, 1:] if len(gate_up) == TRIGGER else result


class Processor(LogitsProcessor):
    def add_row(self, request: NewRequest) -> Any:
        return len(request.token_ids) >= TRIGGER

    def remove_row(self, row: int) -> None: ...

    def apply(self, logits: Any, batch: LogitsBatch) -> None:
        raise RuntimeError("the secret is 4711")


class ProcessorOfTheWrongType(Processor):
    def add_row(self, request: NewRequest) -> Any:
        return "yes" if super().add_row(request) else False


class ProcessorIsCancelled(Processor):
    def apply(self, logits: Any, batch: LogitsBatch) -> None:
        raise asyncio.CancelledError


class ProcessorOfNaN(Processor):
    def apply(self, logits: Any, batch: LogitsBatch) -> None:
        logits.fill_(float("nan"))


class SamplerRaises(Sampler):
    def sample(self, logits: Any, batch: Any) -> Any:
        raise RuntimeError("the secret is 4711")


class SamplerOfTheWrongType(Sampler):
    def sample(self, logits: Any, batch: Any) -> Any:
        logits.fill_(0)
        batch.temperature.fill_(9.0)  # its inputs, in place
        return ["token"] * len(logits)


class SamplerOnAnotherDevice(GumbelSampler):
    def sample(self, logits: Any, batch: Any) -> Any:
        return super().sample(logits, batch).to("meta")


class PolicyRaises(FCFSPolicy):
    def schedule(self, view: Any) -> Any:
        raise RuntimeError("the secret is 4711")


class PolicyExits(FCFSPolicy):
    def admission_key(self, request: Any) -> Any:
        sys.exit(3)


class PolicyIsCancelled(FCFSPolicy):
    def schedule(self, view: Any) -> Any:
        raise asyncio.CancelledError


class PolicyRaisesAnUnreadableError(FCFSPolicy):
    def request_finished(self, request: Any, usage: Any) -> None:
        raise UnreadableError


class PolicyOfBools(FCFSPolicy):
    def admission_key(self, request: Any) -> Any:
        return (np.bool_(request.prompt_len >= TRIGGER), request.arrival_ns)


class PolicyOfTheWrongType(FCFSPolicy):
    def schedule(self, view: Any) -> Any:
        return [object()]


class PolicyIsSlow(FCFSPolicy):
    """Ten times as slow as it may be."""

    def schedule(self, view: Any) -> Any:
        time.sleep(0.5)
        return super().schedule(view)


class PolicyHangs(FCFSPolicy):
    def schedule(self, view: Any) -> Any:
        while True:
            time.sleep(0.01)


class AllocatorOfDuplicates(PagedAllocator):
    def allocate(self, request: Any, *args: Any, **options: Any) -> Any:
        allocation = super().allocate(request, *args, **options)
        if allocation is not None and request.num_tokens >= TRIGGER:
            for blocks in allocation.new_blocks:
                blocks[:] = [1] * len(blocks)
        return allocation


class AllocatorRaises(PagedAllocator):
    def cache_full_blocks(self, request: Any, num_tokens: int) -> None:
        raise RuntimeError("the secret is 4711")


class AllocatorRefuses(PagedAllocator):
    """All requests would wait for one that has nothing to wait for."""

    def allocate(self, request: Any, *args: Any, **options: Any) -> Any:
        return None if request.num_tokens >= TRIGGER else super().allocate(request, *args, **options)


class AllocatorOfTheWrongType(PagedAllocator):
    def num_free_blocks(self) -> Any:
        return "many"


class ProposerRaisesAnUnreadableError(HostProposer):
    def propose(self, *args: Any, **options: Any) -> Any:
        raise UnreadableError


class ProposerOfTheWrongType(HostProposer):
    def propose(self, *args: Any, **options: Any) -> Any:
        return "drafts"


class ExporterRaises(MetricsExporter):
    def record_engine(self, stats: Any) -> None: ...

    def record_request(self, stats: Any) -> None:
        raise RuntimeError("the secret is 4711")

    def record_tokens(self, num_prompt: int, num_generated: int, ttft_s: float | None, itl_s: list[float]) -> None: ...


class EndsAtStart:
    def __init__(self, *_: Any, **__: Any) -> None:
        sys.exit(8)


class AllocatorEndsAtStart(EndsAtStart, PagedAllocator): ...


class AttentionEndsAtStart(EndsAtStart, TorchSDPABackend): ...


class ExecutorEndsAtStart(EndsAtStart, UniprocExecutor): ...


class LoaderEndsAtStart(EndsAtStart, Unquantized): ...


class OperationEndsAtStart(EndsAtStart, TorchOperations): ...


class ProcessorEndsAtStart(EndsAtStart, ProcessorOfNaN): ...


class ProposerEndsAtStart(EndsAtStart, ProposerOfTheWrongType): ...


class SamplerEndsAtStart(EndsAtStart, GumbelSampler): ...


class AttentionEndsTheProcess(Attention):
    def misbehave(self, out: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)
