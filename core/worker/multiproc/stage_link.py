"""Stages that are processes: point-to-point messages of ``torch.distributed``, NCCL's on GPUs and gloo's on a CPU."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from quire.core.layers.stage import PipelineStage
from quire.core.worker.multiproc.rank_layout import RankLayout
from quire.core.worker.pipeline import StageLink

__all__ = ["ProcessStageLink"]


class ProcessStageLink(StageLink):
    """Hidden states and tokens go through two process groups, each with a communicator of its own. In one, whose
    messages are sent in order, a stage that sends hidden states to the next would wait for that one to receive them,
    and that one for its own tokens to be received."""

    def __init__(
        self,
        layout: RankLayout,
        rank: int,
        forward_group: Any,
        backward_group: Any,
        store: Any,
        notes: AbstractContextManager[None],
    ) -> None:
        """The groups are of the ranks of this number on all stages; ``notes`` is entered where the host may wait."""
        super().__init__(PipelineStage(layout.get_stage(rank), layout.pipeline_parallel_size))
        self._chain = layout.list_chain(layout.get_tensor_rank(rank))
        self._tensor_rank = layout.get_tensor_rank(rank)
        self._forward_group, self._backward_group = forward_group, backward_group
        self._store = store
        self._notes = notes
        self._num_exchanges = 0
        # What is on its way: a message that is dropped before it has arrived would not arrive.
        self._sending: deque[tuple[list[Any], Tensor]] = deque()
        self._max_sending = 2 * layout.pipeline_parallel_size * layout.pipeline_parallel_size

    def send_hidden_states(self, hidden: Tensor) -> None:
        """Asynchronously."""
        self._send(hidden, [self._chain[self.stage.index + 1]], self._forward_group)

    def receive_hidden_states(self, buffer: Tensor) -> None:
        """On a CPU it waits."""
        self._receive(buffer, self._chain[self.stage.index - 1], self._forward_group)

    def return_tokens(self, packed: Tensor) -> None:
        """Asynchronously."""
        self._send(packed, self._chain[:-1], self._backward_group)

    def receive_tokens(self, buffer: Tensor) -> None:
        """On a CPU it waits."""
        self._receive(buffer, self._chain[-1], self._backward_group)

    def exchange_bytes(self, data: bytes) -> list[bytes]:
        """By the store in which the ranks found each other."""
        self._num_exchanges += 1
        keys = [f"stages/{self._num_exchanges}/{self._tensor_rank}/{stage}" for stage in range(self.stage.size)]
        self._store.set(keys[self.stage.index], data)
        return [self._store.get(key) for key in keys]

    def _send(self, tensor: Tensor, ranks: Sequence[int], group: Any) -> None:
        sends = dist.batch_isend_irecv([dist.P2POp(dist.isend, tensor, rank, group) for rank in ranks])
        self._sending.append((sends, tensor))
        while len(self._sending) > self._max_sending:  # it has arrived long ago
            for send in self._sending.popleft()[0]:
                send.wait()

    def _receive(self, buffer: Tensor, rank: int, group: Any) -> None:
        # A batch of one: NCCL, whose connections are made at the start, warns of messages outside of batches.
        for receive in dist.batch_isend_irecv([dist.P2POp(dist.irecv, buffer, rank, group)]):
            with self._notes:
                receive.wait()  # on a GPU its stream does

    def connect(self, device: torch.device | None) -> None:
        """Send a first message of each kind: it makes the connections, for which NCCL keeps the host waiting. Every
        stage calls it."""
        message = torch.zeros(1, device=device)
        if not self.stage.is_first:
            self.receive_hidden_states(message)
        if self.stage.is_last:
            self.return_tokens(message)
        else:
            self.send_hidden_states(message)
            self.receive_tokens(torch.zeros(1, device=device))
