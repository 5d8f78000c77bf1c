"""Reads traces of any kind: recordings of Quire, and the public data sets, recognised by what they contain."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import re
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from quire.core.errors import ConfigError
from quire.server.traces.recording import open_text, read_recording
from quire.server.traces.synthetic import make_synthetic_trace
from quire.server.traces.trace import NO_TIMES, Trace, TraceRequest

__all__ = ["read_trace"]

_FORMATS = "a recording of quire serve --record, Mooncake's JSON lines, Azure's or BurstGPT's CSV, or ShareGPT's JSON"
_MOONCAKE_BLOCK = 512
_CHARACTERS_PER_TOKEN = 4


def read_trace(source: str, *, seed: int = 0, count_tokens: Callable[[str], int] | None = None) -> Trace:
    """A trace from a file, or from a spec that begins with ``synthetic``. ``count_tokens`` is for conversations, which
    have texts; without it, four characters count as a token. Raises ``ConfigError``."""
    if source.partition(":")[0] == "synthetic":
        trace = make_synthetic_trace(source, seed)
    else:
        path = Path(source).expanduser()
        if not path.is_file():
            raise ConfigError(f"trace {source}: there is no such file; name one, or write synthetic:requests=1000")
        trace = _read_file(source, path, count_tokens)
    trace.check_bounds()
    return trace


def _read_file(source: str, path: Path, count_tokens: Callable[[str], int] | None) -> Trace:
    text = open_text(path)
    first = text[: text.find("\n")] if "\n" in text else text
    try:
        if first.startswith('{"event":"header"'):
            return read_recording(path).make_trace()
        if first.startswith("{") and "input_length" in first:
            return Trace(path.stem, _sorted(path, _read_mooncake(text)), _MOONCAKE_BLOCK)
        if "ContextTokens" in first and "GeneratedTokens" in first:
            return Trace(path.stem, _sorted(path, _read_azure(text)))
        if "Request tokens" in first and "Response tokens" in first:
            return _read_burstgpt(path, text)
        if first.startswith("[") or '"conversations"' in first:
            return _read_conversations(path.stem, text, count_tokens)
    except ConfigError:
        raise  # it says what is wrong, and is a ValueError
    except RecursionError:
        raise ConfigError(f"trace {source} cannot be read: it is nested too deeply; it may be {_FORMATS}") from None
    except (ArithmeticError, AttributeError, LookupError, OSError, TypeError, ValueError, csv.Error) as error:
        raise ConfigError(
            f"trace {source} cannot be read ({type(error).__name__}: {error}); it may be {_FORMATS}"
        ) from None
    raise ConfigError(f"trace {source} is of no known format; it may be {_FORMATS}")


def _read_mooncake(text: str) -> Iterator[TraceRequest]:
    """``{"timestamp": ms, "input_length": n, "output_length": n, "hash_ids": [an id for each 512 tokens]}``. The last
    id may stand for a part of a block, which is not shared as a whole."""
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"in line {number}: {error}") from None
        length = int(row["input_length"])
        hashes = tuple(int(each) for each in row.get("hash_ids", ())[: length // _MOONCAKE_BLOCK])
        yield TraceRequest(
            float(row["timestamp"]) / 1e3, length, max(int(row["output_length"]), 1), block_hashes=hashes
        )


def _read_azure(text: str) -> Iterator[TraceRequest]:
    """``TIMESTAMP,ContextTokens,GeneratedTokens``, the time with seven decimals or with a zone."""
    for row in csv.DictReader(io.StringIO(text)):
        stamp = re.sub(r"(\.\d{6})\d+", r"\1", row["TIMESTAMP"].strip())
        seconds = datetime.fromisoformat(stamp).timestamp()
        yield TraceRequest(seconds, max(int(row["ContextTokens"]), 1), max(int(row["GeneratedTokens"]), 1))


def _read_burstgpt(path: Path, text: str) -> Trace:
    """``Timestamp`` (s), ``Request tokens``, ``Response tokens``; a response of 0 tokens is a failure."""
    requests, num_failed = [], 0
    for row in csv.DictReader(io.StringIO(text)):
        output_len = int(float(row["Response tokens"]))
        if output_len < 1:
            num_failed += 1
            continue
        requests.append(TraceRequest(float(row["Timestamp"]), max(int(float(row["Request tokens"])), 1), output_len))
    notes = [f"{num_failed} rows without a response are left out"] if num_failed else []
    return Trace(path.stem, _sorted(path, iter(requests)), notes=notes)


def _read_conversations(name: str, text: str, count_tokens: Callable[[str], int] | None) -> Trace:
    """A list of ``{"conversations": [{"value": prompt}, {"value": answer}, ...]}``, or an object a line. A request is
    the first question and its answer; there are no times."""
    count = count_tokens or (lambda value: -(-len(value) // _CHARACTERS_PER_TOKEN))
    entries: list[Any] = json.loads(text) if text.startswith("[") else [json.loads(x) for x in text.splitlines() if x]
    turns = [[str(turn["value"]) for turn in entry.get("conversations") or ()] for entry in entries]
    requests = [TraceRequest(0.0, max(count(t[0]), 1), max(count(t[1]), 1)) for t in turns if len(t) > 1]
    if not requests:
        raise ConfigError(f"{name}: no conversation has a question and an answer")
    notes = [NO_TIMES]
    if count_tokens is None:
        notes.append("lengths are estimated at four characters a token; --tokenizer counts them")
    return Trace(name, requests, notes=notes, has_times=False)


def _sorted(path: Path, requests: Iterator[TraceRequest]) -> list[TraceRequest]:
    """By arrival, the first at 0 s."""
    ordered = sorted(requests, key=lambda request: request.arrival_s)
    if not ordered:
        raise ConfigError(f"trace {path} has no requests: it ends behind its first line; name another")
    start = ordered[0].arrival_s
    return [dataclasses.replace(request, arrival_s=request.arrival_s - start) for request in ordered]
