"""An executor whose device is emulated: the engine around it is real, and no GPU is needed.

A process of its own is the device. Its forward of a step takes ``FORWARD_MS`` from when it was launched or the step
before ended, whatever is later; sampling takes a quarter of a millisecond from when the forward ended or was handed its
masks. Calls come in the order and from the thread in which ``UniprocExecutor`` gets them on a GPU: each takes processor
time of the engine's thread as launches do there, with gaps in which another thread may take the interpreter. Tokens
are sampled from the masks, the longest that is allowed, so that answers follow their schemas.
"""

from __future__ import annotations

import multiprocessing
import os
import struct
import time
from multiprocessing.connection import Connection
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from quire.core.contracts.executor import Executor, KVCapacity, StepFuture
from quire.core.contracts.kv import KVGroup
from quire.core.messages import ModelRunnerOutput, SchedulerOutput, TokenMasks

__all__ = ["EmulatedExecutor", "StepTimes"]

FORWARD_MS = float(os.environ.get("FORWARD_MS", "9.3"))
_SAMPLING_S = 0.25e-3
_PROMPT_TOKEN_S = 12e-6
_LAUNCH_MODEL_S, _LAUNCH_SAMPLING_S = 0.35e-3, 0.3e-3
_GAPS = 10
"""Of a launch: calls into CUDA and torch that let other threads run."""
_LONGEST_TOKEN = 16
_FEW_WORDS = 64
_TIMES = struct.Struct("ddd")


class StepTimes(NamedTuple):
    """What the device says of a step, in seconds."""

    num_decodes: int
    num_reqs: int
    idle_before: float
    """Between the end of the step before and the launch of this one."""
    idle_for_masks: float
    """Between the end of its forward and the launch of its sampling."""
    end: float


