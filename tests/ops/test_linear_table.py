"""The shipped table and the rule beside it name launches that exist and can run."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import pytest

from quire.core.ops.device_profile import INTERPRETER, PROFILES, DeviceProfile
from quire.core.ops.kernels import linear_kernel as linear
from quire.core.ops.launch_table import Launch

TABLES = sorted((Path(linear.__file__).parent / "tables").glob("*.json"))
OF_THE_LAYER = ("x", "weight", "bias", "out", "norm", "epilogue")
HOPPER = [profile for profile in PROFILES if profile.is_hopper]


def check(launch: Launch, most: int) -> None:
    expected = set(inspect.signature(linear.LAUNCHERS[launch.kernel]).parameters) - set(OF_THE_LAYER)
    assert set(launch.options) == expected, launch
    assert launch.options.get("block_m", 1) >= most
    for name in ("block_m", "block_n", "block_k", "slice_k", "num_warps"):
        value = launch.options.get(name, 1)
        assert value & (value - 1) == 0, f"{name} is no power of two in {launch}"


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_tables(path: Path) -> None:
    (profile,) = [profile for profile in PROFILES if path.stem == f"bf16_{profile.launch_table}"]
    for name in json.loads(path.read_text())["layers"]:
        features, inputs = map(int, name.split("x"))
        steps = linear.get_bf16_steps(profile, features, inputs)
        assert [most for most, _ in steps] == sorted({most for most, _ in steps})
        for most, launches in steps:
            assert len(launches) == 1
            if launches[0] is not None:
                check(launches[0], most)


@pytest.mark.parametrize("profile", HOPPER, ids=lambda profile: f"{profile.name}-{profile.num_sms}")
@pytest.mark.parametrize(("features", "inputs"), [(4608, 3584), (3584, 18944), (37888, 3584), (152064, 3584), (64, 32)])
def test_layers_that_no_table_names(features: int, inputs: int, profile: DeviceProfile) -> None:
    steps = linear.get_bf16_steps(profile, features, inputs)
    assert steps[0].launches[0] is not None
    for most, (launch,) in steps:
        if launch is not None:
            check(launch, most)


def test_other_devices_have_the_library() -> None:
    for profile in (*PROFILES, INTERPRETER):
        assert profile.is_hopper or linear.get_bf16_steps(profile, 4096, 4096) == ()
