"""``quire plugins bench`` as it is typed, and the shapes of one's own traffic that it takes."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from quire import LLM, SamplingParams
from quire.core.errors import ConfigError
from quire.core.plugin.target import load_target, resolve_file
from quire.core.testing.tiny_models import make_tiny_model
from quire.server.cli.main import main
from quire.server.plugin_bench.shapes import read_shape_cases

OWN = '''
from quire.sdk import BatchingPolicy

class ShortestFirst(BatchingPolicy):
    """Short prompts first."""

    def admission_key(self, request):
        return (request.prompt_len,)
'''


@pytest.fixture
def own(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.path", [*sys.path])
    file = tmp_path / "bench_own_policy.py"
    file.write_text(OWN)
    yield f"{file}:ShortestFirst"
    sys.modules.pop("bench_own_policy", None)


def bench(*words):
    return main(["plugins", "bench", *words, "--rounds", "3", "--running", "8", "--waiting", "4"])


def test_a_class_of_a_file_is_measured_beside_a_bundled_one(own, capsys):
    assert bench(own, "--beside", "fcfs", "--only", "one ends") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("| case") and f"time of {own} beside it" in lines[0] and len(lines[2:]) >= 3
    assert lines[2].startswith("| 8 running, 4 waiting, one ends a step") and own in lines[2] and "| fcfs" in lines[3]
    assert "CPU time of the thread" in "".join(lines) and "~: the range of 3 rounds of the ratio holds 1" in lines


def test_the_same_as_json_and_as_a_plot(tmp_path, capsys):
    plot = tmp_path / "times.png"
    assert bench("kv/paged", "--json", "--plot", str(plot)) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["kind"], document["subject"], len(document["rows"])) == ("kv", "paged", 3)
    assert all(row["microseconds"] > 0 for row in document["rows"]) and plot.stat().st_size > 1000


def test_a_cpu_says_what_it_cannot_say(capsys):
    assert bench("attention/torch_sdpa", "--beside", "torch_sdpa", "--device", "cpu", "--only", "decode") == 0
    assert "It cannot say what a GPU takes" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["metrics/prometheus"], "is not a kind that is timed; those are attention, quant"),
        (["policy/fcsf"], "did you mean fcfs"),
        (["policy/fcfs", "--only", "nothing"], "no case has that in its name; there are 8 running"),
        (["nowhere.py:Class"], "there is no file"),
        (
            [str(Path(__file__).parents[1] / "plugin/hostile_plugins.py")],
            r"names a file, and no class in it; write \S+py:",
        ),
        (["policy/fcfs", "--shapes", "x.json"], "--shapes goes with attention"),
        (["attention/torch_sdpa", "--shapes", "x.json"], "write one: quire serve --capture-shapes FILE"),
        (["policy/fcfs", "--plot", "x.txt"], r"must be a \.png file"),
        (["policy/fcfs", "--rounds", "2"], "at least 3"),
        (["policy/fcfs", "--only", "8 running", "--end-to-end", "m", "--runs", "2"], "at least 5 alternating runs"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_a_line(words, reason, capfd):
    assert main(["plugins", "bench", "--running", "8", "--waiting", "4", "--rounds", "3", *words]) == 2
    error = capfd.readouterr().err
    assert len(error.splitlines()) == 1 and re.search(reason, error), error


def test_checks_take_a_file_too(own, capsys):
    assert main(["plugins", "check", own]) == 0
    assert "0 of" in capsys.readouterr().out


def test_a_file_serves_by_its_name(own):
    llm = LLM(model="quire-tiny", device="cpu", scheduling_policy=own, cpu_threads=1)
    assert llm.config.plugin("policy").target == "bench_own_policy:ShortestFirst"
    llm.shutdown()


def test_a_file_of_a_package_is_imported_as_part_of_it(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.path", [*sys.path])
    (tmp_path / "bench_package").mkdir()
    (tmp_path / "bench_package" / "__init__.py").write_text("")
    file = tmp_path / "bench_package" / "policy.py"
    file.write_text("from . import __name__ as package\n" + OWN)
    target = resolve_file(f"{file}:ShortestFirst")
    assert target == "bench_package.policy:ShortestFirst" and load_target(target).__module__ == "bench_package.policy"


def test_a_file_that_cannot_be_imported_is_refused(tmp_path):
    (tmp_path / "my-kernel.py").write_text("")
    with pytest.raises(Exception, match="give the file a name of letters, digits and '_'"):
        resolve_file(f"{tmp_path}/my-kernel.py:Mine")
    (tmp_path / "json.py").write_text("")
    with pytest.raises(Exception, match="give the file a name of its own"):
        resolve_file(f"{tmp_path}/json.py:Mine")


def test_the_shapes_of_traffic_become_cases(tmp_path):
    """A prompt, then decodes of two requests: captured by an engine, read as cases of attention."""
    file = tmp_path / "shapes.json"
    folder = make_tiny_model("llama", tmp_path / "model")
    llm = LLM(model=str(folder), device="cpu", cpu_threads=1, capture_shapes=str(file), enable_prefix_caching=False)
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    llm.generate([{"prompt_token_ids": [5] * 30}, {"prompt_token_ids": [6] * 9}], params)
    llm.shutdown()
    document = json.loads(file.read_text())
    assert document["num_steps"] == sum(count for count, _ in document["shapes"]) >= 12
    cases = read_shape_cases(str(file))
    assert cases[0].parameters.query_lens == (1, 1) and "2 decodes" in cases[0].name
    prompt = next(case for case in cases if "prompts" in case.name)
    assert sum(prompt.parameters.query_lens) == 39 and max(prompt.parameters.seq_lens) == 30
    assert sum(case.weight for case in cases) <= 1.0


def test_shapes_need_a_folder(tmp_path):
    with pytest.raises(ConfigError, match="its folder does not exist"):
        LLM(model="quire-tiny", device="cpu", capture_shapes=str(tmp_path / "no" / "shapes.json"))


@pytest.mark.parallel
def test_a_whole_engine_is_compared_by_alternating_runs(capsys):
    """Two processes take turns; the sampler beside itself makes no certain difference."""
    words = ["--only", "greedy", "--workload", "decode-bs2x8x6", "--runs", "5", "--device", "cpu", "--json"]
    assert bench("sampler/gumbel", "--end-to-end", "quire-tiny", *words) == 0
    result = json.loads(capsys.readouterr().out)["end_to_end"]
    assert len(result["subject_rates"]) == len(result["rival_rates"]) == 5 and min(result["subject_rates"]) > 0
    assert result["ratio"]["low"] <= result["ratio"]["median"] <= result["ratio"]["high"]
