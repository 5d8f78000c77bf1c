"""Control calls: from the API process to the engine core and its workers, with a reply, whatever is sent."""

from __future__ import annotations

import asyncio
import os
import signal
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq
from hypothesis import given
from hypothesis import strategies as st

from quire import LLM, AsyncLLM, SamplingParams
from quire.core.control import ControlMethods
from quire.core.engine.ipc import open_socket, socket_address
from quire.core.engine.process import EngineProcess
from quire.core.errors import ControlCallError, EngineDeadError, InvalidRequestError, PluginError
from quire.sdk import Executor

LONG = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)
EXECUTOR = """
    import sys, threading

    from quire.core.worker.uniproc_executor import UniprocExecutor

    class Extended(UniprocExecutor):
        '''Its worker has more control methods.'''

        def start(self):
            capacity = super().start()
            control = self.worker.control
            for method in (self.echo, self.fail, self.leave, self.give_nonsense, self.block):
                control.add_method(method.__name__, method)
            return capacity

        def echo(self, values: list[int], name: str = "x") -> dict[str, list[int]]:
            return {name: values}

        def fail(self) -> None:
            raise ZeroDivisionError("no reason")

        def leave(self) -> None:
            sys.exit(3)

        def give_nonsense(self) -> object:
            return threading.Lock()

        def block(self, seconds: float) -> str:
            threading.Event().wait(seconds)
            return "late"
"""
BAD_CALLS: list[tuple[str, Any, type[Exception], str]] = [
    ("no_such", {}, InvalidRequestError, "no_such"),
    ("", {}, InvalidRequestError, "control method"),
    ("x" * 10_000, {}, InvalidRequestError, "control method"),
    ("echo", {}, InvalidRequestError, "values"),
    ("echo", {"values": ["a"]}, InvalidRequestError, "echo: Expected `int`"),
    ("echo", {"values": [1.5]}, InvalidRequestError, "echo: Expected `int`"),
    ("echo", {"values": [], "other": 1}, InvalidRequestError, "other"),
    ("echo", {"values": [object()]}, InvalidRequestError, "echo|sent"),
    ("fail", {}, ControlCallError, "fail: ZeroDivisionError: no reason"),
    ("leave", {}, ControlCallError, "leave: SystemExit: 3"),
    ("give_nonsense", {}, ControlCallError, "give_nonsense: TypeError"),
]


@pytest.fixture
def extended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "control_plugin.py").write_text(textwrap.dedent(EXECUTOR))
    monkeypatch.syspath_prepend(str(tmp_path))
    return "control_plugin:Extended"


def test_calls_of_a_service(tiny: Path, llm: LLM, extended: str) -> None:
    expected = llm.generate([[5, 6, 7]], LONG)[0].outputs[0].token_ids

    async def scenario() -> None:
        process = EngineProcess("cpu")
        engine = AsyncLLM(model=str(tiny), max_model_len=256, device="cpu", executor=extended, process=process)
        with pytest.raises(EngineDeadError, match="not started"):
            await engine.call_control("get_stats")
        await engine.start()

        async def generate() -> list[int]:
            outputs = [output async for output in engine.generate([5, 6, 7], LONG)]
            return outputs[-1].outputs[0].token_ids

        request = asyncio.create_task(generate())
        stats = await engine.call_control("get_stats")
        assert stats["kv_blocks"] > 0
        [worker] = await engine.collective_rpc("describe_worker")
        assert worker["rank"] == 0 and worker["pid"] == process.pid and worker["device"] == "cpu"
        assert await engine.collective_rpc("echo", {"values": [1, 2]}) == [{"x": [1, 2]}]
        many = await asyncio.gather(*(engine.collective_rpc("echo", {"values": [i]}) for i in range(50)))
        assert many == [[{"x": [i]}] for i in range(50)], "each caller gets the reply to its own call"
        for method, arguments, error, words in BAD_CALLS:
            with pytest.raises(error, match=words):
                await engine.collective_rpc(method, arguments)
        with pytest.raises(InvalidRequestError, match="cannot be sent"):
            await engine.collective_rpc("echo", {"values": [2**70]})
        with pytest.raises(InvalidRequestError, match="engine core; did you mean get_stats"):
            await engine.call_control("get_stat")

        # a call that is given up replies later, and no caller waits
        with pytest.raises(ControlCallError, match=r"within 0\.05 s"):
            await engine.collective_rpc("block", {"seconds": 0.5}, timeout=0.05)
        assert await engine.collective_rpc("block", {"seconds": 0.0}) == ["late"]

        # messages that cannot be read end nothing
        socket = open_socket(zmq.Context.instance(), zmq.PUSH)
        socket.connect(socket_address(process.folder, "in"))
        for message in (["ControlCall"], ["ControlCall", 10**6, 5, {}], ["ControlCall", "x", "get_stats", []]):
            socket.send(msgspec.msgpack.encode(message))
        socket.close(linger=5000)
        async with asyncio.timeout(60):
            assert await request == expected

        pending = asyncio.create_task(engine.collective_rpc("block", {"seconds": 100.0}, timeout=200.0))
        await asyncio.sleep(0.1)
        os.kill(process.pid, signal.SIGKILL)
        with pytest.raises(EngineDeadError):
            async with asyncio.timeout(30):
                await pending
        await engine.shutdown()

    asyncio.run(scenario())


def test_the_engine_in_this_process_takes_the_same_calls(tiny: Path, extended: str) -> None:
    engine = LLM(model=str(tiny), max_model_len=256, device="cpu", executor=extended)
    try:
        assert engine.call_control("get_stats") == engine.get_stats()
        [worker] = engine.collective_rpc("describe_worker")
        assert worker["pid"] == os.getpid()
        for method, arguments, error, words in BAD_CALLS:
            with pytest.raises(error, match=words):
                engine.collective_rpc(method, arguments)
    finally:
        engine.shutdown()


def test_an_executor_need_not_have_them(llm: LLM) -> None:
    with pytest.raises(InvalidRequestError, match="cannot call methods of its workers"):
        Executor.collective_rpc(llm.engine_core.executor, "describe_worker", {})


@dataclass
class Point:
    x: int
    y: float = 0.5


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@given(st.dictionaries(st.sampled_from(["point", "count", "other"]), PLAIN))
def test_arguments_are_converted_strictly_or_refused(arguments: dict[str, Any]) -> None:
    seen: list[Any] = []
    methods = ControlMethods("core")

    def move(point: Point, count: int = 1) -> Point:
        seen.extend((point, count))
        return point

    methods.add_method("move", move)
    try:
        methods.call_method("move", arguments)
    except InvalidRequestError:
        assert not seen, "what is refused never reaches the method"
    else:
        point, count = seen
        assert isinstance(point, Point) and type(point.x) is int and type(point.y) is float and type(count) is int


def test_results_are_plain_values_and_errors_of_a_user_stay_what_they_are() -> None:
    def refuse() -> None:
        raise PluginError("no such adapter; load it first")

    def scale(point: Point, factor: float) -> Point:
        return Point(point.x, point.y * factor)

    methods = ControlMethods("core")
    functions: list[Callable[..., Any]] = [refuse, scale]
    for function in functions:
        methods.add_method(function.__name__, function)
    assert methods.call_method("scale", {"point": {"x": 1}, "factor": 4}) == {"x": 1, "y": 2.0}
    with pytest.raises(PluginError, match="load it first"):
        methods.call_method("refuse", {})
    assert methods.names == ["refuse", "scale"]
