import enum
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from quire.core.errors import PluginError, PluginOptionError
from quire.core.plugin.options import parse_options, split_key_values


class Colour(enum.Enum):
    RED = "r"
    BLUE = "b"


class Plain:
    pass


class Rich:
    @dataclass(frozen=True)
    class Options:
        size: int = 4
        share: float = 0.5
        fast: bool = False
        mode: Literal["a", "b"] = "a"
        limit: int | None = None
        names: tuple[str, ...] = ()
        colour: Colour = Colour.RED
        folder: Path = Path(".")

        def __post_init__(self) -> None:
            if self.size < 1:
                raise ValueError("size must be at least 1")


class Odd:
    @dataclass(frozen=True)
    class Options:
        end: bool = False

        def __post_init__(self) -> None:
            if self.end:
                raise SystemExit(3)
            raise KeyError("no such colour")


class Demanding:
    @dataclass(frozen=True)
    class Options:
        size: int


class Thawed:
    @dataclass
    class Options:
        size: int = 1


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "Odd refuses the defaults: it raised KeyError"),
        ({"end": "on"}, "Odd refuses end=on: it raised SystemExit: 3"),
    ],
)
def test_whatever_options_raise_is_a_refusal(given, said):
    with pytest.raises(PluginOptionError, match=said):
        parse_options(Odd, given)


def test_every_type_is_read():
    given = {"size": "8", "share": "0.25", "fast": "on", "mode": "b", "limit": "3", "names": "x, y", "colour": "blue"}
    options = parse_options(Rich, {**given, "folder": "/tmp"})
    assert options == Rich.Options(8, 0.25, True, "b", 3, ("x", "y"), Colour.BLUE, Path("/tmp"))
    assert parse_options(Rich, {"limit": "none"}).limit is None
    assert parse_options(Rich, {}) == Rich.Options()
    assert parse_options(Plain, {}) is None


@pytest.mark.parametrize(
    ("cls", "pairs", "message"),
    [
        (Rich, {"sise": "3"}, "Rich has no option 'sise'; did you mean size?"),
        (Rich, {"size": "big"}, "Rich option size='big' is not a whole number"),
        (Rich, {"size": "1.5"}, "Rich option size='1.5' is not a whole number"),
        (Rich, {"fast": "maybe"}, "Rich option fast='maybe' is not true or false"),
        (Rich, {"mode": "c"}, "Rich option mode='c' is not one of a, b"),
        (Rich, {"limit": "x"}, "Rich option limit='x' is not a whole number or none"),
        (Rich, {"colour": "green"}, "Rich option colour='green' is not one of red, blue"),
        (Rich, {"size": "0"}, "Rich refuses size=0: size must be at least 1"),
        (Plain, {"size": "1"}, "Plain takes no options; leave out size"),
        (Demanding, {}, "Demanding needs the option 'size'; give it as size=VALUE"),
        (Thawed, {}, "Thawed.Options is not frozen; decorate it with @dataclass(frozen=True)"),
    ],
)
def test_errors_are_one_line_with_value_reason_and_remedy(cls, pairs, message):
    with pytest.raises(PluginError) as caught:
        parse_options(cls, pairs)
    assert str(caught.value) == message


def test_pairs_are_split_at_the_first_equals_sign():
    assert split_key_values(["a=1", "b-c=x=y"]) == {"a": "1", "b_c": "x=y"}
    with pytest.raises(PluginError, match="--sampler-option 'a': there is no '='; write --sampler-option key=value"):
        split_key_values(["a"], "--sampler-option")
    with pytest.raises(PluginError, match="given already as '1'"):
        split_key_values(["a=1", "a=2"])
