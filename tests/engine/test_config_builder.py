"""Settings out of range are refused before anything is loaded."""

from __future__ import annotations

import pytest

from quire.core.engine.args import EngineArgs
from quire.core.engine.config_builder import build_config
from quire.core.errors import ConfigError


@pytest.mark.parametrize("length", [0, -1])
def test_a_queue_that_holds_nothing_is_refused(length: int) -> None:
    with pytest.raises(ConfigError, match=f"max_num_queued_requests must be at least 1, got {length}"):
        build_config(EngineArgs(max_num_queued_requests=length))
