"""The rank's end of its connection to the executor: through shared memory on one host, over TCP from another."""

from __future__ import annotations

import socket
import threading
from abc import ABC, abstractmethod

import numpy as np
import torch
from numpy.typing import NDArray

from quire.core.worker.multiproc.broadcast_ring import RingReader, SharedMemory
from quire.core.worker.multiproc.frames import (
    FRAME_BYTES,
    MASK_BLOCK,
    MESSAGE_FRAME,
    NEW_RING,
    NEXT_MESSAGE,
    STATUS,
    STATUS_FRAME,
    make_frame,
)
from quire.core.worker.multiproc.rank_launch import RankPlace
from quire.core.worker.multiproc.rank_status import RankStatus

__all__ = ["RankChannel", "open_channel"]


def open_channel(place: RankPlace, connection: socket.socket) -> RankChannel:
    """The channel over ``connection`` that the executor of this rank uses."""
    return RingChannel(place, connection) if place.channel == "ring" else StreamChannel(connection)


class RankChannel(ABC):
    """What a rank is told, and tells. One thread receives; any may send."""

    def __init__(self, connection: socket.socket) -> None:
        self.status = RankStatus()
        """Final from the first message on."""
        self.mask_blocks: list[NDArray[np.int32]] = []
        """Shared memory from which the bits of masks are read, in the order in which it was allocated."""
        self._socket = connection
        self._send_lock = threading.Lock()

    @abstractmethod
    def receive(self) -> bytes | bytearray | None:
        """The next message; None once the executor has closed the connection. Waits without using the processor."""

    def send(self, data: bytes) -> None:
        """Answer the executor."""
        self._send_frame(MESSAGE_FRAME, data)

    def publish_status(self) -> None:
        """Let the executor know ``status``; called now and then."""

    def _send_frame(self, kind: bytes, data: bytes) -> None:
        with self._send_lock:
            self._socket.sendall(make_frame(kind, data))


class RingChannel(RankChannel):
    """Messages come through a ring in shared memory, and the status lies in shared memory."""

    def __init__(self, place: RankPlace, connection: socket.socket) -> None:
        super().__init__(connection)
        self._rank, self._size = place.rank, place.size
        self._ring: RingReader | None = None

    def receive(self) -> bytes | None:
        """The next message, with what is sent beside messages taken."""
        while True:
            kind, fds, _, _ = socket.recv_fds(self._socket, 1, 1)
            if not kind:
                return None
            if kind == NEXT_MESSAGE:
                assert self._ring is not None
                return self._ring.read()
            memory = SharedMemory(fds[0])
            memory.close()  # the mapping is enough
            if kind == NEW_RING:
                self._ring = RingReader(memory, self._size, self._rank)
            elif kind == STATUS:
                values: NDArray[np.int64] = np.frombuffer(memory.map, np.int64)
                self.status = RankStatus(values.reshape(self._size, -1)[self._rank])
            elif kind == MASK_BLOCK:
                self.mask_blocks.append(_pin(np.frombuffer(memory.map, np.int32)))


class StreamChannel(RankChannel):
    """Messages come whole. The status is sent when it has changed."""

    def __init__(self, connection: socket.socket) -> None:
        super().__init__(connection)
        self._published = b""

    def receive(self) -> bytearray | None:
        """The next message. A connection that breaks is a connection that was closed."""
        length = self._receive_exactly(FRAME_BYTES)
        return None if length is None else self._receive_exactly(int.from_bytes(length, "little"))

    def publish_status(self) -> None:
        """Send the status, if it has changed."""
        values = self.status.values.tobytes()
        if values != self._published:
            self._published = values
            self._send_frame(STATUS_FRAME, values)

    def _receive_exactly(self, num_bytes: int) -> bytearray | None:
        data = bytearray(num_bytes)
        view, num_received = memoryview(data), 0
        while num_received < num_bytes:
            try:
                count = self._socket.recv_into(view[num_received:])
            except OSError:  # the other host does not answer any more
                return None
            if not count:
                return None
            num_received += count
        return data


def _pin(block: NDArray[np.int32]) -> NDArray[np.int32]:
    """Page-lock shared memory where there is a GPU, so that copies from it do not wait. Without, they do."""
    if torch.cuda.is_initialized():
        torch.cuda.cudart().cudaHostRegister(block.ctypes.data, block.nbytes, 0)
    return block
