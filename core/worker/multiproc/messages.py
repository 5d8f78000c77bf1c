"""What the executor and its ranks send each other: msgpack, with the bytes of numpy arrays as they are."""

from __future__ import annotations

from typing import Any, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from quire.core.config import EngineConfig
from quire.core.contracts.executor import KVCapacity
from quire.core.messages import ModelRunnerOutput, SchedulerOutput
from quire.core.worker.worker import MemoryProfile

__all__ = [
    "AllocateKVCache",
    "CallMethod",
    "CallReply",
    "CheckMemory",
    "CompareStep",
    "MemoryChecked",
    "MessageFromRank",
    "MessageToRank",
    "RankCodec",
    "RankLoaded",
    "RankReady",
    "RunStep",
    "SampleTokens",
    "StartFailed",
    "StartRank",
    "StepDone",
    "StepFailed",
    "StepOutcome",
]


# ---- executor -> every rank --------------------------------------------------------------------------------------


class StartRank(msgspec.Struct, tag=True, array_like=True):
    """The first message: load this rank's shard. ``RankLoaded`` follows."""

    config: EngineConfig
    worker_target: str
    """``module:Class`` of the worker."""
    log_level: str
    store_host: str
    store_port: int
    """Where the first rank serves the store by which the ranks find each other."""


class AllocateKVCache(msgspec.Struct, tag=True, array_like=True):
    """Allocate the cache and end the start. ``RankReady`` follows."""

    num_blocks: int


class CheckMemory(msgspec.Struct, tag=True, array_like=True):
    """Say whether a step of so many tokens fits; ``MemoryChecked`` follows."""

    num_tokens: int


class RunStep(msgspec.Struct, tag=True, array_like=True):
    """Launch a step. The output rank answers with ``StepDone``."""

    number: int
    """Counts the steps of this executor: what a rank says of a step has it."""
    step: SchedulerOutput
    stage: Literal["whole", "model"] = "whole"
    """``model``: up to its logits, ``SampleTokens`` follows."""


class SampleTokens(msgspec.Struct, tag=True, array_like=True):
    """Launch the rest of the step. The bits of its masks lie in a block of shared memory, unless they are here."""

    request_indices: NDArray[np.int32] | None = None  # None: no masks
    draft_offsets: NDArray[np.int32] | None = None
    bits: NDArray[np.int32] | None = None
    block: int = 0
    """Number of the block, in the order in which they were allocated."""
    offset: int = 0
    """Of the first mask in the block, in words."""
    num_words: int = 0
    """Of a mask."""


class CallMethod(msgspec.Struct, tag=True, array_like=True):
    """Call a control method of the worker; ``CallReply`` follows."""

    method: str
    arguments: dict[str, Any]


class CompareStep(msgspec.Struct, tag=True, array_like=True):
    """Say how a step ended, once it has; ``StepOutcome`` follows."""

    number: int


MessageToRank = StartRank | AllocateKVCache | CheckMemory | RunStep | SampleTokens | CallMethod | CompareStep


# ---- a rank -> executor ------------------------------------------------------------------------------------------


class RankLoaded(msgspec.Struct, tag=True, array_like=True):
    """The weights are loaded, and memory is measured."""

    profile: MemoryProfile


class RankReady(msgspec.Struct, tag=True, array_like=True):
    """Steps can be run."""

    capacity: KVCapacity
    num_unchecked_tokens: int
    """Steps of at most so many tokens allocate nothing that ``CheckMemory`` would have to look for."""


class StartFailed(msgspec.Struct, tag=True, array_like=True):
    """The rank could not start."""

    error: str
    error_class: str


class MemoryChecked(msgspec.Struct, tag=True, array_like=True):
    """Whether the step fits."""

    fits: bool


class StepDone(msgspec.Struct, tag=True, array_like=True):
    """A step ended. Sent by the output rank; by the others where a plugin was quarantined."""

    number: int
    output: ModelRunnerOutput


class StepFailed(msgspec.Struct, tag=True, array_like=True):
    """A step raised, on a rank that goes on."""

    number: int
    error: str
    """One line: the class and what it says."""
    error_class: str
    error_code: int | None = None
    """``cudaError_t``, where the device raised."""
    plugin: tuple[str, str] | None = None
    """Kind and name of the plugin in which it was raised."""
    traceback: str = ""


class CallReply(msgspec.Struct, tag=True, array_like=True):
    """The end of a call: what the method returned, or why it did not."""

    result: Any = None
    error: str | None = None
    error_class: str = ""


class StepOutcome(msgspec.Struct, tag=True, array_like=True):
    """How a step ended on this rank: empty, or what was out of the ordinary. Equal on all ranks that agree."""

    number: int
    outcome: str


MessageFromRank = RankLoaded | RankReady | StartFailed | MemoryChecked | StepDone | StepFailed | CallReply | StepOutcome


class RankCodec:
    """Encodes messages, and decodes them by direction. Arrays that were decoded can be written to."""

    def __init__(self) -> None:
        self._encoder = msgspec.msgpack.Encoder(enc_hook=_encode_array)
        self._to_rank_decoder = msgspec.msgpack.Decoder(MessageToRank, dec_hook=_decode_array)
        self._from_rank_decoder = msgspec.msgpack.Decoder(MessageFromRank, dec_hook=_decode_array)

    def encode(self, message: MessageToRank | MessageFromRank) -> bytes:
        """Encode any message of this module."""
        return self._encoder.encode(message)

    def decode_to_rank(self, data: bytes | bytearray) -> MessageToRank:
        """Decode a message to a rank."""
        message: MessageToRank = self._to_rank_decoder.decode(data)
        return message

    def decode_from_rank(self, data: bytes) -> MessageFromRank:
        """Decode a message to the executor."""
        message: MessageFromRank = self._from_rank_decoder.decode(data)
        return message


def _encode_array(value: Any) -> tuple[str, tuple[int, ...], memoryview]:
    if not isinstance(value, np.ndarray):
        raise TypeError(f"a rank cannot be sent a {type(value).__name__}")
    flat = np.ascontiguousarray(value).reshape(-1).view(np.uint8)
    return value.dtype.str, value.shape, flat.data


def _decode_array(_type: type, fields: Any) -> NDArray[Any]:
    dtype, shape, data = fields
    array: NDArray[Any] = np.frombuffer(data, dtype).reshape(shape).copy()
    return array
