"""One stage of a pipeline: hidden states come from the stage before and go to the next, sampled tokens come back.

Each stage runs the same steps in the same order, over its own layers. The first one embeds the tokens of a step, the
last one samples, and drafts. What that appends to its request table it sends to the stages before it, on the device:
they need it before the next step of those requests, and the host has no part in it.

A step that fails on a stage is passed on all the same, with zeros: stages wait for each other's messages, and each step
has one of every kind. The requests of such a step end, whatever other stages make of the zeros.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quire.core.contracts.attention import AttentionSpec
from quire.core.contracts.model import AuxHiddenStates, Model
from quire.core.layers.adapters import ModelAdapters
from quire.core.layers.stage import PipelineStage
from quire.core.messages import SchedulerOutput
from quire.core.ops.pinned import copy_to_device
from quire.core.worker.request_table import RequestTable

__all__ = ["PipelineRunner", "StageLink", "share_attention_specs", "share_module_shapes"]

_NUM_COUNTS = 3
"""Columns of a returned row before its tokens: tokens, computed tokens, drafts."""


class StageLink(ABC):
    """What connects a rank to the ranks of its number on the other stages. Messages of a kind arrive in the order in
    which they were sent; sending waits for no one."""

    def __init__(self, stage: PipelineStage) -> None:
        self.stage = stage

    @abstractmethod
    def send_hidden_states(self, hidden: Tensor) -> None:
        """To the next stage; ``hidden`` is not written to any more."""

    @abstractmethod
    def receive_hidden_states(self, buffer: Tensor) -> None:
        """From the stage before, into ``buffer``. On a GPU its stream waits, and not the host."""

    @abstractmethod
    def return_tokens(self, packed: Tensor) -> None:
        """From the last stage to every other; ``packed`` is not written to any more."""

    @abstractmethod
    def receive_tokens(self, buffer: Tensor) -> None:
        """What the last stage returned next, into ``buffer``. On a GPU its stream waits, and not the host."""

    @abstractmethod
    def exchange_bytes(self, data: bytes) -> list[bytes]:
        """What each stage gives, by stage. Every stage calls it, before the first step."""


class _SampledStep(NamedTuple):
    """A step whose tokens the last stage returns."""

    number: int
    rows: NDArray[np.int32]


class PipelineRunner:
    """Does for each step what its stage has to exchange: ``begin_step``, ``receive_hidden_states``,
    ``send_hidden_states``, ``return_tokens``, in this order; or ``finish_failed_step`` from wherever it stopped.
    Before ``connect`` steps are those of a warm-up, in which each stage is alone.

    Every exchange is queued between the kernels of a step, never in a CUDA graph: a graph reads what was received from
    a buffer of its own (``make_input_buffer``), and what it wrote is copied before it is sent, so that the next replay
    may begin while the message is on its way. A stage receives tokens when it needs them and not before: a receiving
    kernel would wait beside those of other steps, and take a multiprocessor from them.
    """

    def __init__(
        self, link: StageLink, table: RequestTable, hidden_size: int, dtype: torch.dtype, max_draft_tokens: int
    ) -> None:
        self.stage = link.stage
        self._link = link
        self._table = table
        self._hidden_size, self._dtype = hidden_size, dtype
        # A step appends one token and the drafts that it accepts; behind those lie the drafts of the next.
        device = table.device
        self._window = torch.arange(-1 - max_draft_tokens, max_draft_tokens, device=device)
        self._aux: AuxHiddenStates | None = None
        self._aux_columns: list[int] = []  # of ``_aux``, that the stages before have filled
        self._received_aux: Tensor | None = None  # (num_tokens, len(_aux_columns) * hidden)
        self._is_connected = False
        self._num_steps = 0
        self._sampled: deque[_SampledStep] = deque()  # whose tokens are not placed yet
        self._sampled_in = np.zeros(table.num_rows + 1, np.int64)  # by row: the last step that sampled for it
        # Of the step that runs:
        self._num_tokens = 0
        self._rows: NDArray[np.int32] = np.empty(0, np.int32)  # that sample
        self._owes_receive = self._owes_send = self._owes_tokens = False

    def share_aux_hidden_states(self, model: Model, max_num_tokens: int) -> None:
        """Let every stage hand on the hidden states of layers that a proposer on the last stage reads. Every stage
        calls it once."""
        wanted = model.aux_hidden_states.layers if model.aux_hidden_states is not None else ()
        num_layers = len(model.attention_specs())
        offers = [json.loads(data) for data in self._link.exchange_bytes(json.dumps([num_layers, wanted]).encode())]
        start = sum(num_layers for num_layers, _ in offers[: self.stage.index])
        end = start + num_layers
        known = [layer for layer in offers[-1][1] if layer < end or self.stage.is_last]
        if not known:
            return
        if not self.stage.is_last:
            states = torch.zeros(
                max_num_tokens, len(known) * self._hidden_size, dtype=self._dtype, device=self._table.device
            )
            model.aux_hidden_states = AuxHiddenStates(tuple(known), states)
        self._aux = model.aux_hidden_states
        self._aux_columns = [column for column, layer in enumerate(known) if layer < start]

    def make_input_buffer(self, max_num_tokens: int) -> Tensor | None:
        """(max_num_tokens, hidden), for the hidden states that a captured step goes on from; None on the first stage,
        which embeds tokens."""
        if self.stage.is_first:
            return None
        return torch.zeros(max_num_tokens, self._hidden_size, dtype=self._dtype, device=self._table.device)

    def connect(self) -> None:
        """Steps from here on are those of all stages."""
        self._is_connected = True

    def begin_step(self, step: SchedulerOutput) -> None:
        """Before anything else of the step: place the tokens that its requests have sampled since."""
        self._num_tokens = step.total_num_scheduled_tokens
        if not self._is_connected:
            return
        self._num_steps += 1
        self._rows = step.rows[step.sampling_mask]
        self._owes_receive, self._owes_send = not self.stage.is_first, not self.stage.is_last
        self._owes_tokens = self.stage.is_last and len(self._rows) > 0
        if self.stage.is_last:
            return
        for request in step.new_requests:
            self._sampled_in[request.row] = 0  # what is still to come is of the request before
        needed = int(self._sampled_in[step.rows].max(initial=0))
        while self._sampled and self._sampled[0].number <= max(needed, self._num_steps - 2 * self.stage.size):
            self._place_tokens(self._sampled.popleft())
        self._sampled_in[self._rows] = self._num_steps

    def receive_hidden_states(self, buffer: Tensor | None = None, token_indices: Tensor | None = None) -> Tensor | None:
        """(num_tokens, hidden) of the stage before; None on the first. Where there is a ``buffer`` they are written to
        its rows ``token_indices`` (num_tokens,), or its first, and what is returned is the buffer."""
        if self.stage.is_first:
            return None
        columns = 1 + len(self._aux_columns)
        in_place = buffer is not None and token_indices is None and columns == 1
        if in_place and buffer is not None:
            message = buffer[: self._num_tokens]
        else:
            make = torch.empty if self._owes_receive else torch.zeros
            shape = (self._num_tokens, columns * self._hidden_size)
            message = make(shape, dtype=self._dtype, device=self._table.device)
        if self._owes_receive:
            self._owes_receive = False
            self._link.receive_hidden_states(message)
        if in_place:
            return buffer
        hidden = message[:, : self._hidden_size]
        if columns > 1:
            self._received_aux = message[:, self._hidden_size :]
        if buffer is None:
            return hidden.contiguous()
        if token_indices is None:
            buffer[: self._num_tokens] = hidden
        else:
            buffer[token_indices] = hidden
        return buffer

    def send_hidden_states(self, hidden: Tensor, token_indices: Tensor | None = None) -> None:
        """Behind the model: ``hidden`` goes to the next stage, if there is one, and may be overwritten then. Its rows
        ``token_indices`` are the step's tokens, or its first. A proposer finds the hidden states of all stages in
        the same rows of ``aux_hidden_states``."""
        rows: Tensor | slice = slice(self._num_tokens) if token_indices is None else token_indices
        if self._received_aux is not None and self._aux is not None:
            states = self._aux.states.unflatten(1, (-1, self._hidden_size))
            for column, received in zip(self._aux_columns, self._received_aux.split(self._hidden_size, 1), strict=True):
                states[rows, column] = received
            self._received_aux = None
        if self._owes_send:
            self._owes_send = False
            aux = [] if self._aux is None else [self._aux.states[rows]]
            self._send_message(torch.cat([hidden[rows], *aux], 1))

    def return_tokens(self) -> None:
        """On the last stage, behind sampling and drafting: tell the others what the table has now."""
        if self._owes_tokens:
            self._owes_tokens = False
            self._link.return_tokens(self._pack_tokens(self._rows))

    def finish_failed_step(self) -> None:
        """Exchange what the step has not, so that the stages stay together."""
        if self._owes_receive:
            self.receive_hidden_states()
        self._received_aux = None
        device = self._table.device
        if self._owes_send:
            self._owes_send = False
            num_columns = self._hidden_size + (0 if self._aux is None else self._aux.states.shape[1])
            self._send_message(torch.zeros(self._num_tokens, num_columns, dtype=self._dtype, device=device))
        if self._owes_tokens:
            self._owes_tokens = False
            self._link.return_tokens(self._make_packed(len(self._rows)))

    def _send_message(self, message: Tensor) -> None:
        self._link.send_hidden_states(message)
        if len(self._rows):
            self._sampled.append(_SampledStep(self._num_steps, self._rows))

    def _make_packed(self, num_rows: int) -> Tensor:
        return torch.zeros(num_rows, _NUM_COUNTS + len(self._window), dtype=torch.int32, device=self._table.device)

    def _pack_tokens(self, host_rows: NDArray[np.int32]) -> Tensor:
        """(n, 3 + window): of a row its counts, its last tokens, which the step may have appended, and its drafts."""
        table = self._table
        rows = copy_to_device(host_rows, torch.int64, table.device)
        num_tokens = table.num_tokens[rows]
        tokens = table.token_ids[rows[:, None], self._find_columns(num_tokens)]
        counts = torch.stack((num_tokens, table.num_computed_tokens[rows], table.num_drafts[rows]), 1)
        return torch.cat((counts, tokens), 1)

    def _place_tokens(self, sampled: _SampledStep) -> None:
        """Take in what a step appended. Rows that have another request since are left alone."""
        table, packed = self._table, self._make_packed(len(sampled.rows))
        self._link.receive_tokens(packed)
        is_current = self._sampled_in[sampled.rows] == sampled.number
        if not is_current.any():
            return
        rows = copy_to_device(sampled.rows[is_current], torch.int64, table.device)
        if not is_current.all():
            packed = packed[copy_to_device(np.flatnonzero(is_current), torch.int64, table.device)]
        num_tokens = packed[:, 0]
        table.num_tokens[rows] = num_tokens
        table.num_computed_tokens[rows] = packed[:, 1]
        table.num_drafts[rows] = packed[:, 2]
        table.token_ids[rows[:, None], self._find_columns(num_tokens)] = packed[:, _NUM_COUNTS:]

    def _find_columns(self, num_tokens: Tensor) -> Tensor:
        """(n, window) of ``token_ids``; those outside it are its first or last, with what those hold."""
        return (num_tokens.long()[:, None] + self._window).clamp(0, self._table.token_ids.shape[1] - 1)


def share_attention_specs(link: StageLink, specs: Sequence[AttentionSpec]) -> list[AttentionSpec]:
    """The specs of all layers of the model, of which this stage has ``specs``: block tables are of groups of layers,
    which every stage has to number alike."""
    fields = [{**asdict(spec), "dtype": str(spec.dtype), "kv_dtype": str(spec.kv_dtype)} for spec in specs]
    by_stage = [json.loads(data) for data in link.exchange_bytes(json.dumps(fields).encode())]
    return [_make_spec(each) for stage in by_stage for each in stage]


def share_module_shapes(link: StageLink, adapters: ModelAdapters) -> None:
    """Let every stage know the modules of all, so that it can tell what an adapter must not name."""
    for data in link.exchange_bytes(json.dumps(adapters.module_shapes).encode()):
        adapters.module_shapes |= {name: tuple(shape) for name, shape in json.loads(data).items()}


def _make_spec(fields: dict[str, Any]) -> AttentionSpec:
    dtypes = {name: getattr(torch, str(fields[name]).removeprefix("torch.")) for name in ("dtype", "kv_dtype")}
    return AttentionSpec(**{**fields, **dtypes})
