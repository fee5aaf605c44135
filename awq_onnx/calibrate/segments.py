"""Run a graph part by part, so that one part's weights and sums are alive.

onnxruntime runs a part node by node, nothing fused and all of it in fp32 (a half-precision model as its float32 twin,
where it would keep some values between nodes in fp32 and round others), so that where the cuts are changes no bit.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from awq_onnx import runtime
from awq_onnx.calibrate.feeds import Feed
from awq_onnx.calibrate.parts import MASKS, Order, Part, cut, extract
from awq_onnx.calibrate.shelf import Shelf, Values
from awq_onnx.device import PROCESSOR, Device
from awq_onnx.errors import CalibrationError
from awq_onnx.passes.absorb import Group
from awq_onnx.passes.switch import StandIn, substitute
from awq_onnx.progress import unheard
from awq_onnx.statistics import Accumulator, InputStatistics
from awq_onnx.store import OpenedModel
from awq_onnx.threads import Spread, one_by_one
from awq_onnx.widen import HALVES

Statistics: TypeAlias = "Mapping[str, InputStatistics]"  # by the name of an input of a group
StandIns: TypeAlias = "Callable[[Collection[str]], Mapping[str, StandIn]]"  # of layers, by the names of what they make

SHADOW = "\1"  # before the name of a value: what it is where the layers before are quantised
VALIDATION_EVERY = 8  # one feed in so many, and one where there are fewer
VALIDATION_ROWS = 512  # of every input, in all
SHARE = 4  # one part in so many of the budget is for second moments, and one for what waits between parts
PART_BYTES = 48 << 20  # of second moments in one part, which holds at least one node


@dataclass(frozen=True)
class Data:
    """What runs through the parts. feeds: what is summed. measured: what goes on to the `outputs` of the model, and is
    in no sum.
    """

    feeds: Sequence[Feed]
    measured: Sequence[Feed] = ()
    outputs: Sequence[str] = ()


@dataclass(frozen=True)
class Saved:
    """What `Segments.save` wrote. end: how many nodes had run."""

    path: Path
    end: int
    count: int

    @classmethod
    def read(cls, path: Path, end: int, feeds: int) -> Saved | None:
        """Of so many feeds. None where the file is damaged."""
        try:
            with zipfile.ZipFile(path) as file:
                return None if file.testzip() else cls(path, end, feeds)
        except (OSError, EOFError, ValueError, NotImplementedError, zipfile.BadZipFile):
            return None

    @property
    def feeds(self) -> Iterator[Feed]:
        """What was alive then, read one after the other."""
        with np.load(self.path) as arrays:
            for at in range(self.count):
                yield {name.split(":", 1)[1]: arrays[name] for name in arrays.files if name.startswith(f"{at}:")}


class Segments:
    """A model in parts, and the data on their way through it."""

    def __init__(
        self,
        opened: OpenedModel,
        groups: Sequence[Group],
        data: Data,
        *,
        folder: Path,
        budget_bytes: int,
        finished: Collection[Group] = (),
        saved: Saved | None = None,
        spread: Spread = one_by_one,
        device: Device = PROCESSOR,
        stand_ins: StandIns | None = None,
    ) -> None:
        """folder: for values that do not fit into memory. budget_bytes: of memory. finished: those of `groups` that are
        not wanted any more; saved: where `save` left off. spread: a map for pieces of work. device: what runs the parts
        and sums. stand_ins: asked for quantised layers before they run, of groups that are done with by then: what is
        summed is then what reaches a layer behind these, and how it drifts from the original.
        """
        self._opened = opened
        self._groups = [group for group in groups if group not in finished]
        self._spread = spread
        self._device = device
        self._outputs = tuple(data.outputs)
        self._summed = len(data.feeds)
        self._apart = _validation_rows(self._summed)
        share_bytes = budget_bytes // SHARE
        self._end = saved.end if saved else 0
        self._stand_ins = stand_ins
        order = Order() if stand_ins is None else Order.of(opened.model.graph, groups)
        self._replaceable = order.replaceable
        part_bytes = min(PART_BYTES, share_bytes)
        self.parts = cut(opened.model.graph, groups, part_bytes, data.outputs, self._end, order.firsts)
        self._known: dict[Group, dict[str, InputStatistics]] = {group: {} for group in self._groups}
        feeds = [*data.feeds, *data.measured] if saved is None else saved.feeds
        self._shelf = Shelf(folder, share_bytes, map(in_float32, feeds))

    def run(
        self, *, make_room: Callable[[int], None] = unheard, advance: Callable[[float], None] = unheard
    ) -> Iterator[list[tuple[Group, Statistics]]]:
        """Run the parts; after each, the groups whose inputs are all known, with their statistics.

        The order is that of the graph, wherever it is cut. Groups with inputs that the graph does not make by running
        it (in the body of a Loop) come without those; last, where that is all of them.
        make_room: told the bytes that the next part takes. advance: told the fraction of all running just done.
        """
        known = self._known
        coming = {name for part in self.parts for name in part.taps}
        missing = {group: {v.name or "" for v in group.inputs} & coming for group in self._groups}
        made_at = {v.name or "": at for at, node in enumerate(self._opened.model.graph) for v in node.outputs}
        ready_at = {group: max((made_at.get(n, -1) for n in names), default=None) for group, names in missing.items()}
        wanted = {name for names in missing.values() for name in names}
        for part in self.parts:
            make_room(part.size_bytes * (1 if self._stand_ins is None else 2))  # drifts are as large as moments
            made = self._run_part(part, wanted, advance)
            for group, names in missing.items():
                known[group].update((name, one) for name, one in made.items() if name in names)
                names.difference_update(made)
            made.clear()
            ready = {group: at for group in missing if (at := ready_at[group]) is not None and not missing[group]}
            for group in ready:
                del missing[group]
            self._end = part.end
            yield [(group, known.pop(group)) for group in sorted(ready, key=ready.__getitem__)]
        yield [(group, known.pop(group)) for group in missing]

    @property
    def can_be_saved(self) -> bool:
        """Whether no group waits for the rest of its inputs."""
        return not any(self._known.values())

    def save(self, path: Path) -> int:
        """Write what is alive after the parts that have run, to go on from as `Saved`; how many nodes these have."""
        unfinished = path.with_suffix(".tmp")
        with unfinished.open("wb") as file:
            arrays = {f"{at}:{name}": one for at, alive in enumerate(self._shelf.feeds) for name, one in alive.items()}
            np.savez(file, **arrays)  # type: ignore[arg-type]
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
        return self._end

    @property
    def measured(self) -> list[list[NDArray[np.generic]]]:
        """The outputs of the model for what was measured, once all parts have run."""
        return [[alive[name] for name in self._outputs] for alive in self._shelf.feeds[self._summed :]]

    def _run_part(
        self, part: Part, wanted: Collection[str], advance: Callable[[float], None]
    ) -> dict[str, InputStatistics]:
        session = shadow = None
        stand_ins = self._stand_ins_in(part)
        twice = bool(stand_ins) or self._has_shadow(part.reads)
        sums = {name: Accumulator(K, self._device) for name, K in part.taps.items() if name in wanted}
        share = part.share / (sum(one.share for one in self.parts) or 1) / len(self._shelf.feeds)
        for position, alive in enumerate(self._shelf.feeds):
            if part.tail and position < self._summed:
                self._shelf.drop(alive, list(alive))
                advance(share)
                continue
            if session is None and part.makes:
                session = self._session(part, alive)
            made = _made(session, part, alive)
            if position < self._summed:
                if twice:
                    shadow = shadow or self._session(part, alive, stand_ins)
                    made |= {SHADOW + name: one for name, one in _made(shadow, part, _in_shadow(alive)).items()}
                self._add(sums, {**alive, **made}, self._apart.get(position, 0))
            dead = part.dead_after | {SHADOW + name for name in part.dead_after}
            self._shelf.put(alive, {name: values for name, values in made.items() if name not in dead})
            del made
            self._shelf.drop(alive, dead)
            advance(share)
        return {name: _finished(name, accumulator) for name, accumulator in sums.items()}

    def _session(self, part: Part, alive: Feed, stand_ins: Mapping[str, StandIn] | None = None) -> Any:
        model = extract(self._opened.model, part, alive)
        if stand_ins:
            substitute(model, stand_ins)
        graph, providers = model.SerializeToString(), self._device.providers
        return runtime.session(graph, self._opened.folder, fuse=False, spin=False, half=False, providers=providers)

    def _stand_ins_in(self, part: Part) -> Mapping[str, StandIn]:
        made = {output.name or "" for node in part.nodes for output in node.outputs} & self._replaceable
        return self._stand_ins(made) if self._stand_ins is not None and made and not part.tail else {}

    def _has_shadow(self, names: Iterable[str]) -> bool:
        """Whether any of these values is another one where the layers before are quantised."""
        return any(SHADOW + name in alive for alive in self._shelf.feeds[:1] for name in names)

    def _add(self, sums: Mapping[str, Accumulator], alive: Feed, validation_rows: int) -> None:
        def add(name: str) -> None:
            sums[name].update(_rows(alive[name], alive), validation_rows)

        drifting = {name for name in sums if SHADOW + name in alive}  # a part has few, so that each is summed in pieces
        for name in drifting:
            there, wanted = (_rows(alive[one], alive) for one in (SHADOW + name, name))
            sums[name].update(there, validation_rows, wanted, self._spread)
        still = sorted(sums.keys() - drifting, key=lambda name: -alive[name].shape[-1])  # the longest work first
        for _ in self._spread(add, still):
            pass


def _made(session: Any, part: Part, alive: Feed) -> Values:
    """What a part makes of what it reads."""
    if session is None:
        return {}
    names = list(part.makes)
    return dict(zip(names, runtime.run(session, names, {name: alive[name] for name in part.reads}), strict=True))


def _in_shadow(alive: Feed) -> Feed:
    """The values where the layers before are quantised, those that are the same included."""
    return {name: alive.get(SHADOW + name, one) for name, one in alive.items()}


def in_float32(feed: Feed) -> Values:
    """For the float32 twin of a model of half precision."""
    return {name: one.astype(np.float32) if one.dtype in HALVES else one for name, one in feed.items()}


def _validation_rows(feeds: int) -> dict[int, int]:
    """How many rows to keep for validation of which feeds: whole sequences, in H none of their other rows."""
    chosen = range(VALIDATION_EVERY // 2, feeds, VALIDATION_EVERY) or range(feeds // 2, feeds // 2 + (feeds > 1))
    chosen = chosen[:: 1 + len(chosen) // VALIDATION_ROWS]
    return {position: VALIDATION_ROWS // len(chosen) for position in chosen}


def _finished(name: str, accumulator: Accumulator) -> InputStatistics:
    statistics = accumulator.finish()
    only_spoiled = accumulator.spoiled_rows and not statistics.tokens
    if only_spoiled or not np.isfinite(statistics.second_moment).all():
        raise CalibrationError(
            f"the activation {name} is NaN, Inf or beyond fp32 on all of the calibration data; "
            "the model, or the data, cannot be right"
        )
    return statistics


def _rows(activation: NDArray[np.generic], alive: Feed) -> NDArray[np.generic]:
    """An activation (…, K) as rows (T, K), without the rows of padding where there is a mask to tell."""
    rows = activation.reshape(-1, activation.shape[-1])  # (T, K)
    for name in MASKS:
        mask = alive.get(name)
        if mask is not None and mask.ndim == 2 and activation.shape[:-1] in (mask.shape, (mask.size,)):
            real: NDArray[np.generic] = rows if mask.all() else rows[mask.astype(bool).reshape(-1)]
            return real
    return rows
