"""Walk back from the input of every layer to what could absorb a scale: the gain of a norm, or a layer before.

A way leads through steps that carry every channel unchanged but for a factor (steps.py). It says what it passed, so
that absorb.py can see who else would notice a division.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import TypeAlias

import onnx_ir as ir

from awq_onnx.passes.bodies import branch_outputs
from awq_onnx.passes.constants import STANDARD_DOMAINS, computed, is_computed
from awq_onnx.passes.facts import Facts
from awq_onnx.passes.sites import LAYER_OPS, Refusal, Site, Survey, node_name
from awq_onnx.passes.steps import SELECTS, Step, attention_op, given, is_cache_pair, is_past, is_vector, steps_back

MOST_WAYS = 64  # from one input: products of products could have millions
# Norms that hold their gain, and their beta if they have one, as inputs: which. Only output 0 depends on them. (The
# inputs after them in the Skip forms are a bias that is added before the norm, and never divided.)
NORMS: Mapping[str, tuple[int, ...]] = {
    "LayerNormalization": (1, 2),
    "RMSNormalization": (1,),
    "SimplifiedLayerNormalization": (1,),
    "SkipLayerNormalization": (2, 3),
    "SkipSimplifiedLayerNormalization": (2,),
    "EmbedLayerNormalization": (5, 6),
}
TOKEN_INPUTS = frozenset({"input_ids", "decoder_input_ids", "inputs_embeds"})
NORM_DOMAINS = (*STANDARD_DOMAINS, "com.microsoft")


@dataclass(frozen=True, eq=False)
class Vector:
    """A constant at node.inputs[index] with a number for each channel of an absorber: its last numbers are those."""

    node: ir.Node
    index: int
    tensor: ir.TensorProtocol


@dataclass(frozen=True, eq=False)
class Gain:
    """x comes from a norm: its gain, and its beta if it has one, are divided by s.

    node: that holds the gain. output: where s appears, behind the beta. vectors: the gain first.
    """

    node: ir.Node
    output: ir.Value
    vectors: tuple[Vector, ...]

    @property
    def name(self) -> str:
        return node_name(self.node)

    @property
    def channels(self) -> int:
        return self.vectors[0].tensor.size

    @property
    def dtype(self) -> ir.DataType:
        return self.vectors[0].tensor.dtype


@dataclass(frozen=True, eq=False)
class Linear:
    """x comes from the output channels of a layer: the columns of its weight, and its biases, are divided by s.

    output: where s appears, behind the biases. vectors: those biases that other nodes add.
    """

    site: Site
    output: ir.Value
    vectors: tuple[Vector, ...]

    @property
    def name(self) -> str:
        return self.site.name

    @property
    def channels(self) -> int:
        return self.site.N

    @property
    def dtype(self) -> ir.DataType:
        return self.site.dtype


Absorber: TypeAlias = Gain | Linear


@dataclass(frozen=True)
class Way:
    """A walk back from an input.

    values: what it passed, the input first. uses: the steps between them. output: behind the bias that was met first.
    chosen: behind the choice of channels, or rows, that was met first. moved: the same, or behind the move that was met
    first, if channels have moved at all.
    """

    values: tuple[ir.Value, ...]
    uses: frozenset[tuple[ir.Node, int]] = frozenset()
    vectors: tuple[Vector, ...] = ()
    output: ir.Value | None = None
    pasts: tuple[ir.Value, ...] = ()
    chosen: ir.Value | None = None
    moved: ir.Value | None = None


@dataclass(frozen=True)
class Arrival:
    """A way that has found an absorber."""

    way: Way
    absorber: Absorber

    @property
    def input(self) -> ir.Value:
        return self.way.values[0]


class Walker:
    """Walks back from every input of a survey, once; then tells which inputs lead to one absorber."""

    def __init__(self, survey: Survey) -> None:
        self.graph = survey.graph
        self.facts = survey.facts
        self.sites = {site.node: site for site in survey.sites}
        self.floats = {site.node: site for site in survey.floats}
        self.branch_outputs = branch_outputs(survey.graph)
        self.own_caches = _makes_its_caches(survey.graph)
        self._widths = {site.input: site.K for site in survey.sites}
        self.ends: dict[ir.Value, list[Arrival | Refusal]] = {}
        self.arrivals: dict[ir.Value, dict[ir.Value, Arrival]] = {}  # absorber's output -> input -> its first way
        for site in survey.sites:
            if site.input not in self.ends:
                self.ends[site.input] = list(islice(self._walk(site.input), MOST_WAYS))
        for ends in self.ends.values():
            for end in ends:
                if isinstance(end, Arrival):
                    self.arrivals.setdefault(end.absorber.output, {}).setdefault(end.input, end)

    def _walk(self, start: ir.Value) -> Iterator[Arrival | Refusal]:
        """Every way back to an absorber, the likeliest first; a Refusal for each that ends before."""
        waiting = [Way((start,))]
        while waiting:
            way = waiting.pop()
            end = self._end(way)
            if end is not None:
                yield end
                continue
            value = way.values[-1]
            node = value.producer()
            assert node is not None
            steps = (self._taken(way, step, node) for step in steps_back(value, self.facts))
            further = [one for one in steps if one is not None]
            if not further:
                yield Refusal(node_name(node), f"{node.op_type} comes before, which cannot be divided")
            waiting.extend(reversed(further))

    def _end(self, way: Way) -> Arrival | Refusal | None:
        """What a way has arrived at; None where it goes on, or ends at a node that lets nothing pass."""
        value = way.values[-1]
        node = value.producer()
        if node is None:
            return Refusal(value.name or "", self._beginning(value))
        layer = self.sites.get(node) or self.floats.get(node)
        if layer is not None:
            if node in self.floats and not is_alone(layer):
                return Refusal(node_name(node), f"the {node.op_type} before it has a weight that others read")
            return _arrival(way, Linear(layer, way.output or value, way.vectors))
        if node.op_type in LAYER_OPS and is_computed(node.inputs[1]):
            return Refusal(node_name(node), f"the {node.op_type} before it is not quantised")
        gains = _gain_vectors(node, value, self.facts)
        return _arrival(way, Gain(node, way.output or value, (*gains, *way.vectors))) if gains else None

    def _beginning(self, value: ir.Value) -> str:
        if not value.is_graph_input():
            return "it comes from a table of constants"
        return "the input is an input of the model" if value.graph is self.graph else "a loop carries the input"

    def _taken(self, way: Way, step: Step, node: ir.Node) -> Way | None:
        """The way one step on; None where a bias already met would then be in other places than its channels."""
        source = node.inputs[step.index]
        if source is None or (way.vectors and step.moves) or (step.past is not None and not self.own_caches):
            return None
        vectors, output = way.vectors, way.output
        if step.bias is not None:
            tensor = computed(node.inputs[step.bias], self.facts.opsets)
            if tensor is None:
                return None
            vectors = (*vectors, Vector(node, step.bias, tensor))
            output = output if step.inside else output or way.values[-1]
        return Way(
            values=(*way.values, *([step.present] if step.present is not None else []), source),
            uses=way.uses | {(node, step.index)},
            vectors=vectors,
            output=output,
            pasts=(*way.pasts, *([step.past] if step.past is not None else [])),
            chosen=way.chosen or (way.values[-1] if node.op_type in SELECTS else None),
            moved=way.moved or ((way.chosen or way.values[-1]) if step.moves else None),
        )

    def with_outer(self, values: Iterable[ir.Value]) -> list[ir.Value]:
        """The values without repeats, and what branches return them as."""
        found: dict[ir.Value, None] = {}
        waiting = list(values)[::-1]
        while waiting:
            value = waiting.pop()
            if value not in found:
                found[value] = None
                waiting.extend(self.branch_outputs.get(value, ()))
        return list(found)

    def width(self, value: ir.Value) -> int:
        """The channels of an input."""
        return self._widths[value]

    def is_cache(self, output: str) -> bool:
        return self.own_caches and any(is_cache_pair(past, output) for past in self.graph.inputs)


def is_alone(layer: Site) -> bool:
    """Whether a layer kept in float has a weight that nothing else reads, so that it may be changed."""
    values = [value for value in (layer.weight, layer.node.inputs[1]) if value is not None]
    return all(len(value.uses()) == 1 and not value.is_graph_output() for value in values)


def _arrival(way: Way, absorber: Absorber) -> Arrival | Refusal:
    """The end of a way, if the constants it passed have a number for each channel of the absorber."""
    for vector in absorber.vectors:
        inside = attention_op(vector.node) is not None
        if vector.tensor.size != absorber.channels and not (inside and vector.tensor.size > absorber.channels):
            return Refusal(node_name(vector.node), "what it adds does not have a number for each channel")
    return Arrival(way, absorber)


def _gain_vectors(node: ir.Node, value: ir.Value, facts: Facts) -> tuple[Vector, ...]:
    """Gain and beta, if `value` is what a norm makes: a fused one, or any Mul by a constant vector."""
    indices: Iterable[int] = ()
    if node.domain in NORM_DOMAINS and node.op_type in NORMS and value is node.outputs[0]:
        indices = [index for index in NORMS[node.op_type] if given(node.inputs, index) is not None]
    elif node.domain in STANDARD_DOMAINS and node.op_type == "Mul":
        indices = [index for index in (0, 1) if is_vector(node.inputs[index], facts)][:1]
    vectors = []
    for index in indices:
        tensor = computed(node.inputs[index], facts.opsets)
        if tensor is None or not is_vector(node.inputs[index], facts):
            return ()
        vectors.append(Vector(node, index, tensor))
    return tuple(vectors)


def _makes_its_caches(graph: ir.Graph) -> bool:
    """Whether the caches that the model takes are its own, and none that another model has begun.

    A decoder that only continues (one token at a time, or with caches that it never returns) is given caches that
    its twin has made: to scale them here would be to misread them.
    """
    pasts = [value for value in graph.inputs if is_past(value)]
    outputs = [value.name or "" for value in graph.outputs]
    one_token = any(
        value.shape is not None and len(value.shape) > 1 and value.shape[1] == 1
        for value in graph.inputs
        if (value.name or "") in TOKEN_INPUTS
    )
    return not one_token and all(any(is_cache_pair(past, name) for name in outputs) for past in pasts)
