"""Frames: how messages follow each other in a stream of bytes. Four bytes of length, and what has that length. Where
memory is shared, one byte says what is to be found there."""

from __future__ import annotations

__all__ = [
    "FRAME_BYTES",
    "MASK_BLOCK",
    "MESSAGE_FRAME",
    "NEW_RING",
    "NEXT_MESSAGE",
    "STATUS",
    "STATUS_FRAME",
    "make_frame",
    "take_frames",
]

FRAME_BYTES = 4
"""Of the length before each frame."""
MESSAGE_FRAME, STATUS_FRAME = b".", b"s"
"""The first byte of a frame that a rank sends: an encoded message, or the values of its status."""
NEXT_MESSAGE, NEW_RING, MASK_BLOCK, STATUS = b".", b"r", b"m", b"s"
"""What a rank is sent over its socket where memory is shared: that a message is in the ring, or a descriptor."""


def make_frame(kind: bytes, data: bytes) -> bytes:
    """A frame of ``kind`` and ``data``; the frames that an executor sends have no kind."""
    return (len(kind) + len(data)).to_bytes(FRAME_BYTES, "little") + kind + data


def take_frames(received: bytearray) -> list[bytes]:
    """Remove the whole frames at the beginning of what has been received, and return them without their lengths."""
    frames = []
    while len(received) >= FRAME_BYTES:
        end = FRAME_BYTES + int.from_bytes(received[:FRAME_BYTES], "little")
        if len(received) < end:
            break
        frames.append(bytes(received[FRAME_BYTES:end]))
        del received[:end]
    return frames
