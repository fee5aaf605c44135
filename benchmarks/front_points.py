"""What benchmarks/front.py found, as tables, sentences and a picture."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
from pictures import pyplot, save_picture

OURS = "awq-onnx"
LAYERS, FRONT = PARTS = ("layers", "front")
RIVAL_BLOCK = "block 32"  # of the other tools, with which our larger blocks are compared
STYLES = (("s", "C0"), ("D", "C1"), ("^", "C2"), ("v", "C4"), ("P", "C5"), ("X", "C6"), ("*", "C8"))  # of other tools
HEADERS = {
    LAYERS: "| layers: tool | settings | bits of their weights | KL, mean +-SE | top-1 | size | seconds |",
    FRONT: "| whole model: tool | settings | bits | KL, mean +-SE | top-1 | size | seconds |",
}


@dataclass(frozen=True)
class Measured:
    """bits: of a weight. All but the seconds are None where `trouble` tells what went wrong."""

    seconds: float
    kl: float | None = None
    kl_se: float | None = None
    top1: float | None = None
    bits: float | None = None
    size: int | None = None
    trouble: str = ""


@dataclass(frozen=True)
class Point:
    part: str
    tool: str
    settings: str
    measured: Measured

    @property
    def name(self) -> str:
        return f"{self.tool}, {self.settings}"

    @property
    def is_ours(self) -> bool:
        return self.tool == OURS

    def at(self) -> tuple[float, float] | None:
        """Bits and KL."""
        one = self.measured
        return None if one.bits is None or one.kl is None else (one.bits, one.kl)


def row(point: Point) -> str:
    one, start = point.measured, f"| {point.tool} | {point.settings} |"
    if one.kl is None or one.kl_se is None or one.bits is None or one.top1 is None or one.size is None:
        return f"{start} - | {one.trouble} | - | - | {one.seconds:.0f} |"
    kl = f"{one.kl:.4f} +-{one.kl_se:.4f}"
    return f"{start} {one.bits:.3f} | {kl} | {one.top1:.1%} | {one.size / 1e6:.1f} MB | {one.seconds:.0f} |"


def table(part: str, points: Iterator[Point] | Sequence[Point]) -> Iterator[str]:
    """Markdown, line by line as points are known; nothing where there are none."""
    for number, point in enumerate(points):
        if number == 0:
            yield f"\n{HEADERS[part]}\n|---|---|---|---|---|---|---|"
        yield row(point)


def verdicts(points: Sequence[Point]) -> Iterator[str]:
    yield from layers_verdict([one for one in points if one.part == LAYERS and one.at()])
    yield from front_verdict([one for one in points if one.part == FRONT and one.at()])


def layers_verdict(points: Sequence[Point]) -> Iterator[str]:
    """Each of ours beside blocks of 32 of every other tool."""
    rivals = [one for one in points if not one.is_ours and one.settings.startswith(RIVAL_BLOCK)]
    if not rivals:
        return
    best = min(rivals, key=lambda one: one.measured.kl or 0)
    yield f"\nThe best of other tools at {RIVAL_BLOCK} is {best.name}, KL {best.measured.kl:.4f}:"
    for one in points:
        if one.is_ours and one.measured.kl is not None and best.measured.kl:
            yield f"  {one.name}: {one.measured.bits:.2f} bits, {one.measured.kl / best.measured.kl:.2f} of its KL"


def front_verdict(points: Sequence[Point]) -> Iterator[str]:
    """Whether each point of another tool lies above our curve."""
    curve = curve_of(points)
    if len(curve) < 2:
        return
    yield "\nOther tools beside our curve, in multiples of its KL at the same bits:"
    for one in points:
        where = one.at()
        if one.is_ours or where is None:
            continue
        ours = kl_at(curve, where[0])
        if ours is None:
            yield f"  {one.name}: {where[0]:.2f} bits are outside of our curve"
            continue
        place = "above" if where[1] > ours else "BELOW"
        yield f"  {one.name}: {place}, {where[1] / ours:.2f} x {ours:.4f} at {where[0]:.2f} bits"


def curve_of(points: Sequence[Point]) -> list[tuple[float, float]]:
    """Bits and KL of ours, sorted."""
    return sorted(where for one in points if one.part == FRONT and one.is_ours and (where := one.at()))


def kl_at(curve: Sequence[tuple[float, float]], bits: float) -> float | None:
    """Straight lines between points: what a mixture of the two loses. None outside."""
    if not curve[0][0] <= bits <= curve[-1][0]:
        return None
    return float(np.interp(bits, [x for x, _ in curve], [kl for _, kl in curve]))


def plot(points: Sequence[Point], path: Path) -> None:
    """KL over bits of the whole model: our curve, and every other tool's points."""
    shown = [one for one in points if one.part == FRONT and one.at()]
    if not shown:
        sys.exit("front.py: nothing to plot: there is no point of the whole model")
    figure, axes = pyplot().subplots(figsize=(9, 6), layout="constrained")
    curve = curve_of(shown)
    if curve:
        between = np.linspace(curve[0][0], curve[-1][0], 500)
        axes.plot(between, [kl_at(curve, bits) for bits in between], "C3-", linewidth=2.5, zorder=3)
        axes.plot(*zip(*curve, strict=True), "C3o", markersize=6, label=OURS, zorder=3)
    others = {tool: [one for one in shown if one.tool == tool] for tool in tools_of(shown)}
    for tool, style, below in zip(others, cycle(STYLES), cycle((False, True)), strict=False):
        _scatter(axes, others[tool], tool, *style, below=below)
    _label(axes)
    save_picture(figure, path)


def tools_of(points: Sequence[Point]) -> list[str]:
    """The other tools, in order."""
    return list(dict.fromkeys(one.tool for one in points if not one.is_ours))


def _scatter(axes: Any, points: Sequence[Point], tool: str, marker: str, colour: str, *, below: bool) -> None:
    """below: whether names go below their points; tools with neighbouring points take turns."""
    places = [where for one in points if (where := one.at())]
    axes.plot(*zip(*places, strict=True), marker, color=colour, markersize=7, label=tool, zorder=2)
    for one, where in zip(points, places, strict=True):
        text = one.settings.removesuffix(", own head")
        axes.annotate(
            text, where, xytext=(6, -11 if below else 3), textcoords="offset points", fontsize="small", color=colour
        )


def _label(axes: Any) -> None:
    axes.set(yscale="log", xlabel="bits of a weight, everything in the file counted", ylabel="KL to the original, nats")
    low, high = axes.get_ylim()
    ticks = [digit * 10.0**power for power in range(-4, 2) for digit in (1, 2, 5)]
    ticks = [tick for tick in ticks if low <= tick <= high]
    axes.minorticks_off()
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.grid(color="0.9")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower left")


def save(points: Sequence[Point], path: Path) -> None:
    path.write_text(json.dumps([asdict(one) for one in points], indent=2) + "\n")


def load(paths: Sequence[Path]) -> list[Point]:
    """Of all files; of a point that is in several the last counts."""
    entries = [entry for path in paths for entry in json.loads(path.read_text())]
    points = [Point(**{**entry, "measured": Measured(**entry["measured"])}) for entry in entries]
    return list({(one.part, one.name): one for one in points}.values())
