"""Layers that differ only in a number of their name, told together: thirty lines as one."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

Row = TypeVar("Row")
NUMBER = re.compile(r"(\d+)")


def alike(rows: Sequence[Row], name: Callable[[Row], str], rest: Callable[[Row], Hashable]) -> list[list[Row]]:
    """The rows in groups with one name but for its numbers, and the same `rest`; in the order of the first of each."""
    groups: dict[Hashable, list[Row]] = {}
    for row in rows:
        groups.setdefault((without_numbers(name(row)), rest(row)), []).append(row)
    return list(groups.values())


def without_numbers(name: str) -> str:
    """layers.3/mlp as layers.*/mlp."""
    return NUMBER.sub("*", name)


def pattern(names: Sequence[str]) -> str:
    """One name for several that differ only in numbers: layers.{0-29}/mlp, or layers.* where the numbers have gaps."""
    parts = zip(*(NUMBER.split(name) for name in names), strict=True)  # numbers stand at odd places
    return "".join(_range(part) if at % 2 else part[0] for at, part in enumerate(parts))


def _range(numbers: Sequence[str]) -> str:
    known = sorted({int(one) for one in numbers})
    if len(known) == 1:
        return numbers[0]
    whole = known[-1] - known[0] + 1 == len(known)
    return f"{{{known[0]}-{known[-1]}}}" if whole else "*"
