"""Recording CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

__all__ = ["GraphCapturer"]

_T = TypeVar("_T")


class GraphCapturer:
    """Graphs that never run at the same time: they share memory, and the stream on which they are captured (cuBLAS
    keeps a workspace for each stream that it sees)."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()

    def capture_graph(self, launch: Callable[[], _T]) -> tuple[torch.cuda.CUDAGraph, _T]:
        """Capture what ``work`` launches; the graph, and what ``work`` returned."""
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            made = launch()
            graph.capture_end()
        torch.cuda.current_stream().wait_stream(self._stream)
        return graph, made
