"""Compiles constraints in threads, each constraint once, and keeps what was compiled."""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from quire.core.config import EngineConfig
from quire.core.contracts.structured_output import CompiledGrammar, StructuredOutputBackend, TokenizerInfo
from quire.core.errors import InvalidRequestError
from quire.core.plugin.quarantine import class_path, read_error_text
from quire.core.plugin.target import construct_chosen, load_target
from quire.core.structured_outputs import StructuredOutputsParams

__all__ = ["CompilationStats", "EngineWait", "GrammarCompiler", "make_backend", "make_cache_key", "read_tokenizer_info"]

_log = logging.getLogger("quire.structured_output")
_NUM_THREADS = 2
_MAX_LOST_THREADS = 4
"""Threads that may hang in a compilation, each replaced by another, before nothing is compiled any more."""
_MAX_YIELD_S = 0.02
"""Between two pieces of a compilation, to an engine that is busy."""
_MAX_YIELDS_S = 0.1
"""Between all pieces of a compilation: one that has waited for as long goes on beside the engine."""
_CACHE_BYTES = 256 << 20
_TRIM_SHARE = 16
"""The cache may be larger by a part in so many of its entries."""


@dataclass(slots=True)
class CompilationStats:
    """Counters since the start."""

    num_compiled: int = 0
    num_cache_hits: int = 0
    num_refused: int = 0
    compile_seconds: float = 0.0


@dataclass(slots=True, eq=False)  # found in a list by threads that run at once: comparing fields would let others in
class _Job:
    params: StructuredOutputsParams
    future: Future[CompiledGrammar]
    started_at: float = 0.0
    is_lost: bool = field(default=False)


class _Allowance(threading.local):
    """Of each thread: how long it may wait for the engine while it compiles."""

    seconds = 0.0


class EngineWait:
    """When the engine's own thread waits, for steps that run elsewhere: a context manager for it to wait in, and what
    threads that compile call to leave it the interpreter at other times."""

    def __init__(self) -> None:
        self._is_waiting = threading.Event()
        self._is_waiting.set()
        self._allowance = _Allowance()

    def __enter__(self) -> None:
        self._is_waiting.set()

    def __exit__(self, *_: object) -> None:
        self._is_waiting.clear()

    def begin(self) -> None:
        """The engine has nothing to do until it says otherwise."""
        self._is_waiting.set()

    def begin_compilation(self) -> None:
        """The calling thread begins to compile something."""
        self._allowance.seconds = _MAX_YIELDS_S

    def yield_to_engine(self) -> None:
        """Return when the engine waits; after 20 ms if it does not, and at once when a compilation has waited for
        100 ms in all."""
        seconds = self._allowance.seconds
        if seconds > 0 and not self._is_waiting.is_set():
            start = time.monotonic()
            self._is_waiting.wait(min(_MAX_YIELD_S, seconds))
            self._allowance.seconds = seconds - (time.monotonic() - start)


