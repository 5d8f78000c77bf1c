"""What crosses the links between GPUs: whole lines, and flags that order them."""

from __future__ import annotations

import re

import pytest
from tests.aot.cases_all_reduce import ALL_REDUCE
from tests.aot.compile import compile_launch, launches_of

pytestmark = pytest.mark.aot


@pytest.mark.parametrize("name", ["all-reduce-norm", "all-reduce-two-shot", "all-reduce-sent"])
def test_peers_are_written_16_bytes_at_a_time(name: str) -> None:
    """Addresses come from memory, so Triton cannot know their alignment by itself: narrow stores cost eight times as
    many packets. Flags are set with release and read with acquire, at the scope of the system."""
    (launch,) = launches_of(ALL_REDUCE[name], 90)
    ptx = compile_launch(launch, 90).ptx
    assert "st.global.v4.b32" in ptx and "ld.global.cg.v4.b32" in ptx
    assert not re.search(r"(st|ld)\.global[.\w]*\.b16", ptx)
    assert "sys.release" in ptx and "sys.acquire" in ptx


def test_marked_rows_are_whole_words_without_flags() -> None:
    """Eight bytes are written at once, so that the mark is there if the numbers are; nothing waits for a fence."""
    (launch,) = launches_of(ALL_REDUCE["all-reduce-marked-norm"], 90)
    ptx = compile_launch(launch, 90).ptx
    assert "st.global.v2.b64" in ptx and "ld.volatile.global.v2.b64" in ptx
    assert "sys.release" not in ptx and "fence" not in ptx and "membar" not in ptx
