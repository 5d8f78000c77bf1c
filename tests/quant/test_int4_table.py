"""The shipped table and the rule beside it name launches that exist and can run."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import pytest

from quire.core.ops.device_profile import PROFILES, DeviceProfile
from quire.core.ops.launch_table import Launch
from quire.plugins.quant.kernels import int4_table
from quire.plugins.quant.kernels.int4_launch import LAUNCHERS

TABLES = sorted((Path(int4_table.__file__).parent / "tables").glob("w4a16_*.json"))
OF_THE_LAYER = {"x", "weights", "bias", "out", "epilogue"}


def check(features: int, most: int, launch: Launch) -> None:
    assert set(launch.options) == set(inspect.signature(LAUNCHERS[launch.kernel]).parameters) - OF_THE_LAYER, launch
    assert launch.kernel in ("gemm_medium_m", "gemm_hopper") or launch.options["block_m"] >= most
    for name in ("block_m", "tiles", "slice_k", "num_warps"):
        value = launch.options.get(name, 1)
        assert value & (value - 1) == 0, f"{name} is no power of two in {launch}"


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_tables(path: Path) -> None:
    (profile,) = [profile for profile in PROFILES if path.stem == f"w4a16_{profile.launch_table}"]
    for name in json.loads(path.read_text())["layers"]:
        features, inputs = map(int, name.split("x"))
        for whole in (True, False):
            steps = int4_table.get_int4_steps(profile, features, inputs, 4, whole)
            assert [most for most, _ in steps] == sorted({most for most, _ in steps})
            for most, (launch,) in steps:
                if launch is not None:
                    check(features, most, launch)
                    assert whole or launch.kernel != "gemm_hopper", "its groups are of whole blocks"


@pytest.mark.parametrize("profile", PROFILES, ids=lambda profile: f"{profile.name}-{profile.num_sms}")
@pytest.mark.parametrize(("features", "inputs"), [(4608, 3584), (3584, 18944), (37888, 3584), (152064, 3584), (64, 32)])
@pytest.mark.parametrize("bits", [4, 8])
def test_layers_that_no_table_names(profile: DeviceProfile, features: int, inputs: int, bits: int) -> None:
    steps = int4_table.get_int4_steps(profile, features, inputs, bits, bits == 4)
    assert steps[0].launches[0] is not None, "one token is never the library's"
    for most, (launch,) in steps:
        if launch is not None:
            check(features, most, launch)
            assert launch.options.get("tiles", 2) % 2 == 0, "gated layers need pairs of tiles"
            assert launch.kernel != "gemm_hopper" or profile.is_hopper
            assert launch.options.get("split_k", 1) <= max(1, inputs * bits // 512)
