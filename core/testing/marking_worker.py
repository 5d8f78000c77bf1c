"""A worker without a model: it keeps a request table and marks in place of keys and values, and checks every read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from quire.core.contracts.kv import KVGroup
from quire.core.messages import LogprobRows, ModelRunnerOutput, NewRequest, SchedulerOutput

__all__ = ["MarkingWorker", "expected_tokens"]

_FIRST = 1


class MarkingWorker:
    """Executes steps in the order in which they are given, as a device does.

    The key and value of a position are a mark: a hash of all tokens up to it and of the salt. Every step checks that
    each position it attends to holds the mark it must hold, so that any mistake in block tables, sharing, copies,
    reuse or trimming is an ``AssertionError`` in the step that would have computed a wrong token. The token drawn
    depends on the request's seed and on all tokens before it: see ``expected_tokens``.
    """

    def __init__(self, groups: Sequence[KVGroup], num_blocks: int, block_size: int, vocab_size: int) -> None:
        self._groups = tuple(groups)
        self._num_blocks = num_blocks
        self._block_size = block_size
        self._vocab_size = vocab_size
        self._rows: dict[int, _Row] = {}
        self._slots: list[dict[int, int]] = [{} for _ in groups]  # slot -> mark
        self._next_step = 0

    def execute(self, step: SchedulerOutput) -> ModelRunnerOutput:
        """Apply the differences, compute the grants, draw."""
        assert step.step == self._next_step, f"step {step.step} came instead of {self._next_step}"
        self._next_step += 1
        self._apply(step)
        self._check_shape(step)
        grants = list(zip(step.rows.tolist(), step.num_tokens.tolist(), step.samples.tolist(), strict=True))
        written: list[set[int]] = [set() for _ in self._groups]
        for row, count, _ in grants:
            self._write(self._rows[row], count, written)
        result = ModelRunnerOutput(
            step.step, np.zeros((len(grants), 1), np.int32), np.array([s for *_, s in grants], np.int32)
        )
        for index, (row, count, samples) in enumerate(grants):
            self._attend(self._rows[row], step.max_seq_len)
            self._draw(self._rows[row], index, count, samples, result)
        return result

    def _apply(self, step: SchedulerOutput) -> None:
        for row in step.freed_rows:
            assert self._rows.pop(row, None) is not None, f"row {row} was freed, but nobody has it"
        for new in step.new_requests:
            assert new.row not in self._rows, f"row {new.row} is given to {new.request_id}, but was not freed"
            self._rows[new.row] = _Row(new, list(new.token_ids), new.num_computed, [{} for _ in self._groups])
        for diff in step.block_diffs:
            table = self._rows[diff.row].blocks[diff.group]
            for i, block in enumerate(diff.block_ids):
                assert 0 <= block < self._num_blocks, f"block {block} does not exist"
                table[diff.start + i] = block
        for group, source, destination in step.copies:
            size, slots = self._block_size, self._slots[group]
            for offset in range(size):
                if source * size + offset in slots:
                    slots[destination * size + offset] = slots[source * size + offset]

    def _check_shape(self, step: SchedulerOutput) -> None:
        assert len(step.rows) > 0, "an empty step"
        assert len(set(step.rows.tolist())) == len(step.rows), "a row is granted twice"
        assert int(step.num_tokens.sum()) == step.total_tokens
        first = step.num_tokens[: step.num_decodes]
        assert (first == 1).all() and step.samples[: step.num_decodes].all(), "decodes do not come first"
        rest = (step.num_tokens == 1) & step.samples
        assert not rest[step.num_decodes :].any(), "a decode comes after the prompts"

    def _write(self, row: _Row, count: int, written: list[set[int]]) -> None:
        assert count > 0, f"{row.new.request_id}: an empty grant"
        assert row.computed + count <= len(row.tokens), f"{row.new.request_id}: granted tokens nobody knows"
        row.extend_marks(row.computed + count)
        for group, table in enumerate(row.blocks):
            for position in range(row.computed, row.computed + count):
                block = table[position // self._block_size]
                assert block != 0, f"{row.new.request_id} would write position {position} into the sink"
                slot = block * self._block_size + position % self._block_size
                assert slot not in written[group], f"two requests write block {block} in one step"
                written[group].add(slot)
                self._slots[group][slot] = row.marks[position]
        row.computed += count

    def _attend(self, row: _Row, max_seq_len: int) -> None:
        assert row.computed <= max_seq_len, f"{row.new.request_id} is longer than max_seq_len={max_seq_len}"
        for group, (spec, table) in enumerate(zip(self._groups, row.blocks, strict=True)):
            first = 0 if spec.window is None else max(row.computed - spec.window, 0)
            for position in range(first, row.computed):
                slot = table[position // self._block_size] * self._block_size + position % self._block_size
                found = self._slots[group].get(slot)
                assert found == row.marks[position], (
                    f"{row.new.request_id} reads another's key at position {position}, group {group}, "
                    f"block {slot // self._block_size}"
                )

    def _draw(self, row: _Row, index: int, count: int, samples: bool, result: ModelRunnerOutput) -> None:
        params, new = row.new.params, row.new
        assert samples == (row.computed == len(row.tokens)), f"{new.request_id}: samples={samples} is wrong"
        if params.prompt_logprobs is not None:
            targets = row.tokens[row.computed - count + 1 : min(row.computed + 1, new.prompt_len)]
            if targets:
                result.prompt_logprobs[index] = _rows(targets)
        if samples:
            token = _next_token(new.seed, row.tokens, self._vocab_size)
            row.tokens.append(token)
            result.tokens[index, 0] = token
            if params.logprobs is not None:
                result.logprobs[index] = _rows([token])


def expected_tokens(seed: int, prompt: Sequence[int], count: int, vocab_size: int) -> list[int]:
    """What a request draws if nothing goes wrong: ``count`` tokens, stops not considered."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(_next_token(seed, tokens, vocab_size))
    return tokens[len(prompt) :]


@dataclass(slots=True)
class _Row:
    new: NewRequest
    tokens: list[int]
    computed: int
    blocks: list[dict[int, int]]
    marks: list[int] = field(default_factory=list)

    def extend_marks(self, length: int) -> None:
        for token in self.tokens[len(self.marks) : length]:
            self.marks.append(hash((self.marks[-1] if self.marks else _FIRST, token)))


def _next_token(seed: int, tokens: list[int], vocab_size: int) -> int:
    return hash((seed, len(tokens), *tokens[-3:])) % vocab_size


def _rows(tokens: list[int]) -> LogprobRows:
    ids = np.array(tokens, np.int32)[:, None]
    return LogprobRows(ids, -ids.astype(np.float32), np.ones(len(tokens), np.int32))
