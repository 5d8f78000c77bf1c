import argparse
import sys
import threading

import pytest

from quire.core.errors import PluginError
from quire.core.plugin.manager import PluginManager

TRAP = "raise RuntimeError('this must not be imported')"


def test_a_foreign_name_is_found_and_loaded(install):
    install("Odd.Name--Dist_X", "odd_policy", install.policy.format(name="mine"))
    manager = PluginManager()
    for spelling in ("mine", "MINE", "odd-name-dist-x/mine", "Odd.Name--Dist_X/mine", "odd_policy:Mine"):
        cls = manager.load_class(manager.resolve_plugin("policy", spelling))
        assert cls.__name__ == "Mine"
    assert manager.resolve_plugin("policy", "mine").dist == "Odd.Name--Dist_X"


def test_a_name_of_two_packages_must_be_written_in_full(install):
    for dist in ("quire-one", "quire-two"):
        install(dist, dist.replace("-", "_"), install.policy.format(name="mine"))
    manager = PluginManager()
    with pytest.raises(PluginError, match="offered by several packages; write quire-one/mine or quire-two/mine"):
        manager.resolve_plugin("policy", "mine")
    assert manager.resolve_plugin("policy", "quire-two/mine").target == "quire_two:Mine"


def test_a_bundled_name_is_never_taken(install):
    install("quire-thief", "quire_thief", install.policy.format(name="fcfs"))
    manager = PluginManager(enabled=["quire-thief"])
    assert manager.resolve_plugin("policy", "fcfs").dist == "quire"
    assert manager.resolve_plugin("policy", "auto").dist == "quire"
    assert manager.resolve_plugin("policy", "quire-thief/fcfs").target == "quire_thief:Mine"


@pytest.mark.parametrize(
    "source",
    [TRAP, "import sys; sys.exit(3)", "import no_such_module", "def broken(:", "from quire import hookimpl\n1/0"],
)
def test_a_broken_neighbour_does_not_stop_a_good_one(install, source, caplog):
    install("quire-aaa-broken", "quire_aaa_broken", source)
    install("quire-good", "quire_good", install.policy.format(name="mine"))
    manager = PluginManager()
    assert manager.resolve_plugin("policy", "mine").target == "quire_good:Mine"
    assert len(manager.refused) == 1 and "quire-aaa-broken" in caplog.text
    with pytest.raises(PluginError, match=r"1 plugin\(s\) were refused: see quire plugins doctor"):
        manager.resolve_plugin("policy", "yours")
    with pytest.raises(PluginError, match=r"'quire-aaa-broken/yours' cannot be used: quire-aaa-broken 2\.5"):
        manager.resolve_plugin("policy", "quire-aaa-broken/yours")


def test_a_neighbour_that_does_not_finish_in_time_is_passed_over(install):
    install("quire-aaa-slow", "quire_aaa_slow", "import time; time.sleep(0.8)")
    stdout = sys.stdout
    install("quire-good", "quire_good", install.policy.format(name="mine"))
    manager = PluginManager()
    manager.discover_plugins("quire-good")
    manager.discover_plugins(limit=0.2)
    assert manager.resolve_plugin("policy", "mine").target == "quire_good:Mine"
    (reason,) = manager.refused.values()
    assert "took more than 0.2 s to import" in reason
    [importing] = [thread for thread in threading.enumerate() if thread.name == "import quire_aaa_slow"]
    importing.join(30)
    assert sys.stdout is stdout, "an import that was given up on puts nothing back"


def test_another_api_or_version_is_refused_before_import(install):
    install("quire-next", "quire_next", TRAP, group="quire.v2", requires=("quire>=2,<3",))
    install("quire-later", "quire_later", TRAP, requires=("quire>=7",))
    for dist, reason in (
        ("quire-next", r"written for plugin API quire.v2 \(it requires quire <3,>=2\), this is quire .* with quire.v1"),
        ("quire-later", "requires quire >=7, this is quire .*; install a release of quire-later for this version"),
    ):
        with pytest.raises(PluginError, match=reason):
            PluginManager(enabled=[dist])
    assert not {"quire_next", "quire_later"} & sys.modules.keys()


