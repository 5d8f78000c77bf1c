"""Plugins and their options as users give them: by name and text, or in Python as classes and objects."""

from __future__ import annotations

import enum
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from quire import LLM, SamplingParams
from quire.core.engine.args import EngineArgs
from quire.core.engine.config_builder import build_config
from quire.core.plugin.options import parse_options
from quire.sdk import BatchingPolicy, LogitsProcessor, MetricsExporter, QuireError


class Order(enum.Enum):
    NEWEST = 1
    OLDEST = 2


class Counting(BatchingPolicy):
    """By arrival, one way or the other."""

    @dataclass(frozen=True)
    class Options:
        order: Order = Order.OLDEST
        weights: tuple[float, ...] = (1.0,)
        folder: Path | None = None
        limit: int | None = None

    def __init__(self, options: Options | None = None) -> None:
        super().__init__(options or self.Options())
        self.num_seen = 0

    def admission_key(self, request: Any) -> tuple[Any, ...]:
        self.num_seen += 1
        return (request.arrival_ns,)


class Forbid(LogitsProcessor):
    """One token is never sampled."""

    @dataclass(frozen=True)
    class Options:
        token: int = 0

    def add_row(self, request: Any) -> bool:
        return True

    def remove_row(self, row: int) -> None:
        pass

    def apply(self, logits: Any, batch: Any) -> None:
        logits[:, self.options.token] = float("-inf")


class Prefer(Forbid):
    """One token is always sampled."""

    def apply(self, logits: Any, batch: Any) -> None:
        logits[:, self.options.token] = 1e4


class Silent(MetricsExporter):
    """Records nothing."""

    @dataclass(frozen=True)
    class Options:
        port: int = 1

    def record_engine(self, stats: Any) -> None:
        pass

    def record_request(self, stats: Any) -> None:
        pass

    def record_tokens(self, num_prompt: int, num_generated: int, ttft_s: float | None, itl_s: list[float]) -> None:
        pass


FORBID, PREFER, SILENT = (f"{__name__}:{cls.__name__}" for cls in (Forbid, Prefer, Silent))


def options_of(tiny: Path, kind: str, **arguments: Any) -> dict[str, dict[str, Any]]:
    config = build_config(EngineArgs.from_kwargs(model=str(tiny), device="cpu", **arguments)).config
    return {choice.name: dict(choice.options) for choice in config.plugins_of(kind)}


def test_an_option_without_a_name_is_for_the_one_that_was_named(tiny: Path) -> None:
    given = options_of(
        tiny, "logits_processor", logits_processors=[FORBID], plugin_options={"logits_processor": {"token": "7"}}
    )
    assert given[FORBID] == {"token": "7"} and not any(options for name, options in given.items() if name != FORBID)


def test_options_of_several_go_by_name(tiny: Path) -> None:
    by_key = {f"{FORBID}.token": "7", f"{PREFER}.token": 9}
    by_mapping = {FORBID: Forbid.Options(7), PREFER: {"token": 9}}
    for options in (by_key, by_mapping):
        given = options_of(
            tiny, "logits_processor", logits_processors=[Forbid, Prefer], plugin_options={"logits_processor": options}
        )
        assert int(given[FORBID]["token"]) == 7 and given[PREFER] == {"token": 9}


