"""The timer of kernels, and what it concludes from rounds."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire.server.plugin_bench.timer import compare_rounds, run_alternately


def test_timers_take_turns_in_both_orders():
    order = []
    timers = {name: lambda name=name: order.append(name) or float(len(order)) for name in "ab"}
    seconds = run_alternately(timers, 3)
    assert "".join(order) == "ab" + "ba" + "ab" + "ba" and seconds["a"] == [4.0, 5.0, 8.0]


def test_a_turn_counts_what_is_timed_after_the_other_ones_traces():
    """Calls of a turn take 10 ms; the first of each turn tells ten times as much."""
    last = ""

    def make(name):
        def timer():
            nonlocal last
            time.sleep(0.01)
            last, before = name, last
            return 1.0 if before == name else 10.0

        return timer

    seconds = run_alternately({"a": make("a"), "b": make("b")}, 3, turn_s=0.05)
    assert seconds == {"a": [1.0] * 3, "b": [1.0] * 3}


@given(st.lists(st.floats(0.5, 2.0), min_size=3, max_size=30), st.floats(0.1, 10))
def test_the_interval_holds_the_median_and_knows_a_factor(others, factor):
    ratio = compare_rounds([factor * x for x in others], others)
    assert ratio.low <= ratio.median <= ratio.high
    assert [ratio.low, ratio.median, ratio.high] == pytest.approx([factor] * 3)


def test_the_interval_of_few_rounds_is_their_range():
    ratio = compare_rounds([1.0, 2.0, 3.0, 4.0, 5.0], [1.0] * 5)
    assert (ratio.low, ratio.median, ratio.high) == (1.0, 3.0, 5.0) and ratio.differs is False


def test_the_interval_of_many_rounds_is_that_of_order_statistics():
    """Of 20 values the 6th and 15th: David and Nagaraja, Order Statistics, 2003, table of the median."""
    ratio = compare_rounds([float(i) for i in range(1, 21)], [1.0] * 20)
    assert (ratio.low, ratio.high) == (6.0, 15.0)
