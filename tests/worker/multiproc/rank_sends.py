"""A worker that sends parts of sums as GPUs do, through memory that the ranks of a host share: imported by ranks."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch import Tensor

from quire.core.layers.parallel import SentPartialSum, TensorParallel
from quire.core.ops.all_reduce import AllReduceKernels
from quire.core.ops.device_profile import AllReduceLimits
from quire.core.ops.kernels import all_reduce_launch
from quire.core.ops.kernels.all_reduce_launch import SymmetricLayout
from quire.core.worker.multiproc.executor import MultiprocExecutor
from quire.core.worker.worker import Worker

MAX_BYTES = 1 << 16
FLAG_BYTES = 4


class SendingWorker(Worker):
    """``set_fault`` makes a step fail after its first part was sent, or before that on the second rank."""

    def __init__(self, config, parallel=None, link=None):
        self.kernels = open_kernels(parallel)
        object.__setattr__(parallel, "kernels", self.kernels)  # of the rank's process, which has it already
        super().__init__(config, parallel, link)
        self.fault = ""
        self.control.add_method("set_fault", self.set_fault)
        self.control.add_method("count_sent", self.count_sent)
        self.patch_sums(parallel)

    def set_fault(self, fault: str) -> None:
        self.fault = fault

    def count_sent(self) -> int:
        return self.kernels.num_sent

    def patch_sums(self, parallel):
        send, reduce_add_norm = TensorParallel.multiply_and_send, SentPartialSum.reduce_add_norm

        def multiply_and_send(itself, x, *arguments):
            if self.fault == "differ" and parallel.rank == 1 and len(x) >= parallel.size**2:
                raise ValueError("forced before a part was sent")
            return send(itself, x, *arguments)

        def raise_or_reduce(*arguments):
            if self.fault:
                raise ValueError("forced after a part was sent")
            return reduce_add_norm(*arguments)

        TensorParallel.multiply_and_send, SentPartialSum.reduce_add_norm = multiply_and_send, raise_or_reduce


class SendingExecutor(MultiprocExecutor):
    """Its workers send parts."""

    worker_target = "rank_sends:SendingWorker"


def open_kernels(parallel):
    """Those of a GPU, with copies that are made at once."""
    stream = SimpleNamespace(wait_stream=lambda other: None)
    torch.cuda.Stream, torch.cuda.current_stream = lambda device: stream, lambda: stream
    torch.cuda.is_current_stream_capturing = lambda: False
    layout = SymmetricLayout(parallel.size, max_row_bytes=256, max_bytes=4096, max_sent_bytes=MAX_BYTES)
    path = [tempfile.mkdtemp() if parallel.rank == 0 else None]
    dist.broadcast_object_list(path)
    files = [str(Path(path[0]) / str(rank)) for rank in range(parallel.size)]
    memory = [torch.from_file(file, shared=True, size=layout.total_bytes, dtype=torch.uint8) for file in files]
    all_reduce_launch.launch_sum_sent = sum_sent_parts(memory, parallel)
    limits = AllReduceLimits(0, 0, 0, 0, min_sent_bytes=0, max_sent_bytes=MAX_BYTES)
    buffers = torch.tensor([each.data_ptr() for each in memory])
    return AllReduceKernels(parallel.rank, buffers, layout, limits, memory)


def sum_sent_parts(memory, parallel):
    """The kernel that sums what was sent, with the exchange of the sums by gloo."""

    def launch(own: Tensor, rows, residual, weight, eps, call, buffers, epochs, layout, rank):
        mine, total = memory[rank], own.float()
        for source in range(layout.ranks):
            if source == rank:
                continue
            flag = FLAG_BYTES * (layout.sent_flags + source)
            while mine[flag : flag + FLAG_BYTES].view(torch.int32).item() != call:
                time.sleep(0.001)
            start = layout.find_part(source, rank)
            total += mine[start : start + own.nbytes].view(own.dtype).view(own.shape).float()
        share = -(-rows // layout.ranks)
        summed = torch.zeros(share * layout.ranks, own.shape[1])
        summed[rank * share : rank * share + len(own)] = total
        dist.all_reduce(summed, group=parallel.group)
        stream = summed[:rows] if residual is None else summed[:rows] + residual.float()
        norm = stream * torch.rsqrt(stream.square().mean(-1, keepdim=True) + eps)
        return (norm if weight is None else norm * weight.float()).to(own.dtype), stream.to(own.dtype)

    return launch
