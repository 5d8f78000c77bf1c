"""One machine with every kind of broken package on it, and what the user is told."""

import re

import pytest

GOOD = "quire-good"


def _policies(*calls):
    body = "\n".join(f"    register({call})" for call in calls)
    return (
        "from quire.sdk import hookimpl\n\nclass NotAPolicy:\n    pass\n\n"
        f"@hookimpl\ndef quire_register_policy(register):\n{body}\n"
    )


BROKEN = {
    "quire-raises": ("raise RuntimeError('out of\\norder')", "cannot be imported: RuntimeError: out of order"),
    "quire-exits": ("import sys\nsys.exit(0)", r"cannot be imported: it called sys.exit\(0\)"),
    "quire-dies": ("import os\nos._exit(0)", "the process ended while importing quire_dies, with status 0"),
    "quire-lacks": ("import no_such_module_x", "ModuleNotFoundError: No module named 'no_such_module_x'"),
    "quire-typo": (_policies('"x", "quire_typo:NotAPolcy", "s"'), "has no 'NotAPolcy'; did you mean NotAPolicy"),
    "quire-nowhere": (_policies('"x1", "quire_nowere:X", "s"'), "No module named 'quire_nowere'"),
    "quire-contract": (
        _policies('"x2", "quire_contract:NotAPolicy", "s"'),
        "is not a subclass of quire.sdk",
    ),
    "quire-oddname": (_policies('"no spaces", "a:B", "s"'), "'no spaces' cannot be a name; use letters"),
    "quire-notext": (_policies('"x3", NotAPolicy, "s"'), "is not of the form 'module:Class'; write it as a string"),
    "quire-unmarked": ("def quire_register_policy(register): pass", "is not marked; decorate it with @quire.hookimpl"),
    "quire-unhooked": (
        "from quire.sdk import hookimpl\n@hookimpl\ndef quire_register_polcy(register): pass",
        "quire_register_polcy",
    ),
    "quire-empty": ("", "its entry point defines no hooks"),
    "quire-prints": (_policies('"fine", "quire.plugins.sched.sjf:SJFPolicy", "s"') + "print('hello')", "prints while"),
}


@pytest.fixture(scope="module")
def site(tmp_path_factory, distribution, policy_source):
    site = tmp_path_factory.mktemp("broken")
    distribution(site, GOOD, "quire_good", policy_source.format(name="mine"))
    for name, (source, _) in BROKEN.items():
        distribution(site, name, name.replace("-", "_"), source)
    distribution(site, "quire-thief", "quire_thief", policy_source.format(name="FCFS"))
    distribution(site, "quire-v2", "quire_v2", "1/0", group="quire.v2", requires=["quire>=2"])
    distribution(site, "quire-later", "quire_later", "1/0", requires=["quire>=7"])
    distribution(site, "quire-group", "quire_group", "1/0", group="quire.plugins")
    distribution(site, "quire-case", "quire_case", "1/0", group="Quire.V1")
    distribution(site, "quire-glued", "quire_glued", "1/0", group="quirev1")
    distribution(site, "quirelike", "quirelike", "1/0", group="quirelike.v1")
    distribution(site, "quire-value", "quire_value", "1/0", value="quire-value")
    distribution(site, "Strange..Name__Z", "strange_name", "1/0")
    distribution(site, "quire-start", "quire_start", policy_source.format(name="started"))
    (site / "quire_start.pth").write_text("# a comment\nimport quire_start_early\n")
    finder = "__editable___quire_start_2_5_finder"
    (site / "__editable__.quire_start-2.5.pth").write_text(f"import {finder}; {finder}.install()\n")
    (site / "__editable__.other.pth").write_text(f"import {finder}; {finder}.install(); import os\n")
    record = ["quire_start.py", *(path.name for path in site.glob("*.pth")), "sitecustomize.py"]
    (site / "quire_start-2.5.dist-info" / "RECORD").write_text("".join(f"{name},,\n" for name in record))
    return site


@pytest.fixture(scope="module")
def report(site, quire):
    return quire("plugins", "doctor", site=site, code=1, json_output=True)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        *((name, reason) for name, (_, reason) in BROKEN.items()),
        ("quire-thief", r"policy/FCFS is a name of quire; it answers to quire-thief/FCFS alone"),
        ("quire-v2", "written for plugin API quire.v2"),
        ("quire-later", "requires quire >=7, this is quire"),
        ("quire-group", "entry-point group 'quire.plugins' is never read; rename it to 'quire.v1'"),
        ("quire-case", "entry-point group 'Quire.V1' is never read; rename it to 'quire.v1'"),
        ("quire-glued", "entry-point group 'quirev1' is never read; rename it to 'quire.v1'"),
        ("quire-value", "entry point main = 'quire-value' is not a module or module:object"),
        ("Strange..Name__Z", "cannot be imported: ZeroDivisionError"),
        ("quire-start", "runs code in every Python process: quire_start.pth: import quire_start_early; read it"),
        ("quire-start", "runs code in every Python process: sitecustomize.py"),
        ("quire-start", r"runs code in every Python process: __editable__.other.pth: .*; import os; read it"),
    ],
)
def test_the_doctor_names_each_with_its_reason(report, name, reason):
    told = [p["problem"] for p in report["problems"] if p["dist"] == name]
    assert told and any(re.search(reason, text) for text in told), told
    assert all(text.startswith(f"{name} 2.5") and "\n" not in text for text in told)


