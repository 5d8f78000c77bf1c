"""What the API process and an engine core in a process of its own send each other: msgpack over ZMQ sockets."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import msgspec
import zmq

from quire.core.config import EngineConfig
from quire.core.messages import EngineCoreOutputs, EngineCoreRequest
from quire.core.sampling_params import SamplingParams

__all__ = [
    "AbortRequests",
    "AddRequests",
    "ControlCall",
    "ControlReply",
    "EngineFailed",
    "EngineHung",
    "EngineReady",
    "Heartbeat",
    "MessageCodec",
    "MessageFromCore",
    "MessageToCore",
    "Shutdown",
    "StartEngine",
    "UnreadableRequest",
]


class StartEngine(msgspec.Struct, tag=True):
    """The first message: build this engine."""

    config: EngineConfig
    log_level: str


class AddRequests(msgspec.Struct, tag=True, array_like=True):
    """Requests to queue. Those with a parent in the same message are sent without what they have of it, their prompt
    and all parameters but the seed: with ``n`` of 128 it would be sent, and kept, 128 times."""

    requests: list[EngineCoreRequest]

    @classmethod
    def from_requests(cls, requests: Sequence[EngineCoreRequest]) -> AddRequests:
        """The message of these requests, which stay as they are."""
        parents = {request.request_id: request for request in requests if request.parent_id is None}
        return cls([_reduce_child(request, parents.get(request.parent_id or 0)) for request in requests])

    def restore_children(self) -> list[EngineCoreRequest]:
        """The requests as they were before they were sent; those of one prompt share one list."""
        parents = {request.request_id: request for request in self.requests if request.parent_id is None}
        for request in self.requests:
            parent = parents.get(request.parent_id or 0)
            if parent is not None and not request.prompt_token_ids:
                request.prompt_token_ids = parent.prompt_token_ids
                request.params = _make_child_params(parent.params, request.params.seed)
        return self.requests


def _reduce_child(request: EngineCoreRequest, parent: EngineCoreRequest | None) -> EngineCoreRequest:
    if parent is None or request.prompt_token_ids is not parent.prompt_token_ids:
        return request
    if request is parent or _make_child_params(parent.params, request.params.seed) != request.params:
        return request
    return msgspec.structs.replace(request, prompt_token_ids=[], params=SamplingParams(seed=request.params.seed))


def _make_child_params(params: SamplingParams, seed: int | None) -> SamplingParams:
    """Those of a further continuation. The log-probabilities of a prompt are given with its first one."""
    return msgspec.structs.replace(params, seed=seed, prompt_logprobs=None)


class UnreadableRequest(NamedTuple):
    """A request of ``AddRequests`` with fields that have no meaning, and the reason."""

    request_id: int
    error: str


class AbortRequests(msgspec.Struct, tag=True, array_like=True):
    """Requests to end."""

    request_ids: list[int]


class ControlCall(msgspec.Struct, tag=True, array_like=True):
    """Call a control method of the engine core between two steps; see ``quire.core.control``. A reply follows."""

    call_id: int
    """A number that the API process gives it and never uses again."""
    method: str
    arguments: dict[str, Any]
    timeout: float = 0.0
    """Seconds for which the caller waits: it may take that long without being a hang."""


class Shutdown(msgspec.Struct, tag=True, array_like=True):
    """Stop."""


MessageToCore = AddRequests | AbortRequests | ControlCall | Shutdown


class EngineReady(msgspec.Struct, tag=True, array_like=True):
    """The engine serves. Bytes and counts for the ready line."""

    num_blocks: int
    bytes_per_block: int
    weight_bytes: int
    activation_bytes: int
    graph_bytes: int
    stats: dict[str, float] = {}
    """The first gauges and counters, as ``EngineCoreOutputs.stats`` has them later."""


class EngineFailed(msgspec.Struct, tag=True, array_like=True):
    """The engine could not start, or died."""

    error: str
    error_class: str
    """Name of the ``QuireError`` subclass, or of whatever else was raised."""


class StepOutputs(msgspec.Struct, tag=True, array_like=True):
    """One step's outputs."""

    outputs: EngineCoreOutputs