class GrammarCompiler:
    """Compiles off the engine's thread. Requests with one constraint share one compilation (single flight) and its
    result, refusals included, while it is among the last used."""

    def __init__(self, make: Callable[[], StructuredOutputBackend], time_limit_s: float) -> None:
        self.stats = CompilationStats()
        self.engine_wait = EngineWait()
        self._time_limit_s = time_limit_s
        self._cache: OrderedDict[bytes, _Job] = OrderedDict()
        self._trim_at = 1  # entries at which it is looked at again, which takes time with each of them
        self._queue: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._backend: Future[StructuredOutputBackend] = Future()
        self._num_lost = 0
        self._running: list[_Job] = []  # which threads compile
        threading.Thread(target=self._load_backend, args=(make,), name="quire-grammar-load", daemon=True).start()
        for _ in range(_NUM_THREADS):
            self._start_thread()

    def get_backend(self) -> StructuredOutputBackend:
        """The backend, once it has read the tokenizer. Raises what it raised."""
        return self._backend.result()

    def submit(self, params: StructuredOutputsParams) -> Future[CompiledGrammar]:
        """Begin to compile, or find the compilation of the same constraint. The future raises
        ``InvalidRequestError`` where the constraint is refused."""
        key = make_cache_key(params)
        job = self._cache.get(key)
        if job is not None:
            self.stats.num_cache_hits += 1
            self._cache.move_to_end(key)
            return job.future
        job = self._cache[key] = _Job(params, Future())
        if len(self._cache) >= self._trim_at:
            self._trim_cache()
            self._trim_at = len(self._cache) + max(len(self._cache) // _TRIM_SHARE, 1)
        if self._num_lost > _MAX_LOST_THREADS:
            job.future.set_exception(InvalidRequestError("compilations of structured outputs hang; see the log"))
        else:
            self._queue.put(job)
        return job.future

    def expire_slow_jobs(self) -> None:
        """Refuse what has been compiling for longer than the limit; another thread takes the place of its own, which
        cannot be ended."""
        now = time.monotonic()
        for job in self._running.copy():
            if job.future.done() or now - job.started_at < self._time_limit_s:
                continue
            message = f"{job.params.kind}: compiling it takes longer than {self._time_limit_s:.0f} s; simplify it"
            if not self._refuse(job, InvalidRequestError(message, "structured_outputs")):
                continue
            job.is_lost = True
            self._num_lost += 1
            _log.error("a %s did not compile in %.0f s; its thread is given up", job.params.kind, self._time_limit_s)
            if self._num_lost <= _MAX_LOST_THREADS:
                self._start_thread()

    def compile_and_wait(self, params: StructuredOutputsParams) -> CompiledGrammar:
        """Compile in the calling thread's time, which is the engine's. Raises ``InvalidRequestError``."""
        self.engine_wait.begin()
        future = self.submit(params)
        while True:
            self.expire_slow_jobs()
            try:
                return future.result(timeout=0.1)
            except TimeoutError:
                if future.done():
                    raise

    def shutdown(self) -> None:
        """Let the threads end."""
        for _ in range(_NUM_THREADS + _MAX_LOST_THREADS):
            self._queue.put(None)

    def _start_thread(self) -> None:
        threading.Thread(target=self._run, name="quire-grammar", daemon=True).start()

    def _load_backend(self, make: Callable[[], StructuredOutputBackend]) -> None:
        try:
            backend = make()
            backend.yield_to_engine = self.engine_wait.yield_to_engine
            backend.prepare_masks()
            self._backend.set_result(backend)
        except BaseException as error:
            self._backend.set_exception(error)

    def _run(self) -> None:
        while (job := self._queue.get()) is not None:
            try:
                backend = self._backend.result()
            except BaseException as error:
                message = f"structured output is not available: {read_error_text(error)}"
                self._refuse(job, InvalidRequestError(message, "structured_outputs"))
                continue
            start = job.started_at = time.monotonic()
            self._running.append(job)
            self.engine_wait.begin_compilation()
            try:
                backend.validate_params(job.params)
                grammar = backend.compile(job.params)
                if not isinstance(grammar, CompiledGrammar):
                    raise TypeError(f"compile returned {type(grammar).__name__}, not a CompiledGrammar")
            except InvalidRequestError as error:
                self._refuse(job, error)
            except BaseException as error:
                name = class_path(backend)
                _log.error("%s: a %s could not be compiled", name, job.params.kind, exc_info=error)
                message = f"{job.params.kind}: compiling it failed in {name}; the engine's log says why"
                self._refuse(job, InvalidRequestError(message, "structured_outputs"))
            else:
                with contextlib.suppress(InvalidStateError):  # it came too late
                    job.future.set_result(grammar)
            self._running.remove(job)
            self.stats.num_compiled += 1
            self.stats.compile_seconds += time.monotonic() - start
            if job.is_lost:
                return  # another thread has taken this one's place

    def _refuse(self, job: _Job, error: Exception) -> bool:
        """Whether the job was not settled before."""
        try:
            job.future.set_exception(error)
        except InvalidStateError:
            return False
        self.stats.num_refused += 1
        return True

    def _trim_cache(self) -> None:
        """Drop what was used longest ago, but nothing that still compiles."""
        total = sum(map(_count_bytes, self._cache.values()))
        for key, job in list(self._cache.items())[:-1]:
            if total <= _CACHE_BYTES:
                return
            if job.future.done():
                total -= _count_bytes(job)
                del self._cache[key]


def make_backend(config: EngineConfig) -> StructuredOutputBackend:
    """The backend that ``config`` names, for its tokenizer."""
    choice = config.plugin("structured_output")
    backend_class = load_target(choice.target, "quire.core.contracts.structured_output:StructuredOutputBackend")
    tokenizer = (
        TokenizerInfo("{}", config.model.vocab_size, ()) if choice.name == "none" else read_tokenizer_info(config)
    )
    backend: StructuredOutputBackend = construct_chosen(choice, backend_class, tokenizer)
    return backend


def read_tokenizer_info(config: EngineConfig) -> TokenizerInfo:
    """The tokens of the model. Raises ``InvalidRequestError`` where nothing can be constrained with them."""
    model = config.model
    path = Path(model.tokenizer_path, "tokenizer.json")
    if not path.is_file():
        raise InvalidRequestError("the model has no tokenizer.json", "structured_outputs")
    text = path.read_text(encoding="utf-8")
    eos_token_ids = dict.fromkeys(token for token in model.eos_token_ids if 0 <= token < model.vocab_size)
    own = _read_own_eos(path.with_name("tokenizer_config.json"), text)
    if own is not None and own < model.vocab_size:
        eos_token_ids[own] = None
    if not eos_token_ids:
        raise InvalidRequestError("the model has no EOS token, so no answer could end", "structured_outputs")
    return TokenizerInfo(text, model.vocab_size, tuple(eos_token_ids))


def make_cache_key(params: StructuredOutputsParams) -> bytes:
    """Equal for equal constraints."""
    return msgspec.msgpack.encode(params)


def _read_own_eos(path: Path, tokenizer_json: str) -> int | None:
    """The id of the EOS token that ``tokenizer_config.json`` names."""
    if not path.is_file():
        return None
    eos = msgspec.json.decode(path.read_bytes()).get("eos_token")
    content = eos.get("content") if isinstance(eos, dict) else eos
    added = msgspec.json.decode(tokenizer_json).get("added_tokens") or ()
    return next((token["id"] for token in added if token["content"] == content), None)


def _count_bytes(job: _Job) -> int:
    if not job.future.done() or job.future.exception() is not None:
        return 1 << 16
    return job.future.result().num_bytes
