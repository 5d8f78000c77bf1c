import pytest

from quire.core.errors import PluginError
from quire.core.plugin.registry import KINDS, Kind, Registrar, Registration, Registry, suggest_names
from quire.core.plugin.target import load_target


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("policy", "policy"),
        ("--scheduler", "policy"),
        ("scheduling-policy", "policy"),
        ("kv-allocator", "kv"),
        ("Attention Backend".replace(" ", "-"), "attention"),
        ("logits-processor", "logits_processor"),
        ("quantization", "quant"),
    ],
)
def test_a_kind_is_found_by_key_title_or_flag(text, key):
    assert Kind.from_name(text).key == key


def test_an_unknown_kind_is_refused_with_the_closest():
    with pytest.raises(PluginError, match=r"'polcy' is not a kind of plugin; did you mean policy\?"):
        Kind.from_name("polcy")


def test_the_table_of_kinds_is_true():
    from quire.core.plugin import builtin, hookspecs
    from quire.core.plugin.discovery import collect_registrations, find_module_file

    bundled = collect_registrations(builtin)
    for kind in KINDS.values():
        assert hasattr(hookspecs, f"quire_register_{kind.key}")
        assert load_target(kind.contract).__name__ == kind.contract_name.removeprefix("quire.sdk.")
        files = [find_module_file(r.target.partition(":")[0]) for r in bundled if r.kind == kind.key]
        assert files and all(f"/{kind.folder}/" in file for file in files)
        assert (kind.flag is None) == (kind.option_flag is None) == (kind.key == "model")
    assert len({k.flag for k in KINDS.values()}) == len(KINDS)


@pytest.mark.parametrize("name", ["auto", "AUTO", "a/b", "a:b", "", "-x", "ünï", "two words", 7])
def test_odd_names_are_refused(name):
    with pytest.raises(PluginError, match="cannot be a name"):
        Registrar("policy")(name, "a.b:C", "something")


@pytest.mark.parametrize("target", ["a.b", "a.b:", ":C", "a b:C", "a:C()", None, Registry])
def test_a_target_must_be_a_string_of_module_and_class(target):
    with pytest.raises(PluginError, match="is not of the form 'module:Class'"):
        Registrar("policy")("mine", target, "something")


@pytest.mark.parametrize("summary", ["", "  ", "two\nlines", None])
def test_a_summary_is_one_line(summary):
    with pytest.raises(PluginError, match="must be one line"):
        Registrar("policy")("mine", "a:C", summary)


def test_a_plugin_registers_a_name_once():
    register = Registrar("policy")
    register("mine", "a:B", "one", aliases=("ours",))
    with pytest.raises(PluginError, match="'Ours' is registered already, by mine; choose another name"):
        register("yours", "a:C", "two", aliases=("Ours",))


def test_requirements_carry_an_install_hint():
    register = Registrar("attention", "other", "1.0")
    register("mine", "a:C", "something", requires=("flash_attn",), aliases=("m",))
    (registration,) = register.registrations
    assert registration.requires[0].install == "pip install flash_attn"
    assert (registration.qualified_name, registration.aliases) == ("other/mine", ("m",))


def test_bundled_names_and_aliases_win_whatever_comes_first():
    registry = Registry()
    foreign = Registration("policy", "FCFS", "x:Y", "theirs", dist="other")
    bundled = Registration("policy", "fcfs", "a:B", "ours", aliases=("first-come",))
    registry.add_registrations([foreign, Registration("policy", "first_come", "x:Z", "theirs", dist="other"), bundled])
    assert registry.find_by_name("policy", "fcfs") == [bundled]
    assert registry.find_by_name("policy", "First-Come") == [bundled]
    assert registry.find_in_dist("policy", "Other", "fcfs") == foreign
    assert registry.find_clash(foreign) == bundled
    assert registry.command_line_name(foreign) == "other/FCFS"
    assert registry.command_line_name(bundled) == "fcfs"


def test_two_foreigners_with_one_name_both_need_their_full_name():
    registry = Registry()
    registry.add_registrations([Registration("policy", "x", "a:B", "one", dist=d) for d in ("first", "second")])
    assert [registry.command_line_name(r) for r in registry.list_kind("policy")] == ["first/x", "second/x"]
    assert len(registry.find_by_name("policy", "x")) == 2


def test_did_you_mean_offers_the_closest_or_all():
    assert suggest_names("fcsf", ["fcfs", "sjf"]).startswith("did you mean fcfs")
    assert suggest_names("zzz", ["fcfs", "sjf"]) == "choose from fcfs, sjf"
    assert suggest_names("sdap", ["torch_sdpa"], ["sdpa"]) == "did you mean sdpa?"
    assert suggest_names("x", []) == "there are none"
    clashing = ["fcfs", "one/mine", "two/mine"]
    assert suggest_names("mne", clashing) == "did you mean one/mine or two/mine?"
    assert suggest_names("twoo/mine", clashing) == "did you mean two/mine or one/mine?"
