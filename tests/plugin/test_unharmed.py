"""What is merely installed, however broken, is not even looked at when an engine is configured."""

import json
import logging
import sys

import pytest

from quire.core.engine.args import EngineArgs
from quire.core.engine.config_builder import build_config
from quire.core.errors import PluginError


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 128, **sizes}
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def test_an_engine_is_configured_beside_broken_packages(install, model, caplog):
    install("quire-raises", "quire_raises", "1/0")
    install("quire-exits", "quire_exits", "import sys; sys.exit(1)")
    install("quire-hangs", "quire_hangs", "import time; time.sleep(600)")
    install("quire-thief", "quire_thief", install.policy.format(name="fcfs"))
    with caplog.at_level(logging.INFO, "quire"):
        config = build_config(EngineArgs(model=model, device="cpu")).config
    assert all(choice.target.startswith("quire.") for choice in config.plugins.values())
    assert not {"quire_raises", "quire_exits", "quire_hangs", "quire_thief"} & sys.modules.keys()
    assert "attention backend: torch_sdpa (auto: the device is cpu; not triton: it is fast only" in caplog.text


def test_a_foreign_policy_is_chosen_by_name_beside_a_broken_package(install, model):
    install("quire-exits", "quire_exits", "import sys; sys.exit(1)")
    install("quire-good", "quire_good", install.policy.format(name="mine"))
    config = build_config(EngineArgs(model=model, device="cpu", scheduling_policy="mine")).config
    assert config.plugin("policy").target == "quire_good:Mine"
    assert config.plugin("policy_fallback").target == "quire.plugins.sched.fcfs:FCFSPolicy"
    assert config.plugin("kv_fallback").target == "quire.plugins.kv.paged:PagedAllocator"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"scheduling_policy": "fcsf"}, r"'fcsf' is not known; did you mean fcfs"),
        ({"plugins": ("quire-exits",)}, r"--plugin quire-exits: .* it called sys\.exit\(1\)"),
        ({"plugin_options": {"policy": {"depth": "3"}}}, "depth"),
    ],
)
def test_a_wrong_wish_is_refused_before_anything_is_loaded(install, model, changes, reason):
    install("quire-exits", "quire_exits", "import sys; sys.exit(1)")
    with pytest.raises(PluginError, match=reason) as caught:
        build_config(EngineArgs(model=model, device="cpu", **changes))
    assert "\n" not in str(caught.value)
