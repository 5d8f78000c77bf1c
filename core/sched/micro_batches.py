"""Steps that run at once, one on each stage of a pipeline: which running requests the next one leaves to others."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from quire.core.sched.output_updater import InFlightStep
from quire.core.sched.running_batch import RunningBatch

__all__ = ["MicroBatches"]

_MAX_IN_FLIGHT = 2
"""Steps in flight that sample for one request, as with one stage."""


class MicroBatches:
    """Divides the decoding requests among as many steps as there are stages, so that no stage waits.

    A request whose next token one of the newest ``num_stages - 1`` steps samples is held back: that step has not come
    to the last stage yet, and the first one would wait for the token. Older steps in flight are no hindrance, since the
    token returns on the device. Of the others a step takes an equal share; each has its turn within ``num_stages``
    steps, because those that were taken are held back in the next. Prompts are divided by the token budget: their parts
    may follow each other at once. Where all would be held back behind a single step, none is: the next step waits on
    the device for the tokens of that one, and not for the host to read them. With one stage no request is held back.
    """

    def __init__(self, num_stages: int, running: RunningBatch, in_flight: Sequence[InFlightStep]) -> None:
        """``in_flight``: the oldest first; the scheduler's own."""
        self._num_stages = num_stages
        self._running = running
        self._in_flight = in_flight
        running.has_stages = num_stages > 1

    def hold_rows(self) -> None:
        """Before a step is planned: note in the running batch which rows it leaves out."""
        if self._num_stages == 1:
            return
        table = self._running
        table.is_held[:] = False
        num_in_flight = np.zeros(len(table.is_held), np.int32)  # by row: steps that sample for it
        for number, each in enumerate(reversed(self._in_flight), 1):
            rows = each.step.rows
            # A row of another generation has another request since.
            is_current = table.generations[rows] == each.generations
            rows = rows[is_current & each.step.sampling_mask]
            num_in_flight[rows] += 1
            if number < self._num_stages:
                table.is_held[rows] = True
        table.is_held |= num_in_flight >= _MAX_IN_FLIGHT
        if len(self._in_flight) == 1 and table.is_held[table.rows].all():
            table.is_held[:] = False
        decoding = table.rows
        decoding = decoding[table.num_tokens[decoding] - table.num_computed_tokens[decoding] == 1]
        decoding = decoding[table.num_tokens[decoding] > table.prompt_len[decoding]]
        share = -(-len(decoding) // self._num_stages)
        table.is_held[decoding[~table.is_held[decoding]][share:]] = True
