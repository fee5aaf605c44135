"""Pieces of a graph that run one after the other: where to cut, and a piece as a model of its own.

A part is a run of the topologically sorted nodes, cut where few tensors are alive and sized by a budget; nothing
about transformers is assumed. Its inputs are the tensors that the parts before it left for it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir import serde

from awq_onnx.calibrate.feeds import Feed
from awq_onnx.passes.absorb import Group
from awq_onnx.passes.bodies import all_bodies
from awq_onnx.passes.constants import stored

MASKS = ("attention_mask", "encoder_attention_mask", "decoder_attention_mask")
WEIGHT_BYTES = 512 << 20  # of weights in one part, in fp32


@dataclass(frozen=True)
class Piece:
    """Some nodes, in graph order: what they read that they do not make, and what of what they make is wanted."""

    nodes: tuple[ir.Node, ...]
    reads: tuple[str, ...]
    makes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Part(Piece):
    """end: how many nodes come before and in it. taps: the inputs of groups that are known once the part has run,
    name -> K. tail: whether it leads to outputs of the model alone. size_bytes: of what is held while it runs; share:
    of all work.
    """

    taps: Mapping[str, int]
    dead_after: frozenset[str] = field(repr=False)
    end: int = 0
    tail: bool = False
    size_bytes: int = 0
    share: float = 0.0


@dataclass(frozen=True)
class Order:
    """Where layers can be replaced by quantised ones, wherever else the graph is cut.

    firsts: what the first layer of each group makes. replaceable: what layers make whose group is known before the
    last of `firsts` that is not after them.
    """

    firsts: frozenset[str] = frozenset()
    replaceable: frozenset[str] = frozenset()

    @classmethod
    def of(cls, graph: ir.Graph, groups: Sequence[Group]) -> Order:
        made_at = {value.name or "": at for at, node in enumerate(graph) for value in node.outputs}
        made = {group: [n for site in group.sites if (n := site.output.name or "") in made_at] for group in groups}
        firsts = {min(names, key=made_at.__getitem__) for names in made.values() if names}
        starts = sorted(made_at[name] for name in firsts)

        def start_before(name: str) -> int:
            return starts[bisect_right(starts, made_at[name]) - 1]

        known_at = {group: max(made_at.get(value.name or "", -1) for value in group.inputs) for group in groups}
        replaceable = {n for group, names in made.items() for n in names if known_at[group] < start_before(n)}
        return cls(frozenset(firsts), frozenset(replaceable))


def cut(
    graph: ir.Graph,
    groups: Sequence[Group],
    part_bytes: int,
    outputs: Sequence[str] = (),
    begin: int = 0,
    before: Collection[str] = (),
) -> list[Part]:
    """The parts that lead to all inputs of `groups`, then those that lead to `outputs` alone; no other nodes.

    begin: so many nodes have run already. before: names of values; a part ends before a node that makes one.
    """
    reading = {node: reads(node) for node in graph}
    body = needed(reading, {value.name or "" for group in groups for value in group.inputs})
    inside = set(body)
    tail = [node for node in needed(reading, set(outputs)) if node not in inside]
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
    ends = {at for at, node in enumerate(body) if any(output.name in before for output in node.outputs)}
    borders = sorted({0, begin, len(body), len(nodes), *ends})
    for stop in _cuts(nodes, last_read, moments, weights, part_bytes, borders):
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


def needed(reading: Mapping[ir.Node, Sequence[str]], wanted: set[str]) -> list[ir.Node]:
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


def extract(model: ir.Model, piece: Piece, alive: Feed) -> onnx.ModelProto:
    """The piece as a model of its own; `alive` tells the types of its inputs."""
    nodes = [serde.serialize_node(node) for node in piece.nodes]
    constants: dict[str, ir.Value] = {}
    for node in piece.nodes:
        constants.update((v.name or "", v) for v in _values_read(node) if stored(v) is not None)
    graph = onnx.helper.make_graph(
        [*(serde.serialize_node(node) for node in _constant_nodes(constants.values())), *nodes],
        "piece",
        [onnx.helper.make_tensor_value_info(name, _element_type(alive[name]), None) for name in piece.reads],
        [onnx.ValueInfoProto(name=name) for name in piece.makes],
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
