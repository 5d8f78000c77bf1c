"""A plugin is not called any more after its first fault, one line says why, and its owner is told once."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from quire.core.contracts.kv import KVGroup
from quire.core.control import ControlMethods
from quire.core.plugin.options import parse_options
from quire.core.plugin.quarantine import PluginInterrupt, Quarantine, read_error_text
from quire.core.plugin.target import construct_plugin
from quire.core.sched.kv_guard import GuardedAllocator
from quire.core.stats import QuarantinedPlugin
from quire.plugins.kv.paged import PagedAllocator
from quire.server.cli.main import main


def divide(a: int, b: int) -> float:
    return a / b


def test_calls_go_through_until_the_first_fault(caplog: pytest.LogCaptureFixture) -> None:
    told: list[QuarantinedPlugin] = []
    quarantine = Quarantine("policy", "mine", told.append, replacement="fcfs")
    assert quarantine.call(divide, 6, 3) == 2 and quarantine.is_active
    assert quarantine.call(divide, 1, 0) is None and not quarantine.is_active
    assert quarantine.call(divide, 6, 3) is None
    quarantine.switch_off("no_progress", "again")
    assert told == [QuarantinedPlugin("policy", "mine", "raised")]
    (record,) = caplog.records
    assert record.getMessage() == (
        "policy/mine is quarantined (raised): divide raised ZeroDivisionError: division by zero; fcfs takes over"
    )
    assert record.exc_info is not None


def test_sigterm_is_no_fault_of_the_plugin_in_whose_code_it_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    previous = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(sys, "argv", ["quire"])
    quarantine = Quarantine("policy", "mine", lambda plugin: None)
    try:
        assert main() == 0  # every command ends in order on SIGTERM
        with pytest.raises(KeyboardInterrupt):
            quarantine.call(signal.raise_signal, signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, previous)
    assert quarantine.is_active


def test_only_slow_calls_in_a_row_count() -> None:
    told: list[QuarantinedPlugin] = []
    quarantine = Quarantine("policy", "mine", told.append, time_limit_s=0.05, max_slow_calls=2)
    for seconds in (0.07, 0, 0.07):
        quarantine.call_timed(time.sleep, seconds)
    assert quarantine.is_active
    quarantine.call_timed(time.sleep, 0.07)
    assert told == [QuarantinedPlugin("policy", "mine", "too_slow")]


def test_what_is_not_the_plugins_fault_is_raised() -> None:
    quarantine = Quarantine("spec_decode", "mine", lambda plugin: None, not_faults=(ZeroDivisionError,))
    with pytest.raises(ZeroDivisionError):
        quarantine.call(divide, 1, 0)
    assert quarantine.is_active


def test_an_interrupt_that_the_plugin_swallows_leaves_nothing_behind() -> None:
    """With Python 3.11 functions that are traced, as under coverage, would never begin again."""
    told: list[QuarantinedPlugin] = []
    quarantine = Quarantine("policy", "mine", told.append)

    def swallow() -> str:
        try:
            quarantine.interrupt_call(quarantine.running_call, threading.get_ident())
            while True:
                time.sleep(0)
        except PluginInterrupt:
            return "swallowed"

    traced: list[str] = []
    before = sys.gettrace()
    sys.settrace(lambda frame, event, argument: traced.append(frame.f_code.co_name))
    try:
        result = quarantine.call(swallow)
        quotient = quarantine.call(divide, 6, 3)
    finally:
        sys.settrace(before)
    assert (result, quotient, told) == ("swallowed", 2, [])
    assert "divide" in traced


def test_an_error_whose_text_never_comes_is_interrupted() -> None:
    told: list[QuarantinedPlugin] = []
    quarantine = Quarantine("policy", "mine", told.append)

    class EndlessError(Exception):
        def __str__(self) -> str:
            call = quarantine.running_call
            assert call and quarantine.interrupt_call(call, threading.get_ident())
            while True:
                time.sleep(0)

    def raise_error() -> None:
        raise EndlessError

    assert quarantine.call(raise_error) is None and not quarantine.running_call
    assert told == [QuarantinedPlugin("policy", "mine", "hung")]


def count_cached_tokens(interrupt: Callable[..., Any], told: list[QuarantinedPlugin]) -> object:
    class Slow(PagedAllocator):
        count_cached_tokens = interrupt

    groups = [KVGroup()]
    guard = GuardedAllocator(Slow(groups, 10, 4), "slow", lambda: PagedAllocator(groups, 10, 4), told.append)
    return guard.count_cached_tokens([])


def make_options(interrupt: Callable[..., Any], told: list[QuarantinedPlugin]) -> object:
    class Slow:
        @dataclass(frozen=True)
        class Options:
            __post_init__ = interrupt

    return parse_options(Slow, {})


def construct_operation(interrupt: Callable[..., Any], told: list[QuarantinedPlugin]) -> object:
    return construct_plugin("op/slow", interrupt)


def read_error(interrupt: Callable[..., Any], told: list[QuarantinedPlugin]) -> object:
    return read_error_text(type("SlowError", (Exception,), {"__str__": interrupt})())


def call_control_method(interrupt: Callable[..., Any], told: list[QuarantinedPlugin]) -> object:
    methods = ControlMethods("worker")
    methods.add_method("slow", lambda: interrupt())
    return methods.call_method("slow", {})


@pytest.mark.parametrize(
    "call",
    [count_cached_tokens, make_options, construct_operation, read_error, call_control_method],
    ids=lambda call: call.__name__,
)
def test_an_interrupt_ends_the_call_for_which_it_is_meant(
    call: Callable[[Callable[..., Any], list[QuarantinedPlugin]], object],
) -> None:
    """Whatever other code of plugins runs within, and is guarded itself."""
    told: list[QuarantinedPlugin] = []
    quarantine = Quarantine("policy", "mine", told.append)

    def interrupt(*_: object) -> None:
        quarantine.interrupt_call(quarantine.running_call, threading.get_ident())
        while True:
            time.sleep(0)

    assert quarantine.call(call, interrupt, told) is None
    assert told == [QuarantinedPlugin("policy", "mine", "hung")]
