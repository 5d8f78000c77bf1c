"""Records an engine core: what reached its scheduler, what each step computed, when, and how requests ended.

The engine's thread does no more than append references to a queue; a thread of the recorder encodes, compresses and
writes. A recording that cannot go on (the disk is full, the thread falls behind) ends with a line in the log, and the
engine never notices.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from array import array
from collections import deque
from collections.abc import Callable
from datetime import UTC, datetime
from hashlib import blake2b
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import zstandard
from numpy.typing import NDArray

from quire.core.config import EngineConfig
from quire.core.contracts.executor import KVCapacity
from quire.core.contracts.spec_decode import HostProposer
from quire.core.errors import ConfigError
from quire.core.messages import EngineCoreRequest, ModelRunnerOutput, SchedulerOutput
from quire.core.plugin.target import load_target
from quire.core.request import Request
from quire.core.stats import StepStats
from quire.core.traces.records import (
    SCHEMA_VERSION,
    AbortRecord,
    ArrivalRecord,
    DoneRecord,
    EndRecord,
    FailRecord,
    HeaderRecord,
    PolicyRecord,
    Record,
    StepRecord,
)
from quire.core.version import __version__

__all__ = ["TraceRecorder", "choose_recording_path", "start_recorder"]

_log = logging.getLogger("quire.traces")
_WRITE_INTERVAL_S = 0.1
_MAX_PENDING = 200_000
"""Records that may wait for the thread: minutes of steps."""
_HASH_BYTES = 6  # whole numbers that JSON readers of every language keep exactly


def choose_recording_path(path: str) -> Path:
    """``path``, or with a number before its suffixes where there is such a file: a recording is never overwritten.
    Raises ``ConfigError`` if no file can be made there."""
    wanted = Path(path).expanduser()
    if not wanted.parent.is_dir():
        raise ConfigError(f"--record {path}: there is no folder {wanted.parent}; make it, or name another file")
    if wanted.exists() and not wanted.is_file():
        what = "a folder; name a file in it" if wanted.is_dir() else "no regular file; name another"
        raise ConfigError(f"--record {path}: it is {what}")
    chosen, number = wanted, 0
    stem, suffixes = wanted.name.partition(".")[0], "".join(wanted.suffixes)
    while chosen.exists():
        number += 1
        chosen = wanted.with_name(f"{stem}.{number}{suffixes}")
    try:
        with chosen.open("xb"):
            pass
        chosen.unlink()
    except OSError as error:
        raise ConfigError(f"--record {path}: {error.strerror}; name a file that can be written") from None
    return chosen


def start_recorder(config: EngineConfig, capacity: KVCapacity, max_in_flight_steps: int) -> TraceRecorder | None:
    """The recorder that the configuration asks for, if it does."""
    if config.recording is None:
        return None
    policy, limits, cache = config.plugin("policy"), config.scheduler, config.cache
    header = HeaderRecord(
        SCHEMA_VERSION,
        __version__,
        datetime.now(UTC).isoformat(timespec="seconds"),
        time.monotonic_ns(),
        config.model.model,
        config.model.device,
        config.model.dtype,
        engine={
            "max_num_seqs": limits.max_num_seqs,
            "max_num_batched_tokens": limits.max_num_batched_tokens,
            "chunked_prefill": limits.chunked_prefill,
            "max_queued": limits.max_queued,
            "max_model_len": config.model.max_model_len,
            "block_size": cache.block_size,
            "num_blocks": capacity.num_blocks,
            "watermark": cache.watermark,
            "prefix_caching": cache.prefix_caching,
            "windows": [group.window for group in capacity.groups],
            "max_in_flight_steps": max_in_flight_steps,
            "enforce_eager": config.enforce_eager,
            "kv": config.plugin("kv").name,
            "speculation": None if config.speculation is None else _describe_speculation(config),
        },
        policy={"name": policy.name, "target": policy.target, "options": dict(policy.options)},
        executor=config.plugin("executor").name,
    )
    recorder = TraceRecorder(
        choose_recording_path(config.recording.path),  # here: an engine that is started again goes on in another file
        header,
        block_size=cache.block_size,
        prefix_caching=cache.prefix_caching,
        record_prompts=config.recording.prompts,
    )
    _log.info("recording to %s", recorder.path)
    return recorder


class TraceRecorder:
    """Writes a recording to ``path``. All methods but ``close`` are called by the engine's thread.

    ``clock`` is the clock that the recorded scheduler must be given: it remembers what was read of it.
    """

    def __init__(
        self,
        path: Path,
        header: HeaderRecord,
        *,
        block_size: int,
        prefix_caching: bool,
        record_prompts: bool = False,
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self.path = path
        self._source_clock = clock
        self._clock_reads: list[int] = []
        self._record_prompts = record_prompts
        self._pending: deque[Callable[[], Record]] = deque()
        self._encoder = _Encoder(block_size if prefix_caching else 0)
        self._is_open = True
        self._stop = threading.Event()
        self._file = path.open("wb", buffering=0)
        self._pending.append(lambda: header)
        self._thread = threading.Thread(target=self._run_writer, name="quire-recorder", daemon=True)
        self._thread.start()

    def clock(self) -> int:
        """Nanoseconds of the engine's clock; the next record names them."""
        now = self._source_clock()
        self._clock_reads.append(now)
        return now

    def record_arrival(self, request: EngineCoreRequest, refused: str = "") -> None:
        """A request was queued, or refused."""
        seen, clock = self._source_clock(), self._take_clock_reads()
        with_prompt = self._record_prompts
        self._append(lambda: self._encoder.make_arrival(request, seen, clock, refused, with_prompt))

    def record_abort(self, request_id: int) -> None:
        """A request was aborted."""
        clock = self._take_clock_reads()
        self._append(lambda: AbortRecord(request_id, clock))

    def record_step(self, step: SchedulerOutput, request_ids: NDArray[np.int64]) -> None:
        """A step was scheduled for these requests, in the order of its rows."""
        clock = self._take_clock_reads()
        new = [(each.request_id, each.num_computed_tokens) for each in step.new_requests]
        self._append(lambda: self._encoder.make_step(step, request_ids, new, clock))

    def record_no_step(self) -> None:
        """The scheduler was asked and scheduled nothing. Of no consequence, unless it asked the policy."""
        if self._clock_reads:
            clock = self._take_clock_reads()
            self._append(lambda: StepRecord(-1, clock))

    def record_failure(self, step: int, *, retracted: bool = False) -> None:
        """A step failed, or was taken back because memory ran out."""
        clock = self._take_clock_reads()
        self._append(lambda: FailRecord(step, retracted, clock))

    def record_output(self, stats: StepStats, output: ModelRunnerOutput) -> None:
        """The output of a step was applied."""
        clock = self._take_clock_reads()
        self._append(lambda: _make_done(stats, output, clock))

    def record_policy(self, name: str, target: str, options: dict[str, str]) -> None:
        """Another scheduling policy took over."""
        clock = self._take_clock_reads()
        self._append(lambda: PolicyRecord(name, target, options, clock))

    def record_end(self, request: Request) -> None:
        """A request left the engine."""
        self._append(lambda: self._encoder.make_end(request))

    def close(self) -> None:
        """Write what is pending. Idempotent."""
        self._stop.set()
        self._thread.join(timeout=30)

    def _take_clock_reads(self) -> list[int]:
        reads, self._clock_reads = self._clock_reads, []
        return reads

    def _append(self, make_record: Callable[[], Record]) -> None:
        if not self._is_open:
            return
        if len(self._pending) > _MAX_PENDING:
            self._end_recording("the disk or the machine is too slow for it")
            return
        self._pending.append(make_record)

    def _run_writer(self) -> None:
        try:
            compressor = zstandard.ZstdCompressor(level=3)
            with self._file, compressor.stream_writer(self._file) as writer:
                while not self._stop.wait(_WRITE_INTERVAL_S):
                    self._write_pending(writer)
                self._write_pending(writer)
        except Exception as error:
            self._end_recording(f"{type(error).__name__}: {error}")

    def _write_pending(self, writer: zstandard.ZstdCompressionWriter) -> None:
        encode = msgspec.json.Encoder().encode
        wrote = False
        while self._pending:
            writer.write(encode(self._pending.popleft()()) + b"\n")
            wrote = True
            time.sleep(0)  # the engine's thread goes first
        if wrote:
            writer.flush(zstandard.FLUSH_BLOCK)  # readable up to here, whatever happens next

    def _end_recording(self, reason: str) -> None:
        if self._is_open:
            self._is_open = False
            _log.error("the recording %s ends here: %s", self.path, reason)
        self._pending.clear()


