"""Reads what ``quire serve --record`` wrote: as a trace, or line by line for a replay."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
import zstandard

from quire.core.errors import ConfigError
from quire.core.traces.records import (
    SCHEMA_VERSION,
    ArrivalRecord,
    DoneRecord,
    EndRecord,
    HeaderRecord,
    Record,
    StepRecord,
)
from quire.server.traces.trace import Trace, TraceRequest

__all__ = ["Recording", "open_text", "read_recording"]

_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"


@dataclass(frozen=True, slots=True)
class Recording:
    """A recording in memory: its header, and its other lines in order."""

    name: str
    header: HeaderRecord
    records: list[Record]

    def list_finished_steps(self) -> list[tuple[StepRecord, DoneRecord, int]]:
        """Steps whose output came, in order, and how many requests each had."""
        steps: dict[int, tuple[StepRecord, int]] = {}
        finished = []
        num_reqs = 0
        for record in self.records:
            if isinstance(record, StepRecord):
                num_reqs = num_reqs if record.ids is None else len(record.ids)
                steps[record.step] = (record, num_reqs)
            elif isinstance(record, DoneRecord) and record.step in steps:
                step, count = steps.pop(record.step)
                finished.append((step, record, count))
        return finished

    def make_trace(self) -> Trace:
        """The requests that were queued and got an answer. An answer that was cut off counts as far as it went; a
        request that was still running when the recording ended is left out."""
        ends = {record.id: record for record in self.records if isinstance(record, EndRecord)}
        block_size = int(self.header.engine.get("block_size", 0))
        has_hashes = bool(self.header.engine.get("prefix_caching"))
        parents = {record.parent for record in self.records if isinstance(record, ArrivalRecord)}
        requests, num_unfinished, num_refused, num_failed = [], 0, 0, 0
        for record in self.records:
            if not isinstance(record, ArrivalRecord):
                continue
            end = ends.get(record.id)
            if record.refused:
                num_refused += 1
            elif end is None:
                num_unfinished += 1
            elif not end.output_len:
                num_failed += 1
            else:
                prompt_id = record.id if record.parent is None and record.id in parents else record.parent
                requests.append(_make_request(record, end, self.header.origin_ns, prompt_id))
        requests.sort(key=lambda request: request.arrival_s)
        counts = (
            (num_unfinished, "were still running at its end"),
            (num_refused, "were refused"),
            (num_failed, "ended before their first token"),
        )
        notes = [f"{count} requests {what}, and are left out" for count, what in counts if count]
        num_adapted = sum(1 for record in self.records if isinstance(record, ArrivalRecord) and record.adapter)
        if num_adapted:
            notes.append(
                f"{num_adapted} requests have an adapter: they count as the base's, and wait for no load or slot"
            )
        if not requests:
            raise ConfigError(f"{self.name}: no request has ended in this recording; record for longer")
        return Trace(self.name, requests, block_size if has_hashes else 0, notes)


def read_recording(path: Path) -> Recording:
    """Read a recording. One that was cut off (the server was killed) is read up to there. Raises ``ConfigError``."""
    decode = msgspec.json.Decoder(Record).decode
    records: list[Record] = []
    for number, line in enumerate(_iter_lines(path), 1):
        try:
            records.append(decode(line))
        except msgspec.DecodeError as error:
            raise ConfigError(f"{path}: line {number} is not one of a recording ({error}); record it again") from None
        if number == 1:
            _check_header(path, records[0])
    if not records:
        raise ConfigError(f"{path} is no recording: it has no line; name a file of quire serve --record")
    header = records.pop(0)
    assert isinstance(header, HeaderRecord)
    return Recording(path.name, header, records)


def open_text(path: Path) -> str:
    """The text of a trace file, compressed with zstd or not, as far as it can be read. Raises ``ConfigError``."""
    try:
        with path.open("rb") as file:
            is_compressed = file.read(4) == _ZSTD_MAGIC
            file.seek(0)
            if not is_compressed:
                return file.read().decode("utf-8-sig")
            data = io.BytesIO()
            with zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True) as reader:
                while chunk := reader.read(1 << 20):
                    data.write(chunk)
            return data.getvalue().decode("utf-8")
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be read: {error.strerror or error}; name a recording of quire serve --record"
        ) from None
    except (UnicodeDecodeError, zstandard.ZstdError) as error:
        reason = f"{path} is not a trace ({error})"
        raise ConfigError(f"{reason}; name a recording of quire serve --record, or a trace of another kind") from None


def _iter_lines(path: Path) -> Iterator[str]:
    text = open_text(path)
    end = text.rfind("\n") + 1  # what comes behind was cut off
    yield from text[:end].splitlines()


def _check_header(path: Path, header: Record) -> None:
    if not isinstance(header, HeaderRecord):
        raise ConfigError(f"{path}: the first line is no header of a recording; record it again")
    if header.schema != SCHEMA_VERSION:
        raise ConfigError(
            f"{path} has schema {header.schema}, of quire {header.quire}; this version reads {SCHEMA_VERSION}: record "
            f"it again, or use that version"
        )


def _make_request(arrival: ArrivalRecord, end: EndRecord, origin_ns: int, prompt_id: int | None) -> TraceRequest:
    return TraceRequest(
        max(arrival.arrival_ns - origin_ns, 0) / 1e9,
        arrival.prompt_len,
        end.output_len,
        arrival.max_tokens,
        (*arrival.hashes, *end.hashes),
        arrival.priority,
        arrival.scheduling,
        prompt_id,
    )
