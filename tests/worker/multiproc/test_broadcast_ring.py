"""Messages in shared memory: in order, whole, to every reader, and never over one that is not read."""

from __future__ import annotations

import os
from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.core.errors import ConfigError
from quire.core.worker.multiproc.broadcast_ring import RingReader, RingWriter, SharedMemory

STEPS = st.lists(st.one_of(st.binary(max_size=90), st.sampled_from([0, 1])), max_size=80)


@settings(max_examples=60)
@given(STEPS)
def test_every_reader_gets_every_message_in_order(steps: list[bytes | int]) -> None:
    """``steps``: a message to write, or the number of a reader that reads one."""
    writer = RingWriter(256, 2)
    readers = [RingReader(SharedMemory(os.dup(writer.memory.fd)), 2, reader) for reader in range(2)]
    unread: list[deque[bytes]] = [deque(), deque()]
    refused = 0
    for step in steps:
        if isinstance(step, bytes):
            if writer.try_write(step):
                for queue in unread:
                    queue.append(step)
            else:
                refused += 1
                assert sum(16 + len(data) for data in max(unread, key=len)) + len(step) > 64, "there was room"
        elif unread[step]:
            assert readers[step].read() == unread[step].popleft()
    for reader, queue in zip(readers, unread, strict=True):
        while queue:
            assert reader.read() == queue.popleft()
    assert writer.try_write(b"x" * 60) and [reader.read() for reader in readers] == [b"x" * 60] * 2
    for memory in (writer.memory, *(reader.memory for reader in readers)):
        memory.close()


def test_a_message_larger_than_the_ring_is_refused() -> None:
    writer = RingWriter(256, 1)
    assert not writer.try_write(b"x" * 256)
    writer.memory.close()


def test_memory_that_is_not_there_is_said_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with pytest.raises(ConfigError, match=r"^the masks need 4 KiB of shared memory: No space left on device; free"):
        SharedMemory.allocate(4096, "masks")
