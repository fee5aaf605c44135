"""Where the bits go: one option for each item, of the least loss in total that a budget allows. Knows no graph.

This is the multiple-choice knapsack. On the lower convex hull of each item's (size, loss) points the steps are taken in
the order of what they save per byte, which solves its relaxation exactly (Sinha & Zoltners 1979, The multiple-choice
knapsack problem); what is then left of the budget goes to the best steps that still fit, off the hull as well. The
result loses at most what one step of one item would save.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True)
class Option:
    """What an item could be: its size, and what it loses then."""

    size_bytes: int
    loss: float


def allocate(items: Sequence[Sequence[Option]], budget_bytes: int) -> list[int] | None:
    """The index of the option of each item; None where not even the smallest ones fit."""
    hulls = [_hull(options) for options in items]
    chosen = [hull[0] for hull in hulls]
    left = budget_bytes - sum(options[at].size_bytes for options, at in zip(items, chosen, strict=True))
    if left < 0:
        return None
    steps = [(gain, item, after) for item, hull in enumerate(hulls) for gain, after in _steps(items[item], hull)]
    blocked: set[int] = set()
    for _, item, after in sorted(steps, key=lambda step: (-step[0], step[1])):
        cost = items[item][after].size_bytes - items[item][chosen[item]].size_bytes
        if item in blocked or cost > left:
            blocked.add(item)
            continue
        chosen[item] = after
        left -= cost
    return _filled(items, chosen, left)


def _hull(options: Sequence[Option]) -> list[int]:
    """The options on the lower convex hull, from the smallest on: each larger one loses less."""
    hull: list[int] = []
    for at in sorted(range(len(options)), key=lambda at: (options[at].size_bytes, options[at].loss)):
        if hull and options[at].loss >= options[hull[-1]].loss:
            continue
        while len(hull) > 1 and _rate(options, hull[-2], hull[-1]) <= _rate(options, hull[-1], at):
            hull.pop()
        hull.append(at)
    return hull


def _rate(options: Sequence[Option], before: int, after: int) -> float:
    """What a step saves per byte."""
    size = options[after].size_bytes - options[before].size_bytes
    return (options[before].loss - options[after].loss) / size if size > 0 else float("inf")


def _steps(options: Sequence[Option], hull: Sequence[int]) -> Iterator[tuple[float, int]]:
    return ((_rate(options, before, after), after) for before, after in pairwise(hull))


def _filled(items: Sequence[Sequence[Option]], chosen: list[int], left: int) -> list[int]:
    """With the single changes that save most and still fit, until none does."""
    while True:
        changes = [
            (options[chosen[item]].loss - option.loss, item, at)
            for item, options in enumerate(items)
            for at, option in enumerate(options)
            if option.size_bytes - options[chosen[item]].size_bytes <= left and option.loss < options[chosen[item]].loss
        ]
        if not changes:
            return chosen
        _, item, at = max(changes, key=lambda change: (change[0], -change[1]))
        left -= items[item][at].size_bytes - items[item][chosen[item]].size_bytes
        chosen[item] = at
