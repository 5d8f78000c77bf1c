"""Capturing CUDA graphs."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

__all__ = ["CapturedGraph", "GraphCapturer"]

_T = TypeVar("_T")


@dataclass(slots=True)
class CapturedGraph(Generic[_T]):
    """A graph, and what the captured function returned: buffers that every replay writes again."""

    graph: torch.cuda.CUDAGraph
    output: _T


class GraphCapturer:
    """Captures graphs that never run at the same time, so that they share memory.

    They share the stream on which they are captured, too, since cuBLAS keeps a workspace for each stream that it sees.
    """

    def __init__(self) -> None:
        # One pool for all: a graph may use what another used between its first and its last launch. What a graph
        # returns stays its own as long as a reference to it lives. So the largest is captured first, and the others
        # add no more to the pool than what they return.
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()

    def capture_graph(self, launch: Callable[[], _T]) -> CapturedGraph[_T]:
        """Capture what ``launch`` queues on the current stream; nothing of it runs."""
        torch.cuda.synchronize()  # work queued before must not become a dependency of the graph
        graph = torch.cuda.CUDAGraph()
        self._stream.wait_stream(torch.cuda.current_stream())
        # Graphs of an engine that has ended are destroyed with the garbage, which would end the capture.
        collects_garbage = gc.isenabled()
        gc.disable()
        try:
            with torch.cuda.stream(self._stream):
                # ``thread_local``: what other threads do (a collective library's watchdog, say) does not end it either.
                graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                output = launch()
                graph.capture_end()
        finally:
            if collects_garbage:
                gc.enable()
        torch.cuda.current_stream().wait_stream(self._stream)
        return CapturedGraph(graph, output)
