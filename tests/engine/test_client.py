"""What the API process hears of the engine core: its ready line, and every message."""

import asyncio
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import zmq

from quire.core.contracts.executor import KVCapacity
from quire.core.contracts.kv import KVGroup
from quire.core.engine.args import EngineArgs
from quire.core.engine.client import EngineCoreClient, format_ready_line
from quire.core.engine.config_builder import build_config
from quire.core.engine.ipc import MessageCodec, StepOutputs, open_socket, socket_address
from quire.core.messages import EngineCoreOutputs


def test_everything_is_named() -> None:
    config = build_config(EngineArgs(max_model_len=1000)).config
    capacity = KVCapacity((KVGroup(),), 1001, 1 << 20, 3 << 30, 5 << 20, 7 << 20)
    line = format_ready_line(config, capacity)
    assert "weights 3.00 GiB, activations 5.0 MiB, graphs 7.0 MiB, KV cache 1001.0 MiB = 16,000 tokens" in line
    assert line.endswith("16.0 requests of 1,000 tokens at once")


def test_no_message_is_lost_where_the_event_loop_is_late(tmp_path: Path) -> None:
    """The loop wakes to a message and to the end of the wait for it at the same instant."""

    async def scenario() -> list[int]:
        process: Any = SimpleNamespace(folder=str(tmp_path), exit_status=None, kill=lambda: None)
        client = EngineCoreClient(process)
        core = open_socket(zmq.Context.instance(), zmq.PUSH)
        core.connect(socket_address(str(tmp_path), "out"))
        received: list[int] = []

        async def receive() -> None:
            while True:
                received.extend((await client.get_outputs()).request_ids)

        receiver = asyncio.create_task(receive())
        for number in range(3):
            await asyncio.sleep(0.5)  # into the wait, which is of a second
            core.send(MessageCodec().encode(StepOutputs(EngineCoreOutputs(request_ids=[number]))))
            time.sleep(1.2)
        async with asyncio.timeout(10):
            while len(received) < 3:
                await asyncio.sleep(0.05)
        receiver.cancel()
        client.kill()
        core.close(linger=0)
        return received

    assert asyncio.run(scenario()) == [0, 1, 2]
