"""Cut the graph into parts and run them one after the other, so that one part's weights and sums are alive.

A part is a run of the topologically sorted nodes, cut where few tensors are alive and sized by a budget; nothing
about transformers is assumed. Its inputs are the tensors that the parts before it left for it. onnxruntime runs a
part node by node, nothing fused, so that where the cuts are changes no bit of fp32 activations. (In fp16 models it
keeps some values in fp32 between nodes of one part, so there a cut is a rounding.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray

from awq_onnx import runtime
from awq_onnx.calibrate.feeds import Feed
from awq_onnx.errors import CalibrationError
from awq_onnx.passes.absorb import Group
from awq_onnx.passes.bodies import all_bodies
from awq_onnx.passes.constants import stored
from awq_onnx.progress import unheard
from awq_onnx.statistics import Accumulator, InputStatistics
from awq_onnx.store import OpenedModel

Statistics: TypeAlias = "Mapping[str, InputStatistics]"  # by the name of an input of a group

MASKS = ("attention_mask", "encoder_attention_mask", "decoder_attention_mask")
VALIDATION_EVERY = 8  # one feed in so many, and one where there are fewer
VALIDATION_ROWS = 512  # of every input, in all
BUDGET_BYTES = 96 << 20  # of weights and second moments in one part; a part holds at least one node


@dataclass(frozen=True)
class Part:
    """nodes: in graph order. taps: the inputs of groups that are known once the part has run, name -> K."""

    nodes: tuple[ir.Node, ...]
    taps: Mapping[str, int]
    reads: tuple[str, ...]
    makes: tuple[str, ...]
    dead_after: frozenset[str] = field(repr=False)


def collect(
    opened: OpenedModel,
    groups: Sequence[Group],
    feeds: Iterable[Feed],
    *,
    budget_bytes: int = BUDGET_BYTES,
    advance: Callable[[float], None] = unheard,
) -> Iterator[list[tuple[Group, Statistics]]]:
    """Run the model once over all `feeds`; after each part, the groups whose inputs are all known, with statistics.

    Groups with inputs that the graph does not make by running it (in the body of a Loop) come last, without those.
    advance: told the fraction of all running that has just been done.
    """
    parts = cut(opened.model.graph, groups, budget_bytes)
    coming = {name for part in parts for name in part.taps}
    missing = {group: {v.name or "" for v in group.inputs} & coming for group in groups}
    known: dict[Group, dict[str, InputStatistics]] = {group: {} for group in groups}
    values = [dict(feed) for feed in feeds]
    nodes = sum(len(part.nodes) for part in parts)
    for part in parts:
        share = len(part.nodes) / max(nodes, 1) / len(values)
        made = _run_part(opened, part, values, lambda share=share: advance(share))  # type: ignore[misc]
        for group, names in missing.items():
            known[group].update((name, one) for name, one in made.items() if name in names)
            names.difference_update(made)
        made.clear()
        finished = [group for group, names in missing.items() if not names]
        for group in finished:
            del missing[group]
        yield [(group, known.pop(group)) for group in finished]


def _run_part(
    opened: OpenedModel, part: Part, values: list[dict[str, NDArray[np.generic]]], advance: Callable[[], None]
) -> dict[str, InputStatistics]:
    sums = {name: Accumulator(K) for name, K in part.taps.items()}
    session = None
    apart = _validation_rows(len(values))
    for position, alive in enumerate(values):
        if session is None and part.makes:
            model = extract(opened.model, part, alive).SerializeToString()
            session = runtime.session(model, opened.folder, fuse=False, prepack=True, spin=False)
        if session is not None:
            made = runtime.run(session, list(part.makes), {name: alive[name] for name in part.reads})
            alive.update(zip(part.makes, made, strict=True))
            del made
        for name, accumulator in sums.items():
            accumulator.update(_rows(alive[name], alive), apart.get(position, 0))
        for name in part.dead_after:
            alive.pop(name, None)
        advance()
    return {name: _finished(name, accumulator) for name, accumulator in sums.items()}


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


def cut(graph: ir.Graph, groups: Sequence[Group], budget_bytes: int) -> list[Part]:
    """The parts that lead to all inputs of `groups`; nodes that lead to none of them are in no part."""
    nodes = _needed(graph, groups)
    last_read = {name: position for position, node in enumerate(nodes) for name in reads(node)}
    kept = set(MASKS)  # they tell padding to every part, whoever reads them
    waiting = {value.name or "": group.K for group in groups for value in group.inputs}
    parts = []
    start = 0
    known = {value.name or "" for value in graph.inputs}
    for stop in _cuts(nodes, last_read, dict(waiting), budget_bytes):
        run = nodes[start:stop]
        made = dict.fromkeys(output.name or "" for node in run for output in node.outputs)
        read = dict.fromkeys(name for node in run for name in reads(node) if name not in made)
        taps = {name: waiting.pop(name) for name in list(waiting) if name in made or name in known}
        later = {name for name in made if last_read.get(name, -1) >= stop}
        makes = [name for name in made if name in later or name in taps]
        known.update(makes)
        dead = frozenset(name for name in known if last_read.get(name, -1) < stop) - kept
        parts.append(Part(tuple(run), taps, tuple(read), tuple(makes), dead))
        known -= dead
        start = stop
    return parts


def _cuts(
    nodes: Sequence[ir.Node], last_read: dict[str, int], tapped: Mapping[str, int], budget_bytes: int
) -> list[int]:
    """Where parts end: close to the budget, at the places where the fewest tensors are alive."""
    alive = np.zeros(len(nodes) + 1, np.int64)
    cost = np.zeros(len(nodes) + 1, np.int64)  # of the nodes before this place
    for position, node in enumerate(nodes):
        made = [output.name or "" for output in node.outputs]
        for name in made:
            alive[position + 1 : last_read.get(name, position) + 1] += 1
        moments = sum(4 * tapped[name] ** 2 for name in made if name in tapped)
        cost[position + 1] = cost[position] + moments + _weight_bytes(node)
    cuts, start = [], 0
    while start < len(nodes):
        last = int(np.searchsorted(cost, cost[start] + budget_bytes, side="right")) - 1
        if last >= len(nodes):
            break
        first = max(start + 1, int(np.searchsorted(cost, cost[start] + budget_bytes // 2)))
        last = max(last, first)
        places = np.arange(first, last + 1)
        start = int(places[::-1][np.argmin(alive[places[::-1]])])
        cuts.append(start)
    return [*cuts, len(nodes)] if not cuts or cuts[-1] != len(nodes) else cuts


def _needed(graph: ir.Graph, groups: Sequence[Group]) -> list[ir.Node]:
    """The nodes that lead to the inputs of `groups`, in order, without those that only make constants."""
    wanted = {value.name for group in groups for value in group.inputs}
    needed = []
    for node in reversed(list(graph)):
        if any(output.name in wanted and stored(output) is None for output in node.outputs):
            needed.append(node)
            wanted.update(reads(node))
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
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def extract(model: ir.Model, part: Part, alive: Feed) -> onnx.ModelProto:
    """The part as a model of its own; `alive` tells the types of its inputs."""
    nodes = [ir.to_proto(node) for node in part.nodes]
    constants: dict[str, ir.Value] = {}
    for node in part.nodes:
        constants.update((v.name or "", v) for v in _values_read(node) if stored(v) is not None)
    graph = onnx.helper.make_graph(
        [*(ir.to_proto(node) for node in _constant_nodes(constants.values())), *nodes],
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
