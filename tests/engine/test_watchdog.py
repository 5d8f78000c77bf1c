"""What does not end is noticed: a plugin's call is interrupted, a step is reported with what it is in."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from quire import LLM, SamplingParams
from quire.core.config import PluginChoice, WatchdogConfig
from quire.core.engine.ipc import EngineHung
from quire.core.engine.watchdog import PluginWatchdog, StepWatchdog
from quire.core.errors import ConfigError
from quire.core.plugin.frames import PluginFrames, describe_error, find_plugin_calls
from quire.core.plugin.quarantine import PluginInterrupt, Quarantine
from quire.core.sample.sampler import GumbelSampler
from quire.core.stats import QuarantinedPlugin
from quire.core.worker.uniproc_executor import UniprocExecutor
from quire.plugins.sched.fcfs import FCFSPolicy
from quire.sdk import Grants, RequestInfo, StepView

GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)


class Endless(FCFSPolicy):
    """Its plan never comes."""

    def schedule(self, view: StepView) -> Grants:
        while True:
            time.sleep(0.01)


class EndlessKey(FCFSPolicy):
    """It never ranks a request, whatever is raised in it."""

    def admission_key(self, request: RequestInfo) -> tuple[int]:
        while True:
            try:
                time.sleep(0.01)
            except Exception:
                continue


class LateOnce(UniprocExecutor):
    """Its first step waits until somebody has seen it."""

    seen = threading.Event()

    def execute_step(self, step: Any) -> Any:
        self.seen.wait(60)
        return super().execute_step(step)


@pytest.mark.parametrize("policy", [Endless, EndlessKey])
def test_a_policy_that_never_returns_is_replaced(
    tiny: Path, llm: LLM, policy: type, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    prompts = [[5, 6, 7], [8, 9]]
    expected = [output.outputs[0].token_ids for output in llm.generate(prompts, GREEDY)]
    engine = LLM(model=str(tiny), device="cpu", max_model_len=256, scheduling_policy=f"{__name__}:{policy.__name__}")
    try:
        answers: list[list[int]] = []

        def generate() -> None:  # not the main thread: no signal reaches it
            answers.extend(output.outputs[0].token_ids for output in engine.generate(prompts, GREEDY))

        thread = threading.Thread(target=generate, daemon=True)
        thread.start()
        thread.join(60)
        assert answers == expected
        assert engine.get_stats()["plugin_quarantines_total"] == 1
        [line] = [record.getMessage() for record in caplog.records if "is quarantined" in record.getMessage()]
        assert f"{policy.__name__} is quarantined (hung)" in line and "; fcfs takes over" in line
        shown = engine.call_control("get_policy")
        assert shown["name"] == "fcfs" and shown["quarantined"] == {
            "name": f"{__name__}:{policy.__name__}",
            "reason": "hung",
        }
    finally:
        engine.shutdown()


def test_a_late_step_is_logged_with_its_stack(tiny: Path, caplog: pytest.LogCaptureFixture) -> None:
    """In the process of a script nothing else can be done."""
    LateOnce.seen.clear()
    executor = f"{__name__}:LateOnce"
    engine = LLM(model=str(tiny), device="cpu", max_model_len=256, executor=executor, step_timeout=0.5)

    class SetWhenLogged(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            LateOnce.seen.set()

    handler = SetWhenLogged(logging.ERROR)
    logging.getLogger("quire.engine").addHandler(handler)
    try:
        [output] = engine.generate([[5, 6, 7]], GREEDY)
        assert len(output.outputs[0].token_ids) == 8
        [text] = [record.getMessage() for record in caplog.records if "the engine hangs" in record.getMessage()]
        assert f"in executor/{executor}" in text.splitlines()[0]
        assert "in execute_step\n    self.seen.wait(60)" in text
    finally:
        logging.getLogger("quire.engine").removeHandler(handler)
        engine.shutdown()


class EndlessSampler(GumbelSampler):
    """It never returns once there is traffic."""

    def sample(self, logits: Any, batch: Any) -> Any:
        while True:
            time.sleep(0.01)


def test_a_sampler_in_the_worker_thread_is_replaced(tiny: Path, llm: LLM, caplog: pytest.LogCaptureFixture) -> None:
    params = SamplingParams(temperature=1, seed=3, n=3, max_tokens=20, ignore_eos=True)
    prompt = list(range(20, 60))
    [expected] = llm.generate([prompt], params)
    sampler = f"{__name__}:EndlessSampler"
    engine = LLM(model=str(tiny), device="cpu", max_model_len=256, sampler=sampler, step_timeout=1.0)
    try:
        for _ in range(2):  # the second time with a prefix from the cache
            [output] = engine.generate([prompt], params)
            assert [o.token_ids for o in output.outputs] == [o.token_ids for o in expected.outputs]
        assert f"sampler/{sampler} is quarantined (hung)" in caplog.text
    finally:
        engine.shutdown()


def test_the_thread_ends_when_nobody_steps(tiny: Path) -> None:
    """And begins again: an engine that is dropped is not kept alive."""
    others = set(threading.enumerate())  # of engines of other tests
    engine = LLM(model=str(tiny), device="cpu", max_model_len=256)
    try:
        for _ in range(2):
            engine.generate([[5, 6, 7]], GREEDY)
            threads = [each for each in set(threading.enumerate()) - others if each.name == "quire-watchdog"]
            assert threads
            for thread in threads:
                thread.join(30)
                assert not thread.is_alive()
    finally:
        engine.shutdown()


# ---- The watchdog alone, over an engine core that does nothing.


class Core(SimpleNamespace):
    """What the watchdog reads of an engine core."""

    def __init__(self, step_timeout_s: float, **plugins: str) -> None:
        choices = {kind: PluginChoice(kind, name, name) for kind, name in plugins.items()}
        config = SimpleNamespace(watchdog=WatchdogConfig(step_timeout_s), plugins=choices)
        super().__init__(config=config, executor=SimpleNamespace(is_compiling=False, is_ending=False))


@pytest.fixture
def reported() -> Iterator[Callable[[EngineHung], None]]:
    """A place for a report: ``wait`` for it."""
    event, reports = threading.Event(), []

    def report(hang: EngineHung) -> None:
        reports.append(hang)
        event.set()

    report.wait, report.reports = event.wait, reports  # type: ignore[attr-defined]
    yield report


def test_steps_that_end_idling_compiling_and_workers_that_end_are_no_hang(reported: Any) -> None:
    core = Core(0.2)
    with StepWatchdog(core, reported) as watchdog:  # type: ignore[arg-type]
        watchdog.is_idle = True
        assert not reported.wait(0.8)
        watchdog.is_idle = False
        core.executor.is_compiling = True
        assert not reported.wait(0.8)
        core.executor.is_compiling, core.executor.is_ending = False, True
        assert not reported.wait(0.8)
        core.executor.is_ending = False
        with watchdog.allow_time("the control call load", 60.0):
            assert not reported.wait(0.8)
        assert reported.wait(30), "and then it is one"
    [hang] = reported.reports
    assert hang.activity == "a step" and hang.plugin_kind is None
    assert hang.describe().startswith("the engine hangs: a step has not ended for ")


def test_a_call_may_take_its_own_time_and_no_longer(reported: Any) -> None:
    with (
        StepWatchdog(Core(0.2), reported) as watchdog,  # type: ignore[arg-type]
        watchdog.allow_time("the control call load", 0.5),
    ):
        assert reported.wait(30)
    assert reported.reports[0].activity == "the control call load"


def spin() -> None:
    while True:
        time.sleep(0.001)


def test_any_guarded_plugin_is_interrupted_at_the_limit_of_the_step(reported: Any) -> None:
    told: list[QuarantinedPlugin] = []
    quarantine = Quarantine("sampler", "mine", told.append)
    with StepWatchdog(Core(0.4), reported):  # type: ignore[arg-type]
        assert quarantine.call(spin) is None
    assert told == [QuarantinedPlugin("sampler", "mine", "hung")]
    assert not reported.reports, "the step went on"
    assert quarantine.call(spin) is None, "and it is not called again"


def test_a_plugin_that_cannot_be_interrupted_is_reported_by_its_name(reported: Any) -> None:
    quarantine = Quarantine("policy", "deaf", lambda plugin: None, hang_limit_s=0.2)
    with StepWatchdog(Core(0.4), reported):  # type: ignore[arg-type]
        assert quarantine.call(reported.wait, 60) is None, "interrupted as soon as Python code runs again"
    [hang] = reported.reports
    assert (hang.plugin_kind, hang.plugin_name) == ("policy", "deaf")


def test_a_guarded_plugin_that_holds_up_an_event_loop_is_interrupted() -> None:
    """Calls in other threads may take their time: they belong to an engine, which watches them itself."""
    told: list[QuarantinedPlugin] = []
    elsewhere = Quarantine("sampler", "slow", told.append)
    done = threading.Event()
    thread = threading.Thread(target=elsewhere.call, args=(done.wait, 60))
    thread.start()
    watchdog = PluginWatchdog(limit_s=0.6)
    try:
        assert Quarantine("tool_parser", "mine", told.append).call(spin) is None
        assert told == [QuarantinedPlugin("tool_parser", "mine", "hung")]
    finally:
        watchdog.stop()
        done.set()
        thread.join()
    assert elsewhere.is_active


# ---- Interrupting a call


def test_no_interrupt_outlives_its_call() -> None:
    """Calls that end just when they are interrupted: the exception is raised inside, or never."""
    interrupted = raised_outside = 0
    ended = threading.Event()
    current: list[Quarantine] = []
    main = threading.get_ident()

    def interrupt() -> None:
        while not ended.is_set():
            for quarantine in current[-1:]:
                quarantine.interrupt_call(quarantine.running_call or 1, main)
            time.sleep(0)

    thread = threading.Thread(target=interrupt)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        thread.start()
        deadline = time.monotonic() + 20
        for i in range(3000):
            quarantine = Quarantine("policy", "mine", lambda plugin: None)
            current[:] = [quarantine]
            try:
                result = quarantine.call(sum, range(i % 300))
                sum(range(200))  # somebody else's code
            except PluginInterrupt:
                raised_outside += 1
                continue
            assert result in (None, sum(range(i % 300)))
            interrupted += not quarantine.is_active
            if time.monotonic() > deadline:
                break
    finally:
        ended.set()
        thread.join()
        sys.setswitchinterval(interval)
    assert not raised_outside
    assert interrupted, "some were"


def test_a_call_that_has_ended_is_not_interrupted() -> None:
    quarantine = Quarantine("policy", "mine", lambda plugin: None)
    seen: list[Any] = []
    quarantine.call(lambda: seen.extend(find_plugin_calls()))
    [(found, number, thread_id)] = [call for call in seen if call.quarantine is quarantine]
    assert found is quarantine and thread_id == threading.get_ident()
    assert not quarantine.interrupt_call(number, thread_id)
    assert quarantine.call(sum, [1, 2]) == 3 and quarantine.is_active


# ---- Names


class Model:
    def forward(self, frames: PluginFrames) -> Any:
        return frames.read_stacks(threading.get_ident())


class Derived(Model):
    pass


def test_the_innermost_plugin_of_a_stack_is_named() -> None:
    choices = {"model": PluginChoice("model", "Mine", f"{__name__}:Model")}
    frames = PluginFrames(SimpleNamespace(plugins=choices))  # type: ignore[arg-type]
    for plugin in (Model(), Derived()):
        [stack, *_] = plugin.forward(frames)
        assert stack.plugin == ("model", "Mine") and "in forward" in stack.text
    quarantine = Quarantine("sampler", "other", lambda plugin: None)
    stacks = quarantine.call(lambda: frames.read_stacks(threading.get_ident()))
    assert stacks is not None and stacks[0].plugin is not None


@pytest.mark.parametrize(("is_bundled", "named"), [(False, "model/Mine raised "), (True, "")])
def test_an_error_at_start_says_whose_it_is(is_bundled: bool, named: str) -> None:
    choices = {"model": PluginChoice("model", "Mine", f"{__name__}:Model", is_bundled=is_bundled)}
    frames = PluginFrames(SimpleNamespace(plugins=choices))  # type: ignore[arg-type]
    with pytest.raises(AttributeError) as raised:
        Model().forward(None)  # type: ignore[arg-type]
    assert describe_error(raised.value, frames).startswith(f"{named}AttributeError: 'NoneType' object")
    assert describe_error(ConfigError("too many"), frames) == "too many"
