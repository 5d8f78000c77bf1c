"""Nothing that a caller or a plugin hands to the engine ends it: the caller gets an error, the others their tokens."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import zmq

from quire import LLM, AsyncLLM, SamplingParams
from quire.core.engine.detokenizer import Detokenizer
from quire.core.engine.input_processor import InputProcessor
from quire.core.engine.ipc import open_socket, socket_address
from quire.core.engine.process import EngineProcess
from quire.core.errors import InvalidRequestError, RequestFailedError
from quire.core.messages import EngineCoreRequest

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
LONG = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)

BAD_PARAMS: list[dict[str, Any]] = [
    *({"max_tokens": bad} for bad in (5.0, "5", True, 2**63, [5])),
    *({"n": bad} for bad in (1.0, None, False)),
    *({"top_k": bad} for bad in (2.5, 2**31, -2)),
    *({"temperature": bad} for bad in ("1", None, True, float("nan"), 1j, 10**400)),
    *({"seed": bad} for bad in (1.0, 2**63, "s")),
    *({"ignore_eos": bad} for bad in (1, "yes", None)),
    *({"logprobs": bad} for bad in (1.0, True, 21)),
    *({"stop": bad} for bad in ([5], 7, [""], {"a": 1}, ["\ud800"], ["x"] * 65, "x" * 4097)),
    *({"stop_token_ids": bad} for bad in ([5.0], [True], 5, "5", [2**63], [1] * 4097)),
    *({"logit_bias": bad} for bad in ({"a": 1.0}, {1: "1"}, [1], {1: 101}, dict.fromkeys(range(4097), 1))),
    *({"extra_args": bad} for bad in ([1], {1: 2}, {"a": object()}, {"a": 2**64}, {"a": "x" * 70_000})),
]


@pytest.mark.parametrize("fields", BAD_PARAMS, ids=lambda fields: str(fields)[:40])
def test_parameters_of_a_wrong_type_or_size_are_refused_by_name(fields: dict[str, Any]) -> None:
    (name,) = fields
    with pytest.raises(InvalidRequestError, match=name) as caught:
        SamplingParams(**fields)
    assert caught.value.param == name and len(str(caught.value)) < 300


def test_numbers_of_numpy_are_numbers() -> None:
    params = SamplingParams(
        max_tokens=np.int64(5), temperature=np.float32(0.5), stop_token_ids=(np.int32(3),), logit_bias={np.int64(2): 1}
    )
    plain = SamplingParams(max_tokens=5, temperature=0.5, stop_token_ids=[3], logit_bias={2: 1.0})
    assert params == plain and msgspec.msgpack.encode(params) == msgspec.msgpack.encode(plain)


def test_what_a_caller_changes_later_reaches_nobody(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=4, stop=["never"])
    (request,) = llm.input_processor.process_inputs("r", [5, 6], params)
    params.stop.append(5)  # type: ignore[arg-type]
    assert request.params.stop == ["never"]
    with pytest.raises(InvalidRequestError, match="stop"):
        llm.input_processor.process_inputs("r", [5, 6], params)


BAD_OPTIONS: list[dict[str, Any]] = [
    {"cache_salt": 7},
    {"cache_salt": "\ud800"},
    {"cache_salt": "x" * 600},
    {"priority": 1.5},
    {"priority": 2**63},
    {"priority": None},
    {"request_id": 5},
    {"request_id": ["r"]},
    {"request_id": "\udfff"},
    {"request_id": "x" * 600},
    {"stream": "words"},
    {"params": {"max_tokens": 5}},
    {"params": None},
    {"prompt": 5},
    {"prompt": [5.0]},
    {"prompt": [True]},
    {"prompt": ["a"]},
    {"prompt": b"text"},
    {"prompt": None},
    {"prompt": [2**70]},
]


BAD_FIELDS: list[dict[str, Any]] = [
    {"priority": 1.5},
    {"priority": 2**63},
    {"cache_salt": 7},
    {"parent_id": "the first"},
    {"eos_token_ids": None},
]


def test_the_engine_outlives_its_callers(tiny: Path, llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = llm.generate([[5, 6, 7]], LONG)[0].outputs[0].token_ids

    async def run(engine: AsyncLLM, prompt: Any = (5, 6, 7), params: Any = GREEDY, **options: Any) -> list[int]:
        outputs = [output async for output in engine.generate(prompt, params, **options)]
        return outputs[-1].outputs[0].token_ids

    process_inputs = InputProcessor.process_inputs

    async def scenario() -> None:
        process = EngineProcess("cpu")
        engine = AsyncLLM(model=str(tiny), max_model_len=256, device="cpu", process=process)
        await engine.start()
        other = asyncio.create_task(run(engine, params=LONG))
        for options in BAD_OPTIONS:
            with pytest.raises(InvalidRequestError):
                await asyncio.wait_for(run(engine, **options), 20)
        assert await run(engine, np.array([5, 6, 7])) == expected[:12]

        # fields that only the engine core sees are refused there
        for fields in BAD_FIELDS:

            def replace_fields(*args: Any, fields: dict[str, Any] = fields, **options: Any) -> list[EngineCoreRequest]:
                return [msgspec.structs.replace(r, **fields) for r in process_inputs(*args, **options)]

            with monkeypatch.context() as patch:
                patch.setattr(InputProcessor, "process_inputs", replace_fields)
                with pytest.raises((InvalidRequestError, RequestFailedError)):
                    await asyncio.wait_for(run(engine), 20)

        # messages without a meaning are passed over
        socket = open_socket(zmq.Context.instance(), zmq.PUSH)
        socket.connect(socket_address(process.folder, "in"))
        for message in (None, 5, ["AddRequests", 7], ["AddRequests", [[10**9], 5]], ["AbortRequests", ["a"]], ["No"]):
            socket.send(msgspec.msgpack.encode(message))
        socket.send(b"no msgpack")
        socket.close(linger=5000)
        assert await asyncio.wait_for(other, 30) == expected

        # a text that cannot be made ends one request
        def fail(*_: object) -> str:
            raise RuntimeError("no text")

        with monkeypatch.context() as patch:
            patch.setattr(Detokenizer, "append_tokens", fail)
            with pytest.raises(RequestFailedError, match="could not be processed"):
                await asyncio.wait_for(run(engine), 20)
        assert await run(engine) == expected[:12]
        assert not engine.is_dead
        await engine.shutdown()

    asyncio.run(scenario())
