"""The control methods of the scheduling policy: which it is, another one, and why requests waited."""

from __future__ import annotations

import logging
from typing import Any

from quire.core.config import PluginChoice
from quire.core.contracts.policy import BatchingPolicy
from quire.core.control import ControlMethods
from quire.core.errors import PluginError
from quire.core.plugin.options import make_refusal, parse_options
from quire.core.plugin.quarantine import NEVER_CONTAINED
from quire.core.plugin.target import load_target, resolve_file
from quire.core.sched.policy_runner import PolicyRunner
from quire.core.traces.recorder import TraceRecorder

__all__ = ["PolicyControl", "make_policy"]

_log = logging.getLogger("quire.engine")


class PolicyControl:
    """Serves the control methods ``get_policy``, ``set_policy`` and ``explain_requests`` of an engine core."""

    def __init__(self, runner: PolicyRunner, choice: PluginChoice, recorder: TraceRecorder | None) -> None:
        self._runner = runner
        self._choice = choice
        self._recorder = recorder
        self._num_switches = 0

    def add_methods(self, control: ControlMethods) -> None:
        """Let them be called."""
        control.add_method("get_policy", self.get_policy)
        control.add_method("set_policy", self.set_policy)
        control.add_method("explain_requests", self.explain_requests)

    def get_policy(self) -> dict[str, Any]:
        """The scheduling policy that is asked: its name, and the options that it was given. ``quarantined``: the policy
        in whose place it is asked, and why, or None."""
        guard = self._runner.guard
        quarantined = guard.quarantined and {"name": guard.quarantined.name, "reason": guard.quarantined.reason}
        return {
            "name": guard.name,
            "options": {} if quarantined else dict(self._choice.options),
            "num_switches": self._num_switches,
            "quarantined": quarantined,
        }

    def set_policy(self, name: str, target: str, options: dict[str, str]) -> dict[str, Any]:
        """Ask another scheduling policy (``module:Class`` or ``FILE.py:Class``) from the next step on; what
        ``get_policy`` returns then. No request is dropped. Raises ``PluginError``, and changes nothing, if it cannot be
        made."""
        target = resolve_file(target, anew=True) if ".py:" in target else target
        choice = PluginChoice("policy", name, target, options)
        policy = make_policy(choice)
        before = self._runner.guard.name
        self._runner.replace_policy(policy, name)
        self._choice = choice
        self._num_switches += 1
        if self._recorder is not None:
            self._recorder.record_policy(name, target, options)
        given = ", ".join(f"{key}={value}" for key, value in options.items()) or "the defaults"
        _log.info("the scheduling policy is %s with %s, in place of %s", name, given, before)
        return self.get_policy()

    def explain_requests(self, request_id: str) -> list[dict[str, Any]]:
        """Why the requests of a caller's id waited, of those that are remembered: see ``RequestLog``."""
        return self._runner.explain_requests(request_id)


def make_policy(choice: PluginChoice) -> BatchingPolicy:
    """A policy with the options that were chosen. Raises ``PluginError``."""
    cls = load_target(choice.target, "quire.core.contracts.policy:BatchingPolicy")
    options = parse_options(cls, choice.options)
    try:
        policy: BatchingPolicy = cls(options)
    except (*NEVER_CONTAINED, PluginError):
        raise
    except BaseException as error:
        raise make_refusal(cls, choice.options, error) from error
    return policy
