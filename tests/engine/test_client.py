"""The ready line adds up: every part of the memory is named, and what it allows."""

from quire.core.contracts.executor import KVCapacity
from quire.core.contracts.kv import KVGroup
from quire.core.engine.args import EngineArgs
from quire.core.engine.client import format_ready_line
from quire.core.engine.config_builder import build_config


def test_everything_is_named() -> None:
    config = build_config(EngineArgs(max_model_len=1000)).config
    capacity = KVCapacity((KVGroup(),), 1001, 1 << 20, 3 << 30, 5 << 20, 7 << 20)
    line = format_ready_line(config, capacity)
    assert "weights 3.00 GiB, activations 5.0 MiB, graphs 7.0 MiB, KV cache 1001.0 MiB = 16,000 tokens" in line
    assert line.endswith("16.0 requests of 1,000 tokens at once")