class EmulatedExecutor(Executor):
    """Two steps in flight, as on a GPU. Without drafts."""

    def __init__(self, config: Any, options: Any = None) -> None:
        super().__init__(config, options)
        self.step_times: list[StepTimes] = []
        """Of the steps whose results were read."""

    def start(self) -> KVCapacity:
        model, max_num_seqs = self.config.model, self.config.scheduler.max_num_seqs
        shape = (max_num_seqs, -(-model.vocab_size // 32))
        self._memory = SharedMemory(create=True, size=4 * shape[0] * shape[1])
        self._block: NDArray[np.int32] = np.ndarray(shape, np.int32, self._memory.buf)
        self._connection, device_end = multiprocessing.Pipe()
        by_length = _pack_by_length(Path(model.tokenizer_path, "tokenizer.json"), model.vocab_size)
        self._device = multiprocessing.get_context("fork").Process(
            target=_run_device, args=(device_end, self._block, by_length), daemon=True
        )
        self._device.start()
        device_end.close()
        return KVCapacity((KVGroup(),), 1 + max_num_seqs * model.max_model_len // self.config.cache.block_size, 1 << 20)

    def allocate_mask_block(self, num_rows: int, num_words: int) -> NDArray[np.int32]:
        """Memory that the device sees."""
        return self._block[:num_rows, :num_words]

    def execute_model(self, step: SchedulerOutput) -> None:
        self._step = step
        _use_processor(_LAUNCH_MODEL_S)
        num_prompt_tokens = step.total_num_scheduled_tokens - len(step.rows)
        self._connection.send_bytes(b"F" + struct.pack("di", time.perf_counter(), num_prompt_tokens))

    def sample_tokens(self, masks: TokenMasks | None = None) -> StepFuture:
        _use_processor(_LAUNCH_SAMPLING_S)
        sampling = self._step.sampling_mask.nonzero()[0]
        mask_rows = np.full(len(sampling), -1, np.int32)
        if masks is not None:
            mask_rows[np.searchsorted(sampling, masks.request_indices)] = np.arange(len(masks.request_indices))
        self._connection.send_bytes(b"S" + struct.pack("d", time.perf_counter()) + mask_rows.tobytes())
        return _EmulatedStep(self._connection, self._step, sampling, self.step_times)

    def shutdown(self) -> None:
        if not self._connection.closed:
            self._connection.close()
            self._device.join(5)
            self._memory.unlink()


class _EmulatedStep:
    def __init__(
        self, connection: Connection, step: SchedulerOutput, sampling: NDArray[np.int64], step_times: list[StepTimes]
    ) -> None:
        self._connection, self._step, self._sampling, self._step_times = connection, step, sampling, step_times

    def done(self) -> bool:
        return self._connection.poll(0)

    def result(self) -> ModelRunnerOutput:
        data, step = self._connection.recv_bytes(), self._step
        self._step_times.append(StepTimes(step.num_decodes, len(step.rows), *_TIMES.unpack_from(data)))
        token_ids = np.zeros((len(step.rows), 1), np.int32)
        token_ids[self._sampling, 0] = np.frombuffer(data, np.int32, offset=_TIMES.size)
        counts = step.sampling_mask.astype(np.int32)
        return ModelRunnerOutput(step.step, token_ids, counts, device_us=1e3 * FORWARD_MS)


def _use_processor(seconds: float) -> None:
    for _ in range(_GAPS):
        end = time.thread_time() + seconds / _GAPS
        while time.thread_time() < end:
            pass
        time.sleep(0)


def _pack_by_length(path: Path, vocab_size: int) -> NDArray[np.int32]:
    """Masks (lengths, words) of the tokens of each length in characters, the longest first; special ones and longer
    ones come last."""
    is_of_length = np.zeros((1 + _LONGEST_TOKEN, vocab_size), bool)
    for token, index in Tokenizer.from_file(str(path)).get_vocab(with_added_tokens=False).items():
        is_of_length[-len(token) if len(token) <= _LONGEST_TOKEN else 0, index] = True
    is_of_length = is_of_length[np.r_[1 : 1 + _LONGEST_TOKEN, 0]]
    is_of_length[-1] |= ~is_of_length.any(0)
    packed = np.packbits(is_of_length, axis=1, bitorder="little")
    return np.ascontiguousarray(np.pad(packed, ((0, 0), (0, -packed.shape[1] % 4)))).view(np.int32)


def _run_device(connection: Connection, block: NDArray[np.int32], by_length: NDArray[np.int32]) -> None:
    rng = np.random.default_rng(0)
    end = begin = forward_end = 0.0
    while True:
        try:
            message = connection.recv_bytes()
        except (EOFError, OSError):
            return
        (sent,) = struct.unpack_from("d", message, 1) if message[:1] == b"S" else (0.0,)
        if message[:1] == b"F":
            launched, num_prompt_tokens = struct.unpack("di", message[1:])
            begin = max(end, launched)
            forward_end = begin + FORWARD_MS / 1e3 + num_prompt_tokens * _PROMPT_TOKEN_S
            continue
        token_ids = _sample(rng, block, np.frombuffer(message[9:], np.int32), by_length)
        idle_before, sampling_begin = begin - end, max(forward_end, sent)
        end = sampling_begin + _SAMPLING_S
        time.sleep(max(end - time.perf_counter(), 0))
        times = _TIMES.pack(idle_before, sampling_begin - forward_end, end)
        connection.send_bytes(times + token_ids.tobytes())


def _sample(
    rng: np.random.Generator, block: NDArray[np.int32], mask_rows: NDArray[np.int32], by_length: NDArray[np.int32]
) -> NDArray[np.int32]:
    """For each row one of the longest tokens that its mask allows, or any where it has no mask."""
    token_ids = rng.integers(1000, 8000, len(mask_rows), dtype=np.int32)
    rows = (mask_rows >= 0).nonzero()[0]  # that have no token yet
    words = np.unique(rng.integers(block.shape[1], size=_FEW_WORDS))  # most rows allow a longest token in few words
    rows = _choose(rng, token_ids, rows, block[mask_rows[rows][:, None], words] & by_length[0, words], words)
    words = np.arange(block.shape[1])
    for of_length in by_length:
        rows = _choose(rng, token_ids, rows, block[mask_rows[rows]] & of_length, words)
    return token_ids


def _choose(
    rng: np.random.Generator,
    token_ids: NDArray[np.int32],
    rows: NDArray[np.int64],
    bits: NDArray[np.int32],
    words: NDArray[np.int64],
) -> NDArray[np.int64]:
    """Choose one of ``bits`` (rows, words) for each row that has one. Returns the other rows."""
    has_any = bits.any(1)
    draws = rng.integers(1 << 30, size=(2, len(rows))).tolist()
    for index in has_any.nonzero()[0].tolist():
        columns = bits[index].nonzero()[0]
        column = columns[draws[0][index] % len(columns)]
        word = int(bits[index, column]) & 0xFFFFFFFF
        allowed = [bit for bit in range(32) if word >> bit & 1]
        token_ids[rows[index]] = 32 * int(words[column]) + allowed[draws[1][index] % len(allowed)]
    return rows[~has_any]