def test_exporters_are_added_to_the_default(tiny: Path) -> None:
    assert list(options_of(tiny, "metrics")) == ["prometheus"]
    assert list(options_of(tiny, "metrics", metrics=[SILENT])) == ["prometheus", SILENT]
    assert list(options_of(tiny, "metrics", metrics=["none", Silent])) == [SILENT]
    assert list(options_of(tiny, "metrics", metrics=["none"])) == []
    given = options_of(tiny, "metrics", metrics=[SILENT], plugin_options={"metrics": {"port": "9"}})
    assert given == {"prometheus": {}, SILENT: {"port": "9"}}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"logits_processors": [FORBID, PREFER], "plugin_options": {"logits_processor": {"token": "1"}}},
            f"--logits-processor-option token: {FORBID}, {PREFER} are on; say whose it is: --logits-processor-option "
            f"{FORBID}.token=1",
        ),
        (
            {"plugin_options": {"logits_processor": {"token": "1"}}},
            "--logits-processor-option token: none was named with --logits-processor",
        ),
        (
            {"logits_processors": [FORBID], "plugin_options": {"logits_processor": {"forbids.token": "1"}}},
            "forbids.token: no logits processor 'forbids' is on; on are min_tokens",
        ),
        (
            {"logits_processors": [FORBID], "plugin_options": {"logits_processor": {"token": "x"}}},
            "Forbid option token='x' is not a whole number",
        ),
        ({"plugin_options": {"polices": {}}}, "'polices', which is no kind of plugin; did you mean policy?"),
        (
            {"scheduling_policy": Counting, "plugin_options": {"policy": {"limit": 1.5}}},
            "limit=1.5 is not a whole number",
        ),
        ({"scheduling_policy": Counting, "plugin_options": {"policy": {"limit": True}}}, "limit=True is not a whole"),
        ({"scheduling_policy": Counting, "plugin_options": {"policy": 3}}, "a mapping or an Options object, not 3"),
        ({"sampler": object()}, "sampler: an object of type object cannot be used; give a name or a class"),
    ],
)
def test_what_is_meant_for_nobody_is_refused(tiny: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(QuireError) as refused:
        options_of(tiny, "policy", **arguments)
    assert message in str(refused.value)


def test_a_class_inside_a_function_is_refused(tiny: Path) -> None:
    class Local(Counting):
        """By arrival."""

    with pytest.raises(QuireError, match="defined inside a function; define it in a module"):
        options_of(tiny, "policy", scheduling_policy=Local)


def test_options_in_python_are_objects(tiny: Path) -> None:
    wanted = Counting.Options(Order.NEWEST, (0.5, 2), Path("/tmp"), 3)
    given = options_of(tiny, "policy", scheduling_policy=Counting, plugin_options={"policy": wanted})
    assert parse_options(Counting, given[f"{__name__}:Counting"]) == wanted
    mapping = {"order": "newest", "weights": (0.5, 2), "folder": "/tmp", "limit": 3}
    given = options_of(tiny, "policy", scheduling_policy=Counting, plugin_options={"policy": mapping})
    assert parse_options(Counting, given[f"{__name__}:Counting"]) == wanted


def test_an_engine_schedules_with_the_object_that_it_is_given(tiny: Path) -> None:
    policy = Counting(Counting.Options(limit=2))
    llm = LLM(model=str(tiny), device="cpu", max_model_len=64, scheduling_policy=policy)
    try:
        llm.generate(["a", "b"], SamplingParams(max_tokens=2))
        assert policy.num_seen == 2
        assert llm.config.plugin("policy").options["limit"] == 2
    finally:
        llm.shutdown()


def test_options_reach_the_processors_of_a_running_engine(tiny: Path) -> None:
    llm = LLM(
        model=str(tiny),
        device="cpu",
        max_model_len=64,
        logits_processors=[Prefer, Forbid],
        plugin_options={"logits_processor": {PREFER: Prefer.Options(9), FORBID: Forbid.Options(4)}},
    )
    try:
        (output,) = llm.generate("a", SamplingParams(max_tokens=3, ignore_eos=True))
        assert output.outputs[0].token_ids == [9, 9, 9]
    finally:
        llm.shutdown()


OPTIONS_FROM_ELSEWHERE = """
from quire.sdk import LogitsProcessor
import no_such_module

class Base(LogitsProcessor):
    class Options:
        token: int = 0
        mode: "Literal['a', 'b']" = "a"

class Mine(Base):
    pass
"""
REFUSED_EARLY = """
import sys
from quire.core.engine.args import EngineArgs
from quire.core.engine.plugin_names import check_names
from quire.core.errors import QuireError

check_names(EngineArgs(model="any", scheduling_policy="sjf", metrics=["none"], op=["rms_norm=torch"]))
mine = {"logits_processors": ["mine:Mine"], "plugin_options": {"logits_processor": {"token": "3"}}}
check_names(EngineArgs(model="any", **mine))
for text in sys.argv[1:]:
    try:
        check_names(EngineArgs(model="any", **eval(text)))
        print("taken:", text)
    except QuireError as error:
        print(error)
assert "torch" not in sys.modules
"""
NAMED = [
    ("scheduling_policy='sjff'", "did you mean sjf or"),
    ("attention_backend='tritn'", "did you mean triton or"),
    ("metrics=['no_such_module:Exporter']", "no_such_module"),
    ("op=['rms_norm=tritn']", "did you mean triton?"),
    ("op=['rms_nrm=torch']", "did you mean rms_norm?"),
    ("plugins=['no-such']", "--plugin no-such"),
    ("logits_processors=['no_such.py:Mine']", "no_such.py"),
    ("spec_method='ngramm'", "did you mean ngram?"),
    ("structured_output_backend='llguidence'", "did you mean llguidance or guidance?"),
]
MINE = "logits_processors=['mine:Mine']"
OPTIONS = [
    ("policy", "", {"x": "1"}, "FCFSPolicy takes no options; leave out x"),
    ("attention", "attention_backend='triton'", {"fixed_split_sise": "1"}, "did you mean fixed_split_size?"),
    ("attention", "", {"fixed_split_sise": "1"}, "of those of triton, did you mean fixed_split_size?"),
    ("sampler", "", {"x": "1"}, "GumbelSampler takes no options"),
    ("quant", "quantization='none'", {"small_batch_gem": "on"}, "did you mean small_batch_gemm?"),
    ("quant", "", {"small_batch_gem": "on"}, "of those of none, did you mean small_batch_gemm?"),
    ("spec_decode", "spec_method='ngram'", {"prompt_lookup_mim": "2"}, "did you mean prompt_lookup_min"),
    ("spec_decode", "spec_method='ngram'", {"prompt_lookup_min": "few"}, "is not a whole number"),
    ("structured_output", "", {"thread": "2"}, "did you mean threads?"),
    ("adapter", "", {"add_in_prodct": "on"}, "did you mean add_in_product"),
    ("executor", "executor='ray'", {"adress": "x"}, "did you mean address?"),
    ("metrics", "", {"x": "1"}, "PrometheusExporter takes no options"),
    ("tool_parser", "tool_call_parser='hermes'", {"x": "1"}, "takes no options"),
    ("op", "op=['rms_norm=torch']", {"torhc.x": "1"}, "did you mean torch?"),
    ("logits_processor", MINE, {"tokn": "1"}, "Mine has no option 'tokn'; did you mean token?"),
    ("logits_processor", MINE, {"mode": "c"}, "option mode='c' is not one of a, b"),
]  # fmt: skip


def test_misspelt_names_and_options_are_refused_before_torch_is_imported(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(OPTIONS_FROM_ELSEWHERE)
    cases = [(f"dict({text})", reason) for text, reason in NAMED]
    cases += [
        (f"dict({name}, plugin_options={ {kind: given} })".replace("(, ", "("), why)
        for kind, name, given, why in OPTIONS
    ]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(tmp_path), *filter(None, sys.path)))}
    command = [sys.executable, "-c", REFUSED_EARLY, *(text for text, _ in cases)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    for line, (text, reason) in zip(done.stdout.splitlines(), cases, strict=True):
        assert reason in line, text
