"""A worker without a model: it keeps a request table and marks in place of keys and values, and checks every read."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from quire.core.contracts.kv import KVGroup
from quire.core.messages import LogprobRows, ModelRunnerOutput, NewRequest, SchedulerOutput

__all__ = ["FakeKVWorker", "compute_expected_tokens"]

_FIRST_MARK = 1

_GARBAGE = -1
"""The mark of a slot that a failed step was to write (no hash is -1), and the token that is sampled from such slots."""


class FakeKVWorker:
    """Executes steps in the order in which they are given, as a device does.

    The key and value of a position are a mark: a hash of all tokens up to it and of the salt. Every step checks that
    each position it attends to holds the mark it must hold, so that any mistake in block tables, sharing, copies,
    reuse or freeing of blocks is an ``AssertionError`` in the step that would have computed a wrong token. The token
    sampled depends on the request's seed and on all tokens before it: see ``compute_expected_tokens``. Marks and tokens
    also depend on what the request's adapter slot holds when they are computed.

    A step that fails (``fail_step``) leaves garbage in the slots that it was to write. What a step behind it computes
    from garbage is garbage as well, and samples the token -1, which no request may ever receive.

    Where steps ask for drafts, each of them is right with probability ``draft_accuracy``.
    """

    def __init__(
        self, groups: Sequence[KVGroup], num_blocks: int, block_size: int, vocab_size: int, draft_accuracy: float = 0.5
    ) -> None:
        self._draft_accuracy = draft_accuracy
        self._rng = random.Random(0)
        self._groups = tuple(groups)
        self._num_blocks = num_blocks
        self._block_size = block_size
        self._vocab_size = vocab_size
        self._rows: dict[int, _Row] = {}
        self._slots: list[dict[int, int]] = [{} for _ in groups]  # slot -> mark
        self._adapters: dict[int, str] = {}  # slot -> hash of the adapter's content
        self._next_step = 0
        self._rows_left_with: dict[int, set[int]] = {}  # by failed step: rows that it freed, unknown to the worker
        self._may_be_freed_again: set[int] = set()

    def execute_step(self, step: SchedulerOutput) -> ModelRunnerOutput:
        """Apply the differences, compute the grants, sample."""
        self._begin_step(step)
        grants = list(
            zip(step.rows.tolist(), step.num_scheduled_tokens.tolist(), step.sampling_mask.tolist(), strict=True)
        )
        drafts = [0] * len(grants) if step.num_draft_tokens is None else step.num_draft_tokens.tolist()
        written: list[set[int]] = [set() for _ in self._groups]  # slots, by group
        for (row, count, _), drafted in zip(grants, drafts, strict=True):
            assert drafted == 0 or count == 1 + drafted, "drafts come beside one token"
            if not self._rows[row].is_garbage:
                self._rows[row].append_drafts(drafted)
                self._write_kv(self._rows[row], count, written)
        result = ModelRunnerOutput(
            step.step,
            np.zeros((len(grants), 1 + max(drafts)), np.int32),
            np.zeros(len(grants), np.int32),
            num_verified_drafts=None if step.num_draft_tokens is None else step.num_draft_tokens.copy(),
        )
        for index, (row, count, samples) in enumerate(grants):
            if self._rows[row].is_garbage or self._reads_garbage(self._rows[row]):
                self._garble_row(self._rows[row], count)
                result.sampled_token_ids[index, 0], result.num_sampled_tokens[index] = _GARBAGE, samples
                continue
            assert self._rows[row].num_computed_tokens <= step.max_seq_lens[index], "max_seq_lens is no upper bound"
            self._check_kv_reads(self._rows[row], step.max_seq_len)
            self._sample_tokens(self._rows[row], index, count, samples, drafts[index], result)
            self._rows[row].host_draft = (
                self._propose_drafts(self._rows[row], step.num_tokens_to_propose) if samples else []
            )
        return result

    @property
    def loaded_adapters(self) -> dict[int, str]:
        """What each slot holds: the hash of an adapter's content."""
        return dict(self._adapters)

    def fill_slot(self, slot: int, content_hash: str) -> None:
        """From here on the slot holds this adapter."""
        self._adapters[slot] = content_hash

    def empty_slot(self, slot: int) -> None:
        """From here on the slot holds nothing."""
        del self._adapters[slot]

    def fail_step(self, step: SchedulerOutput, *, read_differences: bool) -> None:
        """Fail on a step: while it is computed, or (without ``read_differences``) before anything of it is known. The
        rows of its requests are garbage until others take them."""
        rows_before = dict(self._rows)
        self._begin_step(step)
        for row, count in zip(step.rows.tolist(), step.num_scheduled_tokens.tolist(), strict=True):
            request = self._rows[row]
            if not request.is_garbage:
                request.num_computed_tokens += count
            self._garble_row(request, count)
        self._may_be_freed_again.update(step.freed_rows)
        if not read_differences:
            self._rows_left_with[step.step] = set(step.freed_rows)
            failed_rows = {row: rows_before.get(row, self._rows[row]) for row in step.rows.tolist()}
            self._rows = rows_before | failed_rows
            for request in failed_rows.values():
                request.is_garbage = True

    def note_reported_failure(self, step: SchedulerOutput) -> None:
        """The scheduler knows that the step has failed: from now on it may give away rows that the step freed only if
        it names them as freed once more."""
        self._rows_left_with.pop(step.step, None)

    def holds_garbage(self, group: int, block: int) -> bool:
        """Whether a slot of the block was to be written by a step that failed, and was not written since."""
        slots, size = self._slots[group], self._block_size
        return any(slots.get(slot) == _GARBAGE for slot in range(block * size, (block + 1) * size))

    def _begin_step(self, step: SchedulerOutput) -> None:
        assert step.step == self._next_step, f"step {step.step} came instead of {self._next_step}"
        self._next_step += 1
        self._update_states(step)
        self._check_step(step)

    def _update_states(self, step: SchedulerOutput) -> None:
        for row in step.freed_rows:
            is_known = self._rows.pop(row, None) is not None
            assert is_known or row in self._may_be_freed_again, f"row {row} was freed, but no request holds it"
        for new in step.new_requests:
            is_free = new.row not in self._rows or any(new.row in rows for rows in self._rows_left_with.values())
            assert is_free, f"row {new.row} is given to {new.request_id}, but was not freed"
            self._rows[new.row] = _Row(new, list(new.token_ids), new.num_computed_tokens, [{} for _ in self._groups])
            slot = new.adapter_slot
            assert slot < 0 or slot in self._adapters, f"{new.request_id} has slot {slot}, which is empty"
        for diff in step.block_diffs:
            table = self._rows[diff.row].blocks[diff.group]
            for i, block in enumerate(diff.block_ids):
                assert 0 <= block < self._num_blocks, f"block {block} does not exist"
                table[diff.start + i] = block
        for draft in step.host_drafts:
            request = self._rows[draft.row]
            if request.is_garbage:
                continue
            sampled_since = request.tokens[draft.base_len :]
            agrees = draft.token_ids[: len(sampled_since)] == sampled_since
            request.host_draft = draft.token_ids[len(sampled_since) :] if agrees else []
        for group, source, destination in step.block_copies:
            size, slots = self._block_size, self._slots[group]
            for offset in range(size):
                if source * size + offset in slots:
                    slots[destination * size + offset] = slots[source * size + offset]

    def _check_step(self, step: SchedulerOutput) -> None:
        assert len(step.rows) > 0, "an empty step"
        assert len(set(step.rows.tolist())) == len(step.rows), "a row is granted twice"
        assert int(step.num_scheduled_tokens.sum()) == step.total_num_scheduled_tokens
        decodes = step.num_scheduled_tokens[: step.num_decodes]
        assert (decodes == 1).all() and step.sampling_mask[: step.num_decodes].all(), "decodes do not come first"
        is_decode = (step.num_scheduled_tokens == 1) & step.sampling_mask
        assert not is_decode[step.num_decodes :].any(), "a decode comes after the prompts"
        if step.num_draft_tokens is not None:
            drafted = step.num_draft_tokens[step.num_decodes :] > 0
            assert not step.num_draft_tokens[: step.num_decodes].any() and (np.diff(drafted.astype(int)) <= 0).all(), (
                "requests with drafts do not stand between decodes and prompts"
            )

    def _write_kv(self, row: _Row, count: int, written: list[set[int]]) -> None:
        assert count > 0, f"{row.new.request_id}: an empty grant"
        assert row.num_computed_tokens + count <= len(row.tokens), (
            f"{row.new.request_id}: granted tokens that are not known"
        )
        row.extend_marks(row.num_computed_tokens + count, self._get_adapter(row))
        for group, table in enumerate(row.blocks):
            for position in range(row.num_computed_tokens, row.num_computed_tokens + count):
                block = table[position // self._block_size]
                assert block != 0, f"{row.new.request_id} would write position {position} into the null block"
                slot = block * self._block_size + position % self._block_size
                assert slot not in written[group], f"two requests write block {block} in one step"
                written[group].add(slot)
                self._slots[group][slot] = row.marks[position]
        row.num_computed_tokens += count

    def _check_kv_reads(self, row: _Row, max_seq_len: int) -> None:
        assert row.num_computed_tokens <= max_seq_len, f"{row.new.request_id} is longer than max_seq_len={max_seq_len}"
        for group, table in enumerate(row.blocks):
            marks = self._read_marks(row, group)
            first = row.num_computed_tokens - len(marks)
            for position, mark in enumerate(marks, first):
                assert mark == row.marks[position], (
                    f"{row.new.request_id} reads another's key at position {position}, group {group}, "
                    f"block {table[position // self._block_size]}"
                )

    def _reads_garbage(self, row: _Row) -> bool:
        return any(_GARBAGE in self._read_marks(row, group) for group in range(len(self._groups)))

    def _read_marks(self, row: _Row, group: int) -> list[int | None]:
        """The marks of the positions that the row's next token attends to in a group."""
        window, table, size = self._groups[group].window, row.blocks[group], self._block_size
        first = 0 if window is None else max(row.num_computed_tokens - window, 0)
        slots = (table[i // size] * size + i % size for i in range(first, row.num_computed_tokens))
        return [self._slots[group].get(slot) for slot in slots]

    def _garble_row(self, row: _Row, count: int) -> None:
        """The last ``count`` tokens that count as computed are not, and nothing that comes of the row is to be used."""
        if not row.is_garbage:
            row.is_garbage = True
            for group, table in enumerate(row.blocks):
                for position in range(row.num_computed_tokens - count, row.num_computed_tokens):
                    slot = table[position // self._block_size] * self._block_size + position % self._block_size
                    self._slots[group][slot] = _GARBAGE

    def _sample_tokens(
        self, row: _Row, index: int, count: int, samples: bool, drafted: int, result: ModelRunnerOutput
    ) -> None:
        params, new = row.new.params, row.new
        assert samples == (row.num_computed_tokens == len(row.tokens)), f"{new.request_id}: samples={samples} is wrong"
        assert len(row.tokens) <= new.prompt_len + (params.max_tokens or len(row.tokens)), "drafts beyond the end"
        if params.prompt_logprobs is not None:
            targets = row.tokens[row.num_computed_tokens - count + 1 : min(row.num_computed_tokens + 1, new.prompt_len)]
            if targets:
                result.prompt_logprobs[index] = _make_logprob_rows(targets)
        if not samples:
            return
        known = len(row.tokens) - drafted
        offered, sampled = row.tokens[known:], list[int]()
        while not sampled or (len(sampled) <= drafted and sampled[-1] == offered[len(sampled) - 1]):
            tokens = row.tokens[:known] + sampled
            sampled.append(_compute_next_token(new.seed, tokens, self._vocab_size, self._get_adapter(row)))
        row.replace_drafts(known, sampled)
        result.sampled_token_ids[index, : len(sampled)] = sampled
        result.num_sampled_tokens[index] = len(sampled)
        if params.logprobs is not None:
            result.logprobs[index] = _make_logprob_rows(sampled + [0] * (1 + drafted - len(sampled)))

    def _get_adapter(self, row: _Row) -> str:
        """What the row's slot holds now; empty for the base model."""
        return "" if row.new.adapter_slot < 0 else self._adapters[row.new.adapter_slot]

    def _propose_drafts(self, row: _Row, count: int) -> list[int]:
        expected = compute_expected_tokens(row.new.seed, row.tokens, count, self._vocab_size, self._get_adapter(row))
        return [
            token if self._rng.random() < self._draft_accuracy else (token + 1) % self._vocab_size for token in expected
        ]


def compute_expected_tokens(
    seed: int, prompt: Sequence[int], count: int, vocab_size: int, adapter: str = ""
) -> list[int]:
    """What a request samples if nothing goes wrong: ``count`` tokens, stops not considered. ``adapter`` is the hash of
    its adapter's content."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(_compute_next_token(seed, tokens, vocab_size, adapter))
    return tokens[len(prompt) :]


@dataclass(slots=True)
class _Row:
    new: NewRequest
    tokens: list[int]
    num_computed_tokens: int
    blocks: list[dict[int, int]]
    marks: list[int] = field(default_factory=list)
    host_draft: list[int] = field(default_factory=list)
    is_garbage: bool = False

    def append_drafts(self, count: int) -> None:
        """Append ``count`` drafts to the tokens, zeros where there are too few."""
        if count:
            assert self.num_computed_tokens == len(self.tokens) - 1, (
                f"{self.new.request_id} verifies drafts in its prompt"
            )
            self.tokens += (self.host_draft + [0] * count)[:count]

    def replace_drafts(self, known: int, sampled: list[int]) -> None:
        """Replace the drafts by what was sampled: all but its last token are computed."""
        self.tokens[known:] = sampled
        self.num_computed_tokens = len(self.tokens) - 1
        del self.marks[self.num_computed_tokens :]

    def extend_marks(self, length: int, adapter: str) -> None:
        first = _FIRST_MARK if not adapter else hash((_FIRST_MARK, adapter))
        for token in self.tokens[len(self.marks) : length]:
            self.marks.append(hash((self.marks[-1] if self.marks else first, token)))


def _compute_next_token(seed: int, tokens: list[int], vocab_size: int, adapter: str) -> int:
    key = (seed, adapter) if adapter else (seed,)
    return hash((*key, len(tokens), *tokens[-3:])) % vocab_size


def _make_logprob_rows(tokens: list[int]) -> LogprobRows:
    ids = np.array(tokens, np.int32)[:, None]
    return LogprobRows(ids, -ids.astype(np.float32), np.ones(len(tokens), np.int32))
