import resource
import subprocess
import sys
from pathlib import Path

import pytest

from quire.core.plugin.registry import KINDS

SRC = Path(__file__).parents[2] / "src"
WITNESS = """
import sys
from quire.server.cli.main import main
status = main(sys.argv[1:])
heavy = sorted({"torch", "fastapi", "transformers", "numpy", "triton"} & sys.modules.keys())
sys.exit(f"imported {heavy}" if heavy else status)
"""


@pytest.mark.parametrize("command", [["list"], ["list", "--json"], ["doctor"], ["explain", "attention/auto"]])
def test_these_commands_import_nothing_heavy_and_answer_at_once(command):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(
        [sys.executable, "-c", WITNESS, "plugins", *command],
        check=True,
        stdout=subprocess.DEVNULL,
        env={"PYTHONPATH": str(SRC), "PATH": "/usr/bin:/bin"},
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # Processor time, not the clock's: the machine may be busy with other tests.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5


def test_the_list_has_every_kind_with_origin_and_reason(quire):
    report = quire("plugins", "list", "--device", "cpu", json_output=True)
    assert {p["kind"] for p in report["plugins"]} == set(KINDS)
    assert all(p["dist"] == "quire" and p["file"].endswith("builtin.py") for p in report["plugins"])
    active = {p["kind"]: p["why"] for p in report["plugins"] if p["active"]}
    assert active["attention"] == "auto: the device is cpu" and "model" not in active
    text = quire("plugins", "list", "--device", "cuda").stdout
    assert "* triton" in text and "auto: the device is a CUDA GPU" in text


def test_explain_says_all_there_is_to_know(quire):
    text = quire("plugins", "explain", "scheduler/quire/sjf").stdout
    for part in ("policy/sjf", "--scheduling-policy sjf", "quire.plugins.sched.sjf:SJFPolicy", "not active by default"):
        assert part in text
    text = quire("plugins", "explain", "attention/auto", "--device", "cpu").stdout
    assert "attention/torch_sdpa" in text and "not triton" in text
    assert quire("plugins", "explain", "policy/some.where:Mine", json_output=True)["target_file"] is None


def test_a_class_in_a_file_is_explained_by_its_source(quire, tmp_path):
    (tmp_path / "vip_first.py").write_text(VIP)
    for subject in (f"{tmp_path}/vip_first.py:VipFirst", f"policy/{tmp_path}/vip_first.py:VipFirst"):
        report = quire("plugins", "explain", subject, json_output=True)
        assert (report["kind"], report["target"]) == ("policy", "vip_first:VipFirst")
        assert report["options"] == ["aging_s: float = 10.0"] and report["arguments"] == ["vip: bool = False"]
        assert report["option_meanings"] == ["Seconds of waiting that make one a VIP."]
        assert report["flag"] == f"--scheduling-policy {tmp_path}/vip_first.py:VipFirst"
    refused = quire("plugins", "explain", f"{tmp_path}/vip_first.py:Other", code=2).stderr
    assert "write KIND/" in refused and len(refused.splitlines()) == 1


VIP = """
from dataclasses import dataclass
from quire import sdk

raise SystemExit("it is imported")

class VipFirst(sdk.BatchingPolicy):
    @dataclass(frozen=True)
    class Options:
        aging_s: float = 10.0
        '''Seconds of waiting that make one a VIP.'''

    @dataclass(frozen=True)
    class Arguments:
        vip: bool = False

class Other(VipFirst):
    pass
"""


@pytest.mark.parametrize(
    ("subject", "reason"),
    [
        ("policy/fcsf", "did you mean fcfs"),
        ("polcy/fcfs", "did you mean policy"),
        ("policy", "is not of the form KIND/NAME; write for example policy/fcfs"),
    ],
)
def test_a_wrong_name_is_one_line_and_status_2(quire, subject, reason):
    for command in ("explain", "check"):
        result = quire("plugins", command, subject, code=2)
        assert reason in result.stderr and result.stderr.count("\n") == 1 and result.stdout == ""


def test_options_are_read_from_the_source(tmp_path, distribution, quire):
    source = """
    from dataclasses import dataclass
    from quire.sdk import hookimpl

    @hookimpl
    def quire_register_policy(register):
        register("a", "quire_opts:Nested", "one")
        register("b", "quire_opts:Named", "two")

    @dataclass(frozen=True)
    class Settings:
        depth: int = 3

    class Nested:
        @dataclass(frozen=True)
        class Options:
            share: float = 0.5
            name: str | None = None

    class Named:
        Options = Settings
    """
    distribution(tmp_path, "quire-opts", "quire_opts", source)
    nested = quire("plugins", "explain", "policy/a", site=tmp_path, json_output=True)
    named = quire("plugins", "explain", "policy/quire-opts/b", site=tmp_path, json_output=True)
    assert nested["options"] == ["share: float = 0.5", "name: str | None = None"]
    assert named["options"] == ["depth: int = 3"] and named["option_flag"] == "--scheduling-policy-option"


def test_check_runs_the_conformance_checks_on_a_foreign_class(tmp_path, distribution, quire, policy_source):
    distribution(tmp_path, "quire-good", "quire_good", policy_source.format(name="mine"))
    spoiled = policy_source.format(name="bad").replace("'''By arrival.'''", "shared = []")
    distribution(tmp_path, "quire-bad", "quire_bad", spoiled)
    good = quire("plugins", "check", "policy/mine", site=tmp_path, json_output=True)
    assert good["failed"] == 0 and len(good["results"]) >= 6
    text = quire("plugins", "check", "policy/quire-bad/bad", site=tmp_path, code=1).stdout
    assert "failed   check_says_what_it_is: AssertionError: has no docstring" in text
    assert "failed   check_has_no_shared_mutable_state: AssertionError: shared is shared by all instances" in text