class _Encoder:
    """Makes records of what the engine's thread has left. ``block_size`` 0: no hashes."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._key = secrets.token_bytes(16)
        self._last_ids: NDArray[np.int64] = np.empty(0, np.int64)
        self._chains: dict[int, bytes] = {}  # by request: the last hash of its prompt

    def make_arrival(
        self, request: EngineCoreRequest, seen_ns: int, clock: list[int], refused: str, with_prompt: bool
    ) -> ArrivalRecord:
        hashes: list[int] = []
        adapter = request.adapter
        if not refused and self._block_size:
            apart = request.cache_salt if adapter is None else (request.cache_salt, adapter.content_hash)
            root = self._digest(repr(apart).encode())
            hashes, self._chains[request.request_id] = self._hash_blocks(root, request.prompt_token_ids)
        return ArrivalRecord(
            request.request_id,
            request.arrival_ns,
            seen_ns,
            len(request.prompt_token_ids),
            request.params.max_tokens,
            request.params.min_tokens,
            request.priority,
            request.parent_id,
            hashes,
            {} if request.scheduling is None else msgspec.to_builtins(request.scheduling),
            refused,
            list(request.prompt_token_ids) if with_prompt else [],
            "" if adapter is None else adapter.name,
            clock,
        )

    def make_step(
        self, step: SchedulerOutput, request_ids: NDArray[np.int64], new: list[tuple[int, int]], clock: list[int]
    ) -> StepRecord:
        tokens, contexts = step.num_scheduled_tokens.astype(np.int64), step.max_seq_lens.astype(np.int64)
        others = slice(step.num_decodes, None)
        pairs = tokens[others] * contexts[others] - tokens[others] * (tokens[others] - 1) // 2
        same = np.array_equal(request_ids, self._last_ids)
        self._last_ids = request_ids
        return StepRecord(
            step.step,
            clock,
            None if same else request_ids.tolist(),
            None if (tokens == 1).all() else tokens.tolist(),
            new,
            step.num_decodes,
            int(contexts[: step.num_decodes].sum()),
            int(pairs.sum()),
            None if step.num_draft_tokens is None else step.num_draft_tokens.tolist(),
            step.num_tokens_to_propose,
        )

    def make_end(self, request: Request) -> EndRecord:
        hashes: list[int] = []
        chain = self._chains.pop(request.request_id, None)
        if chain is not None:
            start = request.prompt_len // self._block_size * self._block_size
            hashes, _ = self._hash_blocks(chain, request.token_ids[start:])
        reason = request.finish_reason or "error"
        return EndRecord(
            request.request_id,
            reason,
            request.num_output_tokens,
            request.num_cached_tokens,
            request.num_preemptions,
            hashes,
        )

    def _hash_blocks(self, chain: bytes, token_ids: list[int]) -> tuple[list[int], bytes]:
        """The hash of each full block behind ``chain``, and the last of them."""
        width, hashes = 4 * self._block_size, []
        data = memoryview(array("i", token_ids)).cast("B")
        for start in range(0, len(data) - width + 1, width):
            chain = self._digest(chain + data[start : start + width])
            hashes.append(int.from_bytes(chain, "little"))
        return hashes, chain

    def _digest(self, data: bytes) -> bytes:
        return blake2b(data, digest_size=_HASH_BYTES, key=self._key).digest()


def _describe_speculation(config: EngineConfig) -> dict[str, Any]:
    assert config.speculation is not None
    target = config.plugin("spec_decode").target
    proposer = load_target(target, "quire.core.contracts.spec_decode:SpeculativeProposer")
    return {
        "method": config.plugin("spec_decode").name,
        "num_speculative_tokens": config.speculation.num_speculative_tokens,
        "adaptive": config.speculation.adaptive,
        "on_host": issubclass(proposer, HostProposer),
    }


def _make_done(stats: StepStats, output: ModelRunnerOutput, clock: list[int]) -> DoneRecord:
    verified = output.num_verified_drafts
    return DoneRecord(
        stats.step,
        round(stats.start_us, 1),
        round(stats.schedule_us, 1),
        round(stats.launch_us, 1),
        output.device_us,
        round(stats.wait_us, 1),
        round(stats.end_us, 1),
        round(stats.update_us, 1),
        clock,
        None if verified is None else output.num_sampled_tokens.tolist(),
        None if verified is None else verified.tolist(),
        output.ran_draft_backfill,
        round(stats.held_us, 1),
    )
