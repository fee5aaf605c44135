"""Dataclasses as the plain values that JSON can hold, and back again, checked."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints


def plain(value: Any) -> Any:
    """Dataclasses as dicts, tuples as lists, numbers that JSON has none for as None."""
    if is_dataclass(value):
        return {one.name: plain(getattr(value, one.name)) for one in fields(value)}
    if isinstance(value, Mapping):
        return {name: plain(one) for name, one in value.items()}
    if isinstance(value, tuple | list):
        return [plain(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def built(kind: Any, value: Any, what: str = "it") -> Any:
    """What `plain` made `value` of. NaN stands where a float could not be written.

    kind: a dataclass, X | None, tuple[X, ...], Mapping[str, X], bool, int, float or str. what: the name of the value,
    for the ValueError where it is something else.
    """
    inner = get_args(kind)
    if get_origin(kind) is UnionType:
        return None if value is None else built(inner[0], value, what)
    if is_dataclass(kind) and isinstance(value, Mapping):
        return _built_dataclass(kind, value, what)
    if get_origin(kind) is tuple and isinstance(value, list | tuple):
        return tuple(built(inner[0], one, f"{what}[{at}]") for at, one in enumerate(value))
    if get_origin(kind) is Mapping and isinstance(value, Mapping):
        return {str(name): built(inner[1], one, f"{what}.{name}") for name, one in value.items()}
    if kind is float and (value is None or type(value) is int):
        return math.nan if value is None else float(value)
    if type(value) is not kind:
        raise ValueError(f"{what} is no {getattr(kind, '__name__', kind)}")
    return value


_hints = cache(get_type_hints)


def _built_dataclass(kind: Any, values: Mapping[str, Any], what: str) -> Any:
    hints, known = _hints(kind), {one.name: one for one in fields(kind)}
    strange = [name for name in values if name not in known]
    needed = [name for name, one in known.items() if one.default is one.default_factory is MISSING]
    missing = [name for name in needed if name not in values]
    if strange or missing:
        raise ValueError(f"{what} has no {missing[0]}" if missing else f"{what} has {strange[0]}, which is unknown")
    return kind(**{name: built(hints[name], one, f"{what}.{name}") for name, one in values.items()})