def test_the_doctor_has_nothing_against_the_good_one(report):
    assert not {GOOD, "quirelike"} & {p["dist"] for p in report["problems"]}
    assert "quirelike" not in {e["dist"] for e in report["third_party"]}
    (good,) = [e for e in report["third_party"] if e["dist"] == GOOD]
    assert good["plugins"] == ["policy/mine"] and good["file"].endswith("quire_good.py")


def test_the_doctor_in_words(site, quire):
    result = quire("plugins", "doctor", site=site, code=1)
    assert re.search(r"^! quire-raises 2\.5 .*; mend or uninstall it$", result.stdout, re.MULTILINE)
    lines = [line for line in result.stdout.splitlines() if line.startswith("    runs at every start of Python: ")]
    assert len(lines) == 4 and len([line for line in lines if line.endswith("installed with pip install -e")]) == 1
    assert result.stderr == "" and "hello" not in result.stdout.splitlines()


def test_listing_goes_on_and_says_what_was_refused(site, quire):
    listed = quire("plugins", "list", "policy", site=site, json_output=True)
    spellings = {p["spelling"] for p in listed["plugins"]}
    assert {"fcfs", "priority", "sjf", "mine", "quire-thief/FCFS"} <= spellings
    assert [p["spelling"] for p in listed["plugins"] if p["active"]] == ["fcfs"]
    refused = {r["dist"] for r in listed["refused"]}
    assert {"quire-raises", "quire-exits", "quire-dies", "quire-v2", "quire-later", "quire-value"} <= refused
    assert GOOD not in refused


def test_a_good_plugin_is_explained_among_the_broken(site, quire):
    told = quire("plugins", "explain", "policy/mine", site=site, json_output=True)
    assert (told["dist"], told["version"], told["target"]) == (GOOD, "2.5", "quire_good:Mine")
    assert told["target_file"].endswith("quire_good.py") and told["flag"] == "--scheduling-policy mine"
    assert not told["active"] and told["why"] == "only when named"


def test_one_that_hangs_is_given_up_on_and_named(tmp_path, distribution, quire):
    distribution(tmp_path, "quire-hangs", "quire_hangs", "import time; time.sleep(60)")
    report = quire("plugins", "doctor", "--timeout", "5.5", site=tmp_path, code=1, json_output=True)
    (problem,) = [p for p in report["problems"] if p["dist"] == "quire-hangs"]
    assert "importing quire_hangs took more than 5.5 s" in problem["problem"]


def test_one_that_is_slow_is_named(tmp_path, distribution, quire, policy_source):
    source = policy_source.format(name="mine") + "\nimport time; time.sleep(1.1)"
    distribution(tmp_path, "quire-slow", "quire_slow", source)
    report = quire("plugins", "doctor", site=tmp_path, code=1, json_output=True)
    (problem,) = [p for p in report["problems"] if p["dist"] == "quire-slow"]
    assert re.search(r"importing quire_slow took 1\.\d s; import heavy modules in the target", problem["problem"])


def test_damaged_metadata_is_named(tmp_path, distribution, quire):
    distribution(tmp_path, "quire-odd", "quire_odd", "")
    info = tmp_path / "quire_odd-2.5.dist-info"
    (info / "entry_points.txt").write_text("[quire.v1]\nno equals sign here\n")
    (info / "METADATA").write_text("")
    report = quire("plugins", "doctor", site=tmp_path, code=1, json_output=True)
    assert any("quire_odd" in p["problem"] for p in report["problems"])


def test_without_third_parties_all_is_well(quire):
    result = quire("plugins", "doctor")
    assert result.stdout.endswith("no problems\n")


def test_a_gpu_without_a_compiler_is_told(monkeypatch):
    from quire.server.cli import plugins_report

    host = {"device": "cuda", "c_compiler": None, "python_headers": None}
    monkeypatch.setattr(plugins_report, "inspect_host", lambda: host)
    problems = plugins_report.doctor_report(plugins_report.PluginManager(), 5.0)["problems"]
    texts = [p["problem"] for p in problems if p["dist"] == "this machine"]
    assert len(texts) == 2 and "apt install gcc" in texts[0] and "apt install python3-dev" in texts[1]