class ControlReply(msgspec.Struct, tag=True, array_like=True):
    """The end of a control call: what the method returned, or why it did not."""

    call_id: int
    result: Any = None
    error: str | None = None
    error_kind: Literal["invalid", "failed"] = "failed"
    """The call cannot be carried out as asked, or the method failed."""
    error_param: str | None = None
    """The field of what was asked that the error is about."""


class Heartbeat(msgspec.Struct, tag=True, array_like=True):
    """Sent twice a second, by a thread of its own, whatever the engine core is doing."""

    is_compiling: bool = False
    """A compiler may keep all threads from running."""


class EngineHung(msgspec.Struct, tag=True, array_like=True):
    """What the engine core is doing does not end."""

    activity: str
    """``a step``, or a control call."""
    seconds: float
    plugin_kind: str | None = None
    """The plugin that it is in; None: in none, as far as can be seen."""
    plugin_name: str | None = None

    def describe(self) -> str:
        """As a line of a log."""
        where = "" if self.plugin_kind is None else f", in {self.plugin_kind}/{self.plugin_name}"
        return f"the engine hangs: {self.activity} has not ended for {self.seconds:.0f} s{where}"


MessageFromCore = EngineReady | EngineFailed | StepOutputs | ControlReply | Heartbeat | EngineHung


class MessageCodec:
    """Encodes messages to msgpack, and decodes them by direction."""

    def __init__(self) -> None:
        self._encoder = msgspec.msgpack.Encoder()
        self._start_decoder = msgspec.msgpack.Decoder(StartEngine)
        self._to_core_decoder = msgspec.msgpack.Decoder(AddRequests | AbortRequests | ControlCall | Shutdown)
        self._from_core_decoder = msgspec.msgpack.Decoder(
            EngineReady | EngineFailed | StepOutputs | ControlReply | Heartbeat | EngineHung
        )

    def encode(self, message: Any) -> bytes:
        """Encode any message of this module."""
        return self._encoder.encode(message)

    def decode_start(self, data: bytes) -> StartEngine:
        """Decode the first message to the engine core."""
        return self._start_decoder.decode(data)

    def decode_to_core(self, data: bytes) -> MessageToCore:
        """Decode any later message to the engine core."""
        message: MessageToCore = self._to_core_decoder.decode(data)
        return message

    def decode_each_request(self, data: bytes) -> Iterator[EngineCoreRequest | UnreadableRequest]:
        """Each request of a message that ``decode_to_core`` could not decode: those that are sound, and which are not
        and why. Nothing where the message is none of requests."""
        message = msgspec.msgpack.decode(data)
        if not isinstance(message, list) or message[:1] != [AddRequests.__name__]:
            return
        requests = message[-1]
        for fields in requests if isinstance(requests, list) else []:
            try:
                yield msgspec.convert(fields, EngineCoreRequest)
            except Exception as error:
                if isinstance(fields, list) and fields and isinstance(fields[0], int):
                    yield UnreadableRequest(fields[0], str(error))

    def find_call_id(self, data: bytes) -> int | None:
        """The number of a control call that ``decode_to_core`` could not decode; None where the message is none."""
        message = msgspec.msgpack.decode(data)
        is_call = isinstance(message, list) and len(message) > 1 and message[0] == ControlCall.__name__
        return message[1] if is_call and isinstance(message[1], int) else None

    def decode_from_core(self, data: bytes) -> MessageFromCore:
        """Decode a message to the API process."""
        message: MessageFromCore = self._from_core_decoder.decode(data)
        return message


def socket_address(folder: str, name: str) -> str:
    """The address of the socket ``in`` (API process to engine core) or ``out`` (engine core to API process)."""
    return f"ipc://{folder}/{name}"


def open_socket(context: Any, socket_type: int) -> Any:
    """Open a socket whose queue has no limit and that never delays the end of a process."""
    opened = context.socket(socket_type)
    opened.setsockopt(zmq.LINGER, 0)
    opened.setsockopt(zmq.SNDHWM, 0)
    opened.setsockopt(zmq.RCVHWM, 0)
    return opened


def connect_output_socket(context: Any, folder: str) -> Any:
    """A socket of the engine core to the API process, which sends what it has when its process ends."""
    opened = open_socket(context, zmq.PUSH)
    opened.setsockopt(zmq.LINGER, 2000)
    opened.connect(socket_address(folder, "out"))
    return opened
