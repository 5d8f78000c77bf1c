import importlib.metadata
import logging
import sys

import pytest

from quire.core.errors import PluginError
from quire.core.plugin.manager import PluginManager
from quire.core.plugin.target import load_target

TRAP = "raise RuntimeError('this must not be imported')"


def test_bundled_names_resolve_without_looking_at_other_packages(install, monkeypatch):
    install("quire-trap", "quire_trap", TRAP)

    def refuse():
        raise AssertionError("scanned the installed distributions")

    monkeypatch.setattr(importlib.metadata, "distributions", refuse)
    manager = PluginManager()
    assert manager.resolve_plugin("policy", "SJF").target == "quire.plugins.sched.sjf:SJFPolicy"
    assert manager.resolve_plugin("attention", "torch-sdpa").name == "torch_sdpa"
    assert manager.resolve_plugin("policy", "quire/fcfs").name == "fcfs"
    assert manager.resolve_plugin("kv").name == "paged"
    assert load_target("quire.core.contracts.policy:RequestInfo").__name__ == "RequestInfo"
    assert "quire_trap" not in sys.modules


@pytest.mark.parametrize(
    ("kind", "context", "name"),
    [
        ("attention", {"device": "cpu"}, "torch_sdpa"),
        ("attention", {"device": "cuda"}, "triton"),
        ("attention", None, "torch_sdpa"),
        ("kv", None, "paged"),
        ("policy", None, "fcfs"),
        ("quant", {"hf_config": {}}, "none"),
        ("sampler", None, "gumbel"),
        ("executor", None, "uniproc"),
        ("metrics", None, "prometheus"),
        ("model", {"architectures": ["Qwen3ForCausalLM"]}, "Qwen3ForCausalLM"),
    ],
)
def test_auto_chooses_and_says_why(kind, context, name, caplog):
    with caplog.at_level(logging.INFO, "quire"):
        resolution = PluginManager().resolve_plugin(kind, "auto", context)
    assert resolution.name == name
    assert f"{name} (auto: " in caplog.text
    for other, reason in resolution.rejected:
        assert other != name and reason and f"not {other}: {reason}" in caplog.text


def test_a_choice_is_logged_once(caplog):
    manager = PluginManager()
    with caplog.at_level(logging.INFO, "quire"):
        for _ in range(2):
            manager.resolve_plugin("--scheduler", "sjf")
            manager.resolve_plugin("policy", "quire.plugins.sched.fcfs:FCFSPolicy", announce=False)
            manager.load_class("policy", "fcfs")
    assert caplog.messages == ["scheduling policy: sjf (named)"]
    assert manager.resolve_plugin("policy", "quire.plugins.sched.fcfs:FCFSPolicy").dist == "quire"


def test_auto_without_a_checkpoint_is_an_error_for_models():
    with pytest.raises(PluginError, match="nothing to choose by"):
        PluginManager().resolve_plugin("model")


def test_a_quantized_checkpoint_is_never_read_as_if_it_were_not():
    config = {"quantization_config": {"quant_method": "mystery"}}

    class AsTransformersHasIt:
        def to_dict(self):
            return config

    for given in (config, AsTransformersHasIt()):
        with pytest.raises(PluginError, match="quantization 'mystery' is not known; choose from none"):
            PluginManager().resolve_plugin("quant", "auto", {"hf_config": given})


def test_always_on_processors_come_first_and_once():
    found = PluginManager().resolve_plugins("logits_processor", ["some.where:Mine", "logit_bias"])
    always = ["min_tokens", "logit_bias", "allowed_token_ids", "bad_words"]
    assert [r.name for r in found] == [*always, "some.where:Mine"]
    assert [r.why for r in found] == [*["always on"] * len(always), "named by its class"]


@pytest.mark.parametrize(
    ("kind", "name", "message"),
    [
        ("policy", "fcsf", r"scheduling policy 'fcsf' is not known; did you mean fcfs\b"),
        ("policy", "nowhere/mine", "scheduling policy 'nowhere/mine' is not known"),
        ("attention", "sdap", r"did you mean sdpa\?"),
        ("flavour", "x", "'flavour' is not a kind of plugin"),
        (
            "model",
            "MixtralForCausalLM",
            "'MixtralForCausalLM' is not supported; supported: .*LlamaForCausalLM",
        ),
    ],
)
def test_unknown_names_are_one_line_with_the_closest(kind, name, message):
    with pytest.raises(PluginError, match=message) as caught:
        PluginManager().resolve_plugin(kind, name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("no_such_module_x:Y", "cannot be imported: ModuleNotFoundError"),
        ("quire.core.contracts.policy:Batchingpolicy", "did you mean BatchingPolicy"),
        ("quire.core.sched.default_policy_plan:make_default_plan", "is a function, not a class"),
        ("quire.core.contracts.policy:RequestInfo", "is not a subclass of quire.sdk.BatchingPolicy"),
        ("quire.core.contracts.policy:BatchingPolicy", "does not implement admission_key"),
        ("policy", "is not of the form module:Class"),
    ],
)
def test_a_target_that_breaks_its_contract_is_refused_in_one_line(target, reason):
    with pytest.raises(PluginError, match=reason) as caught:
        load_target(target, "quire.core.contracts.policy:BatchingPolicy")
    assert "\n" not in str(caught.value) and str(caught.value).startswith((target, repr(target)))


def test_a_module_that_fails_while_it_is_imported_is_refused_with_its_line(tmp_path, monkeypatch):
    file = tmp_path / "fails_in_line_four.py"
    file.write_text("import json\n\ndef read():\n    return json.nothing\n\nread()\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(PluginError) as caught:
        load_target("fails_in_line_four:Policy")
    assert f"has no attribute 'nothing' ({file}, line 4, in read); mend it or choose another" in str(caught.value)
    file.with_name("fails_in_line_one.py").write_text("1 / 0\n")
    with pytest.raises(PluginError, match=r"division by zero \(\S+, line 1\); mend it"):
        load_target("fails_in_line_one:Policy")