def test_an_extra_that_needs_another_version_does_not_count(install):
    requires = ("quire>=0.1", 'quire>=9; extra == "future"', 'quire>=9; python_version < "3"')
    install("quire-good", "quire_good", install.policy.format(name="mine"), requires=requires)
    assert PluginManager().resolve_plugin("policy", "mine").dist == "quire-good"


def test_discovery_is_not_activation(install):
    source = """
    from quire.sdk import hookimpl
    from quire.core.plugin.registry import Choice

    @hookimpl
    def quire_choose_default(kind, config):
        return Choice("sjf", "shorter is nicer", {"fcfs": "too patient"}) if kind == "policy" else None

    @hookimpl
    def quire_extend_app(app):
        app.append("mine")
    """
    install("quire-opinion", "quire_opinion", source)
    app = []
    plain = PluginManager()
    plain.discover_plugins()
    plain.hooks.quire_extend_app(app=app)
    assert plain.resolve_plugin("policy").name == "fcfs" and app == []
    enabled = PluginManager(enabled=["Quire_Opinion"])
    enabled.call_hook("quire_extend_app", app=app)
    choice = enabled.resolve_plugin("policy")
    assert app == ["mine"]
    assert str(choice) == "scheduling policy: sjf (auto by quire-opinion: shorter is nicer; not fcfs: too patient)"
    assert enabled.resolve_plugin("kv").why == "auto: the default"


def test_a_plugin_adds_arguments_and_commands_only_when_turned_on(install):
    source = """
    from quire.sdk import hookimpl

    @hookimpl
    def quire_add_arguments(parser):
        parser.add_argument("--greeting", default="good day")

    @hookimpl
    def quire_register_commands(subparsers):
        subparsers.add_parser("greet").set_defaults(run=lambda args: 0)
    """
    install("quire-greet", "quire_greet", source)
    for enabled in ([], ["quire-greet"]):
        parser = argparse.ArgumentParser()
        subparsers = parser.add_subparsers()
        manager = PluginManager(enabled)
        manager.call_hook("quire_add_arguments", parser=parser)
        manager.call_hook("quire_register_commands", subparsers=subparsers)
        assert list(subparsers.choices) == ["greet"][: len(enabled)]
        assert ("--greeting" in parser.format_help()) is bool(enabled)


def test_a_hook_that_raises_is_named(install):
    source = """
    from quire.sdk import hookimpl

    @hookimpl
    def quire_choose_default(kind):
        raise KeyError(kind)

    @hookimpl
    def quire_configure(config):
        raise OSError("disk full")

    @hookimpl
    def quire_extend_app(app):
        raise SystemExit(7)
    """
    install("quire-bad", "quire_bad", source)
    manager = PluginManager(enabled=["quire-bad"])
    with pytest.raises(PluginError, match="quire-bad: quire_choose_default failed: KeyError: 'kv'; leave out --plugin"):
        manager.resolve_plugin("kv")
    with pytest.raises(PluginError, match="quire-bad: quire_configure failed: OSError: disk full"):
        manager.call_hook("quire_configure", config=None)
    with pytest.raises(PluginError, match=r"quire-bad: quire_extend_app failed: it called sys.exit\(7\); leave out"):
        manager.call_hook("quire_extend_app", app=None)


def test_enabling_what_is_not_installed_says_what_is(install):
    install("quire-good", "quire_good", install.policy.format(name="mine"))
    with pytest.raises(PluginError, match=r"--plugin quire-god: .*; did you mean quire-good\?"):
        PluginManager(enabled=["quire-god"])
    with pytest.raises(PluginError, match="--plugin pytest: no installed distribution of that name has Quire plugins"):
        PluginManager(enabled=["pytest"])


def test_a_missing_requirement_is_told_before_the_import(install):
    source = install.policy.format(name="mine").replace('package")', 'package", requires=("no_such_module_x",))')
    install("quire-needy", "quire_needy", source)
    manager = PluginManager()
    with pytest.raises(PluginError, match=r"needs the module 'no_such_module_x', .*; pip install no_such_module_x"):
        manager.load_class("policy", "mine")
