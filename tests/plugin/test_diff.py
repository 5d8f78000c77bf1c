"""``quire plugins diff``: what another version changes for a package, of what that package touches."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from quire.core.plugin.contract_record import record_contracts
from quire.server.cli.main import main

PACKAGE = """
from quire.sdk import BatchingPolicy as Base, Grants, hookimpl
from quire.sdk.ops import rms_norm

class Mine(Base):
    def schedule(self, view):
        return Grants([0], [view.token_budget])

    def admission_key(self, request):
        return (request.arrival_ns,)

@hookimpl
def quire_register_policy(register):
    register("mine", "mine:Mine", "mine")
"""
POLICY = "quire.core.contracts.policy:BatchingPolicy"
INFO = "quire.core.contracts.policy:RequestInfo"


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    return record_contracts()


@pytest.fixture
def compare(record: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """The status and the report of a diff to a version in which ``change`` was done."""
    (tmp_path / "mine.py").write_text(PACKAGE)
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    old.write_text(json.dumps(record))

    def run(change: Any, *words: str) -> tuple[int, str]:
        changed = copy.deepcopy(record)
        change(changed)
        new.write_text(json.dumps(changed))
        status = main(["plugins", "diff", str(old), str(new), str(tmp_path / "mine.py"), *words])
        return status, capsys.readouterr().out

    return run


def without_hook(new: Any) -> None:
    del new["hooks"]["quire_register_policy"]


def rename_method(new: Any) -> None:
    members = new["contracts"][POLICY]
    members["plan"] = members.pop("schedule")


def more_arguments(new: Any) -> None:
    new["contracts"][POLICY]["schedule"] = "(self, view, budget)"


def new_abstract(new: Any) -> None:
    new["contracts"][POLICY]["rank"] = "abstract (self, request)"


def name_is_gone(new: Any) -> None:
    new["names"]["quire.sdk"].remove("Grants")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (without_hook, "quire_register_policy is no hook any more (mine.py:13)"),
        (rename_method, "BatchingPolicy.schedule is gone (mine.py:6)"),
        (more_arguments, "BatchingPolicy.schedule is called as (self, view, budget), was (self, view) (mine.py:6)"),
        (new_abstract, "BatchingPolicy.rank is new, and has to be written (mine.py:2)"),
        (name_is_gone, "quire.sdk.Grants is gone (mine.py:2)"),
    ],
)
def test_what_breaks_is_named_with_its_line(compare: Any, change: Any, said: str) -> None:
    status, text = compare(change)
    assert status == 1 and any(line.split() == ["breaking", *said.split()] for line in text.splitlines()), text
    assert "1 breaking" in text.splitlines()[-1] or change is rename_method


def test_what_is_promised_in_words_is_behavioural(compare: Any) -> None:
    def reword(new: Any) -> None:
        new["docs"][f"{POLICY}.schedule"] = "another"
        new["docs"][f"{POLICY}.step_scheduled"] = "another, of a method that is not written here"
        new["docs"]["quire.core.contracts.kv:KVAllocator"] = "another, of another kind"

    status, text = compare(reword, "--json")
    report = json.loads(text)
    assert status == 0
    assert [(each["verdict"], each["name"]) for each in report["changes"]] == [
        ("behavioural", "BatchingPolicy.schedule")
    ]


def test_what_does_not_concern_it_is_unchanged(compare: Any) -> None:
    def change_others(new: Any) -> None:
        new["contracts"]["quire.core.contracts.kv:KVAllocator"]["free"] = "(self)"
        new["contracts"][POLICY]["later"] = "(self)"
        del new["hooks"]["quire_register_kv"]
        new["names"]["quire.sdk"].remove("KVAllocator")

    status, text = compare(change_others)
    assert status == 0 and "0 breaking, 0 behavioural" in text


def test_internal_modules_are_pointed_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.py").write_text("from quire.core.sched.scheduler import Scheduler\n")
    assert main(["plugins", "diff", "installed", "installed", str(tmp_path)]) == 0
    assert "quire.core.sched.scheduler promises nothing; use quire.sdk (mine.py:1)" in capsys.readouterr().out


def test_a_record_can_be_written_and_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "record.json"
    assert main(["plugins", "record", str(file)]) == 0
    package = Path(__file__).parents[2] / "examples" / "plugins" / "take-turns"
    assert main(["plugins", "diff", str(file), "installed", str(package)]) == 0
    assert "0 breaking, 0 behavioural" in capsys.readouterr().out


def test_an_editable_install_is_read_where_it_is(install: Any, capsys: pytest.CaptureFixture[str]) -> None:
    install("quire-mine", "quire_mine", install.policy.format(name="mine"))
    (record,) = install.site.glob("quire_mine-*.dist-info")
    (install.site / "__editable___quire_mine_finder.py").write_text("")
    (record / "RECORD").write_text("__editable___quire_mine_finder.py,,\n")
    assert main(["plugins", "diff", "installed", "installed", "quire-mine"]) == 0
    assert "0 breaking, 0 behavioural, 3 names unchanged" in capsys.readouterr().out


def test_a_record_that_cannot_be_written_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plugins", "record", str(tmp_path / "none" / "record.json")]) == 2
    assert "record.json cannot be written: No such file or directory" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["9.9", "installed", "pytest"], "there is no record of '9.9'; known are"),
        (["installed", "installed", "no-such-package"], "'no-such-package' is neither an installed distribution nor"),
        (["installed", "installed", "quire-empty"], "quire-empty lists no Python files; name its folder"),
    ],
)
def test_what_there_is_not(words: list[str], said: str, install: Any, capsys: pytest.CaptureFixture[str]) -> None:
    install("quire-empty", "quire_empty", "", value="quire_empty_elsewhere")
    assert main(["plugins", "diff", *words]) == 2
    assert said in capsys.readouterr().err
