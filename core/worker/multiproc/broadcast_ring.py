"""A ring of messages in shared memory: written once, read by every rank.

The memory has no name (``memfd_create``): processes are given its descriptor. So nothing is left in ``/dev/shm``,
however they end, and its size is no limit. That a message was written, readers are told by other means, which also
order the memory between processors, and on which they wait.
"""

from __future__ import annotations

import mmap
import os

import numpy as np
from numpy.typing import NDArray

from quire.core.errors import ConfigError

__all__ = ["RingReader", "RingWriter", "SharedMemory"]

_LENGTH_BYTES = 8
_WRAP = (1 << 64) - 1
"""In place of a length: the next message is at the beginning."""


class SharedMemory:
    """Memory that is shared with the processes that are given its descriptor, and ends with the last of them."""

    def __init__(self, fd: int) -> None:
        """Map the memory of ``fd``, which stays open until ``close``."""
        self.fd = fd
        self.map = mmap.mmap(fd, os.fstat(fd).st_size)

    @classmethod
    def allocate(cls, num_bytes: int, purpose: str) -> SharedMemory:
        """New memory, all zero. Raises ``ConfigError`` where there is none left."""
        fd = -1
        try:
            fd = os.memfd_create(f"quire-{purpose}", os.MFD_CLOEXEC)
            # Reserves the pages: a process that touches memory that is not there would be killed.
            os.posix_fallocate(fd, 0, num_bytes)
            return cls(fd)
        except OSError as error:
            if fd >= 0:
                os.close(fd)
            raise ConfigError(
                f"the {purpose} need {num_bytes >> 10} KiB of shared memory: {os.strerror(error.errno or 0)}; free "
                "memory of this host, or raise the limit of its container"
            ) from None

    def close(self) -> None:
        """Close the descriptor. The mapping stays while arrays view it."""
        if self.fd >= 0:
            os.close(self.fd)
        self.fd = -1


class _Ring:
    """Positions count bytes from the beginning of time; each reader's is at the front of the memory."""

    def __init__(self, memory: SharedMemory, num_readers: int) -> None:
        self.memory = memory
        self._read_positions: NDArray[np.uint64] = np.frombuffer(memory.map, np.uint64, num_readers)
        self._start = -(-8 * num_readers // 64) * 64
        self.capacity = (len(memory.map) - self._start) // _LENGTH_BYTES * _LENGTH_BYTES
        self._position = 0

    def _skip_to_beginning(self) -> None:
        self._position += self.capacity - self._position % self.capacity


class RingWriter(_Ring):
    """The one writer. Never waits: what does not fit is the caller's to put elsewhere."""

    def __init__(self, num_bytes: int, num_readers: int) -> None:
        super().__init__(SharedMemory.allocate(num_bytes, "messages to workers"), num_readers)

    def try_write(self, data: bytes) -> bool:
        """Write a message, if there is room beside those that a reader has not read."""
        size = _LENGTH_BYTES + -(-len(data) // _LENGTH_BYTES) * _LENGTH_BYTES
        offset = self._position % self.capacity
        skipped = self.capacity - offset if offset + size > self.capacity else 0
        if self._position + skipped + size - int(self._read_positions.min()) > self.capacity:
            return False
        if skipped:
            self._write_length(offset, _WRAP)
            self._skip_to_beginning()
            offset = 0
        begin = self._start + offset + _LENGTH_BYTES
        self.memory.map[begin : begin + len(data)] = data
        self._write_length(offset, len(data))
        self._position += size
        return True

    def _write_length(self, offset: int, length: int) -> None:
        begin = self._start + offset
        self.memory.map[begin : begin + _LENGTH_BYTES] = length.to_bytes(_LENGTH_BYTES, "little")


class RingReader(_Ring):
    """One of the readers."""

    def __init__(self, memory: SharedMemory, num_readers: int, reader: int) -> None:
        super().__init__(memory, num_readers)
        self._reader = reader

    def read(self) -> bytes:
        """The next message, which has been written."""
        length = self._read_length()
        if length == _WRAP:
            self._skip_to_beginning()
            length = self._read_length()
        begin = self._start + self._position % self.capacity + _LENGTH_BYTES
        data = self.memory.map[begin : begin + length]
        self._position += _LENGTH_BYTES + -(-length // _LENGTH_BYTES) * _LENGTH_BYTES
        self._read_positions[self._reader] = self._position
        return data

    def _read_length(self) -> int:
        begin = self._start + self._position % self.capacity
        return int.from_bytes(self.memory.map[begin : begin + _LENGTH_BYTES], "little")
