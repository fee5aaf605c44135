"""Dataclasses to plain values and back."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest

from awq_onnx.plain import built, plain


@dataclass(frozen=True)
class Inner:
    number: float
    name: str | None = None


@dataclass(frozen=True)
class Outer:
    inner: Inner
    several: tuple[Inner, ...]
    numbers: tuple[float | None, ...]
    named: Mapping[str, int] = field(default_factory=dict)
    flag: bool = False


OUTER = Outer(Inner(0.5, "a"), (Inner(1.0), Inner(2.0)), (1.5, None), {"x": 1}, True)


def test_json_gives_the_same_back() -> None:
    assert built(Outer, json.loads(json.dumps(plain(OUTER)))) == OUTER


def test_what_has_a_default_may_be_left_out() -> None:
    assert built(Outer, {"inner": {"number": 1}, "several": [], "numbers": []}) == Outer(Inner(1.0), (), ())


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_what_is_no_finite_number_is_written_as_none_and_read_as_nan(number: float) -> None:
    assert plain(Inner(number)) == {"number": None, "name": None}
    assert math.isnan(built(Inner, {"number": None}).number)
    assert built(tuple[float | None, ...], plain((number, 1.0))) == (None, 1.0)


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"inner": 1}, "it.inner is no Inner"),
        ({"inner": {}}, "it.inner has no number"),
        ({"inner": {"number": "1"}}, "it.inner.number is no float"),
        ({"inner": {"number": True}}, "it.inner.number is no float"),
        ({"several": {}}, "it.several is no tuple"),
        ({"several": [{"number": 1}, 2]}, r"it.several\[1\] is no Inner"),
        ({"numbers": "12"}, "it.numbers is no tuple"),
        ({"named": [1]}, "it.named is no Mapping"),
        ({"named": {"x": 1.5}}, "it.named.x is no int"),
        ({"flag": 1}, "it.flag is no bool"),
        ({"other": 1}, "it has other, which is unknown"),
    ],
)
def test_what_is_something_else_is_named(changed: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        built(Outer, plain(OUTER) | changed)
