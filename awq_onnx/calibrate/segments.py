"""Cut the graph into parts and run them one after the other, so that one part's weights and sums are alive.

A part is a run of the topologically sorted nodes, cut where few tensors are alive and sized by a budget; nothing
about transformers is assumed. Its inputs are the tensors that the parts before it left for it. onnxruntime runs a
part node by node, nothing fused and all of it in fp32 (a half-precision model as its float32 twin, where it would keep
some values between nodes in fp32 and round others), so that where the cuts are changes no bit.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir import serde

from awq_onnx import runtime
from awq_onnx.calibrate.feeds import Feed
from awq_onnx.calibrate.shelf import Shelf, Values
from awq_onnx.device import PROCESSOR, Device
from awq_onnx.errors import CalibrationError
from awq_onnx.passes.absorb import Group
from awq_onnx.passes.bodies import all_bodies
from awq_onnx.passes.constants import stored
from awq_onnx.progress import unheard
from awq_onnx.statistics import Accumulator, InputStatistics
from awq_onnx.store import OpenedModel
from awq_onnx.threads import Spread, one_by_one
from awq_onnx.widen import HALVES

Statistics: TypeAlias = "Mapping[str, InputStatistics]"  # by the name of an input of a group

MASKS = ("attention_mask", "encoder_attention_mask", "decoder_attention_mask")
VALIDATION_EVERY = 8  # one feed in so many, and one where there are fewer
VALIDATION_ROWS = 512  # of every input, in all
WEIGHT_BYTES = 512 << 20  # of weights in one part, in fp32
SHARE = 4  # one part in so many of the budget is for second moments, and one for what waits between parts
PART_BYTES = 48 << 20  # of second moments in one part, which holds at least one node


@dataclass(frozen=True)
class Part:
    """nodes: in graph order. end: how many come before and in it. taps: the inputs of groups that are known once the
    part has run, name -> K. tail: whether it leads to outputs of the model alone. size_bytes: of what is held while it
    runs; share: of all work.
    """

    nodes: tuple[ir.Node, ...]
    taps: Mapping[str, int]
    reads: tuple[str, ...]
    makes: tuple[str, ...]
    dead_after: frozenset[str] = field(repr=False)
    end: int = 0
    tail: bool = False
    size_bytes: int = 0
    share: float = 0.0


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
    ) -> None:
        """folder: for values that do not fit into memory. budget_bytes: of memory. finished: those of `groups` that are
        not wanted any more; saved: where `save` left off. spread: a map for pieces of work. device: what runs the parts
        and sums.
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
        self.parts = cut(opened.model.graph, groups, min(PART_BYTES, share_bytes), data.outputs, self._end)
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
            make_room(part.size_bytes)
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
        sums = {name: Accumulator(K, self._device) for name, K in part.taps.items() if name in wanted}
        session = None
        share = part.share / (sum(one.share for one in self.parts) or 1) / len(self._shelf.feeds)
        for position, alive in enumerate(self._shelf.feeds):
            if part.tail and position < self._summed:
                self._shelf.drop(alive, list(alive))
                advance(share)
                continue
            if session is None and part.makes:
                session = self._session(part, alive)
            made = dict(
                zip(part.makes, runtime.run(session, list(part.makes), {n: alive[n] for n in part.reads}), strict=True)
                if session is not None
                else ()
            )
            if position < self._summed:
                self._add(sums, {**alive, **made}, self._apart.get(position, 0))
            self._shelf.put(alive, {name: values for name, values in made.items() if name not in part.dead_after})
            del made
            self._shelf.drop(alive, part.dead_after)
            advance(share)
        return {name: _finished(name, accumulator) for name, accumulator in sums.items()}

    def _session(self, part: Part, alive: Feed) -> Any:
        model = extract(self._opened.model, part, alive).SerializeToString()
        providers = self._device.providers
        return runtime.session(model, self._opened.folder, fuse=False, spin=False, half=False, providers=providers)

    def _add(self, sums: Mapping[str, Accumulator], alive: Feed, validation_rows: int) -> None:
        def add(name: str) -> None:
            sums[name].update(_rows(alive[name], alive), validation_rows)

        for _ in self._spread(add, sorted(sums, key=lambda name: -alive[name].shape[-1])):  # the longest work first
            pass


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


def cut(
    graph: ir.Graph, groups: Sequence[Group], part_bytes: int, outputs: Sequence[str] = (), begin: int = 0
) -> list[Part]:
    """The parts that lead to all inputs of `groups`, then those that lead to `outputs` alone; no other nodes.

    begin: so many nodes have run already.
    """
    reading = {node: reads(node) for node in graph}
    body = _needed(reading, {value.name or "" for group in groups for value in group.inputs})
    inside = set(body)
    tail = [node for node in _needed(reading, set(outputs)) if node not in inside]
    nodes = [*body, *tail]
    last_read = {name: position for position, node in enumerate(nodes) for name in reading[node]}
    last_read.update(dict.fromkeys(outputs, len(nodes)))
    waiting = {value.name or "": group.K for group in groups for value in group.inputs}
    kept = {*MASKS, *outputs}  # masks tell padding to every part, whoever reads them
    moments, weights = _sizes(nodes, waiting)
    total = max(sum(moments) + sum(weights), 1)
    known = {value.name or "" for value in graph.inputs}
    given = {name: waiting.pop(name) for name in list(waiting) if name in known}
    parts = [Part(nodes=(), taps=given, reads=(), makes=(), dead_after=frozenset())] if given and not begin else []
    start = 0
    for stop in _cuts(nodes, last_read, moments, weights, part_bytes, (0, begin, len(body), len(nodes))):
        run = nodes[start:stop]
        made = dict.fromkeys(output.name or "" for node in run for output in node.outputs)
        read = dict.fromkeys(name for node in run for name in reading[node] if name not in made)
        taps = {name: waiting.pop(name) for name in list(waiting) if name in made}
        later = {name for name in made if last_read.get(name, -1) >= stop}
        makes = [name for name in made if name in later or name in taps]
        known.update(makes)
        dead = frozenset(name for name in known if last_read.get(name, -1) < stop) - kept
        parts.append(
            Part(
                nodes=tuple(run),
                taps=taps,
                reads=tuple(read),
                makes=tuple(makes),
                dead_after=dead,
                end=stop,
                tail=start >= len(body),
                size_bytes=sum(moments[start:stop]) + max(weights[start:stop], default=0),
                share=(sum(moments[start:stop]) + sum(weights[start:stop])) / total,
            )
        )
        known -= dead
        start = stop
    return [part for part in parts if part.end > begin or not begin]


