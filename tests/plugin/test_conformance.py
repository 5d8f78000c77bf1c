import pytest

from quire.core.testing.conformance import checks_for, find_kind, parametrize_with_checks, run_checks
from quire.sdk import BatchingPolicy, Operations, PluginError


class Patient(BatchingPolicy):
    """By arrival."""

    def admission_key(self, request):
        return (request.arrival_ns,)


class Undocumented(Patient):
    shared = {}

    def request_finished(self, request):
        pass


@parametrize_with_checks(Patient)
def test_a_good_class_passes(check):
    check()


@parametrize_with_checks(
    Undocumented,
    expected_failures={
        "check_says_what_it_is": "it has no docstring",
        "check_has_no_shared_mutable_state": "it shares a dict",
        "check_signatures_accept_the_engines_calls": "finished lacks an argument",
        **dict.fromkeys(
            ("check_requests_finish", "check_preempted_requests_finish", "check_request_finished_accepts_any_request"),
            "finished cannot take the engine's call",
        ),
    },
)
def test_declared_failures_are_expected(check):
    check()


def test_results_say_what_failed_and_why():
    failed = {r.name: r.reason for r in run_checks(Undocumented) if r.outcome == "failed"}
    assert "finished" in failed["check_signatures_accept_the_engines_calls"]
    assert "shared is shared" in failed["check_has_no_shared_mutable_state"]


class Falls(Operations):
    """Fails in a function beside the class."""

    @classmethod
    def unsupported(cls, device):
        return []

    def silu_and_mul(self, gate_up, output_format):
        return divide_by(0)


def divide_by(number):
    return 1 // number


def test_a_check_that_fails_names_the_line_of_the_plugin():
    failed = {r.name: r.reason for r in run_checks(Falls) if r.outcome == "failed"}
    reason, line = failed["check_results_are_those_of_torch"], divide_by.__code__.co_firstlineno + 1
    assert reason.startswith("ZeroDivisionError: ") and reason.endswith(f"({__file__}, line {line}, in divide_by)")


def test_a_class_inside_a_function_cannot_reach_a_worker():
    class Local(Patient):
        """By arrival."""

    failed = {r.name: r.reason for r in run_checks(Local) if r.outcome == "failed"}
    assert "is defined inside a function" in failed["check_can_be_found_by_its_path"]


def test_wrong_declarations_are_refused():
    with pytest.raises(PluginError, match="expected_failures names check_nothing_at_all, which is no check"):
        parametrize_with_checks(Patient, {"check_nothing_at_all": "?"})
    with pytest.raises(PluginError, match="int derives from no contract"):
        find_kind(int)
    assert len({c.__name__ for c in checks_for("policy")}) == len(checks_for("policy"))