def _sizes(nodes: Sequence[ir.Node], tapped: Mapping[str, int]) -> tuple[list[int], list[int]]:
    """Bytes of the second moments of what each node makes, and of its weights in fp32."""
    made = ([output.name or "" for output in node.outputs] for node in nodes)
    moments = [sum(4 * tapped[name] ** 2 for name in names if name in tapped) for names in made]
    return moments, [_weight_bytes(node) for node in nodes]


def _cuts(
    nodes: Sequence[ir.Node],
    last_read: Mapping[str, int],
    moments: Sequence[int],
    weights: Sequence[int],
    part_bytes: int,
    borders: Sequence[int],
) -> list[int]:
    """Where parts end: close to the budget, at the places where the fewest tensors are alive, and at the borders.

    Moments count, and to a bound that hardly any layer reaches weights: they are mapped, but those of half precision
    are cast, all of a part before it begins.
    """
    alive = np.zeros(len(nodes) + 2, np.int64)
    for position, node in enumerate(nodes):
        for output in node.outputs:
            alive[position + 1 : last_read.get(output.name or "", position) + 1] += 1
    cost, casts = (np.concatenate([[0], np.cumsum(sizes)]) for sizes in (moments, weights))  # before a place
    cuts = []
    for start, end in pairwise(borders):
        while start < end:
            first = max(start + 1, int(np.searchsorted(cost, cost[start] + part_bytes // 2)))
            most = max(cost[start] + part_bytes, cost[min(first, end)])
            last = int(np.searchsorted(cost, most, side="right")) - 1
            last = min(last, max(start + 1, int(np.searchsorted(casts, casts[start] + WEIGHT_BYTES, side="right")) - 1))
            first = min(first, last)
            if last >= end:
                start = end
            else:
                places = np.arange(first, last + 1)[::-1]
                start = int(places[np.argmin(alive[places])])
            cuts.append(start)
    return cuts


def _needed(reading: Mapping[ir.Node, Sequence[str]], wanted: set[str]) -> list[ir.Node]:
    """The nodes that lead to values, in order, without those that only make constants. reading: what each reads."""
    wanted = set(wanted)
    needed = []
    for node, names in reversed(list(reading.items())):
        if any(output.name in wanted and stored(output) is None for output in node.outputs):
            needed.append(node)
            wanted.update(names)
    return needed[::-1]


def reads(node: ir.Node) -> list[str]:
    """The names of the values a node reads that are no constants, those that its subgraphs take along included."""
    return [value.name or "" for value in _values_read(node) if stored(value) is None]


def _values_read(node: ir.Node) -> list[ir.Value]:
    return [value for value in [*node.inputs, *_captured(node)] if value is not None]


def _captured(node: ir.Node) -> Iterator[ir.Value]:
    """The values of the graph around `node` that its bodies read or return."""
    bodies = list(all_bodies(node))
    for body in bodies:
        for value in [*(value for inner in body for value in inner.inputs), *body.outputs]:
            if value is not None and value.graph not in bodies:
                yield value


def _weight_bytes(node: ir.Node) -> int:
    tensors = [stored(value) for value in node.inputs if value is not None]
    return sum(4 * tensor.size for tensor in tensors if tensor is not None)


def extract(model: ir.Model, part: Part, alive: Feed) -> onnx.ModelProto:
    """The part as a model of its own; `alive` tells the types of its inputs."""
    nodes = [serde.serialize_node(node) for node in part.nodes]
    constants: dict[str, ir.Value] = {}
    for node in part.nodes:
        constants.update((v.name or "", v) for v in _values_read(node) if stored(v) is not None)
    graph = onnx.helper.make_graph(
        [*(serde.serialize_node(node) for node in _constant_nodes(constants.values())), *nodes],
        "part",
        [onnx.helper.make_tensor_value_info(name, _element_type(alive[name]), None) for name in part.reads],
        [onnx.ValueInfoProto(name=name) for name in part.makes],
        [ir.to_proto(v.const_value) for v in constants.values() if v.is_initializer() and v.const_value is not None],
    )
    return onnx.helper.make_model(
        graph,
        opset_imports=[onnx.helper.make_opsetid(domain, version) for domain, version in model.opset_imports.items()],
        functions=[ir.to_proto(function) for function in model.functions.values()],
        ir_version=model.ir_version,
    )


def _constant_nodes(values: Iterable[ir.Value]) -> list[ir.Node]:
    return [node for value in values if (node := value.producer()) is not None]


def _element_type(values: NDArray[np.generic]) -> int:
    return int(ir.DataType.from_numpy(values.dtype))
