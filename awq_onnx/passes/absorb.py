"""Name what can absorb the scale of an input, or say why there is nothing.

Dividing x by s costs nothing at run time where x comes, through steps that carry every channel unchanged but for a
factor (steps.py), from something that can be divided instead: the gain and beta of a norm, or the weight and bias of
a linear layer before (v_proj for o_proj, up_proj for down_proj). Every input that comes from the same absorber is
divided with it, so all layers behind one absorber form a group and share s; anything else that reads what is divided
is a reason to refuse. No model family is known here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import onnx_ir as ir

from awq_onnx.passes.bodies import branch_outputs
from awq_onnx.passes.constants import STANDARD_DOMAINS, computed
from awq_onnx.passes.facts import Facts
from awq_onnx.passes.sites import Refusal, Site, Survey, node_name
from awq_onnx.passes.steps import (
    MOVES,
    SELECTS,
    Step,
    attention_op,
    given,
    is_cache_pair,
    is_past,
    is_vector,
    steps_back,
)

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


Absorber: TypeAlias = Gain | Linear


@dataclass(frozen=True, eq=False)
class Route:
    """What is divided, and what this reaches.

    inputs: each with the value behind the last step on which channels may have changed places, None where there was
    no such step. values: all that are divided. untouched: values with other channels of the absorber, that somebody
    reads: none that is scaled may be in them.
    """

    absorber: Absorber
    inputs: Mapping[ir.Value, ir.Value | None]
    values: tuple[ir.Value, ...]
    untouched: tuple[ir.Value, ...]

    @property
    def needs_tracing(self) -> bool:
        return bool(self.untouched) or any(moved is not None for moved in self.inputs.values())


@dataclass(frozen=True, eq=False)
class Group:
    """The sites that share a scale, in graph order.

    routes: one; or several where layers with one weight stand in several places; or why nothing can absorb the scale
    (then s = 1). compensated: layers kept in float that read the same input: their weight is multiplied by s. caches:
    outputs of the model that are scaled, to be given back as its inputs.
    """

    sites: tuple[Site, ...]
    routes: tuple[Route, ...] | Refusal
    compensated: tuple[Site, ...] = ()
    caches: tuple[str, ...] = ()

    @property
    def K(self) -> int:
        return self.sites[0].K

    @property
    def name(self) -> str:
        return self.sites[0].name

    @property
    def inputs(self) -> tuple[ir.Value, ...]:
        """The distinct values its sites read."""
        return tuple(dict.fromkeys(site.input for site in self.sites))


@dataclass(frozen=True)
class _Way:
    """A walk back from an input.

    values: what it passed, the input first. uses: the steps between them. output: behind the bias that was met first.
    moved: behind the move that was met first.
    """

    values: tuple[ir.Value, ...]
    uses: frozenset[tuple[ir.Node, int]] = frozenset()
    vectors: tuple[Vector, ...] = ()
    output: ir.Value | None = None
    pasts: tuple[ir.Value, ...] = ()
    moved: ir.Value | None = None


@dataclass(frozen=True)
class _Arrival:
    """A way that has found an absorber."""

    way: _Way
    absorber: Absorber

    @property
    def input(self) -> ir.Value:
        return self.way.values[0]


class _Walker:
    """Walks back from every input of a survey, once; then tells which inputs lead to one absorber."""

    def __init__(self, survey: Survey) -> None:
        self.graph = survey.graph
        self.facts = survey.facts
        self.sites = {site.node: site for site in survey.sites}
        self.floats = {site.node: site for site in survey.floats}
        self.branch_outputs = branch_outputs(survey.graph)
        self.own_caches = _makes_its_caches(survey.graph)
        self.ends: dict[ir.Value, list[_Arrival | Refusal]] = {}
        self.arrivals: dict[ir.Value, dict[ir.Value, _Arrival]] = {}  # absorber's output -> input -> its first way
        for site in survey.sites:
            if site.input not in self.ends:
                self.ends[site.input] = list(self._walk(_Way((site.input,))))
        for ends in self.ends.values():
            for end in ends:
                if isinstance(end, _Arrival):
                    self.arrivals.setdefault(end.absorber.output, {}).setdefault(end.input, end)

    def _walk(self, way: _Way) -> Iterator[_Arrival | Refusal]:
        """Every way back to an absorber, the likeliest first; a Refusal for each that ends before."""
        value = way.values[-1]
        node = value.producer()
        if node is None:
            yield Refusal(value.name or "", "the input is an input of the model")
        elif node in self.sites:
            yield _arrival(way, Linear(self.sites[node], way.output or value, way.vectors))
        elif node in self.floats:
            if _is_alone(self.floats[node]):
                yield _arrival(way, Linear(self.floats[node], way.output or value, way.vectors))
            else:
                yield Refusal(node_name(node), f"the {node.op_type} before it has a weight that others read")
        elif gains := _gain_vectors(node, value, self.facts):
            yield _arrival(way, Gain(node, way.output or value, (*gains, *way.vectors)))
        else:
            steps = (self._taken(way, step, node) for step in steps_back(value, self.facts))
            further = [one for one in steps if one is not None]
            if not further:
                yield Refusal(node_name(node), f"{node.op_type} comes before, which cannot be divided")
            for one in further:
                yield from self._walk(one)

    def _taken(self, way: _Way, step: Step, node: ir.Node) -> _Way | None:
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
        return _Way(
            values=(*way.values, *([step.present] if step.present is not None else []), source),
            uses=way.uses | {(node, step.index)},
            vectors=vectors,
            output=output,
            pasts=(*way.pasts, *([step.past] if step.past is not None else [])),
            moved=way.moved or (way.values[-1] if step.moves else None),
        )

    def with_outer(self, values: Iterable[ir.Value]) -> list[ir.Value]:
        """The values without repeats, and what branches return them as."""
        found: dict[ir.Value, None] = {}
        for value in values:
            one: ir.Value | None = value
            while one is not None:
                found[one] = None
                one = self.branch_outputs.get(one)
        return list(found)

    def is_cache(self, output: str) -> bool:
        return self.own_caches and any(is_cache_pair(past, output) for past in self.graph.inputs)


def find_groups(survey: Survey) -> tuple[Group, ...]:
    """The sites of a survey in groups that share a scale, each with what absorbs it; in graph order."""
    walker = _Walker(survey)
    groups: list[Group] = []
    grouped: set[ir.Value] = set()
    for value in walker.ends:
        if value not in grouped:
            groups.append(_group(value, walker, grouped))
            grouped.update(groups[-1].inputs)
    return _merge_tied(groups, survey.sites, walker)


def _group(value: ir.Value, walker: _Walker, grouped: set[ir.Value]) -> Group:
    """The group of the sites that read `value`: by the first of its ways that may be divided."""
    refusal: Refusal | _Arrival | None = None
    for end in walker.ends[value]:
        found: _Arrival | Group | Refusal = end
        if isinstance(end, _Arrival):
            others = walker.arrivals[end.absorber.output]
            members = {**{one: way for one, way in others.items() if one not in grouped}, value: end}
            found = _divided(members, walker)
        if isinstance(found, Group):
            return found
        refusal = found
    assert isinstance(refusal, Refusal)
    return Group(tuple(site for site in walker.sites.values() if site.input is value), refusal)


def _divided(members: Mapping[ir.Value, _Arrival], walker: _Walker) -> Group | Refusal:
    """All inputs that one absorber reaches, as a group; a Refusal where something else would see it divided."""
    ways = [one.way for one in members.values()]
    absorber = next(iter(members.values())).absorber
    sites = tuple(site for site in walker.sites.values() if site.input in members)
    moved = any(way.moved is not None for way in ways)
    widths = {site.K for site in sites} | (set() if moved else {absorber.channels})
    if len(widths) > 1:
        return Refusal(absorber.name, f"what comes before has {absorber.channels} channels, the input {sites[0].K}")
    values = walker.with_outer(value for way in ways for value in way.values)
    caches = [value.name or "" for value in values if value.is_graph_output() and value not in walker.branch_outputs]
    foreign = next((name for name in caches if not walker.is_cache(name)), None)
    if foreign is not None:
        where = "the input" if any(value.name == foreign for value in members) else "what comes before"
        return Refusal(foreign, f"{where} is an output of the model as well")
    pasts = [past for way in ways for past in way.pasts]
    if not all(any(is_cache_pair(past, name) for name in caches) for past in pasts):
        return Refusal(pasts[0].name or "", "the cache before it is not returned")
    readers = _Readers(walker, sites, frozenset().union(*(way.uses for way in ways)), moved)
    for value in values:
        refusal = readers.check(value, "the same input" if value in members else "what comes before, too")
        if refusal is not None:
            return refusal
    untouched = tuple(value for value in readers.untouched if value not in values)
    inputs = {value: one.way.moved for value, one in members.items()}
    route = Route(absorber, inputs, tuple(values), untouched)
    return Group(sites, (route,), tuple(readers.compensated), tuple(caches))


class _Readers:
    """Looks at everything that reads a value that will be divided.

    Fine are the steps of a way, the sites of the group, and shapes. Somebody who selects other channels has to be
    traced (untouched); a layer kept in float can be compensated, where channels keep their places.
    """

    def __init__(
        self, walker: _Walker, sites: Sequence[Site], uses: frozenset[tuple[ir.Node, int]], moved: bool
    ) -> None:
        self._walker, self._uses, self._moved = walker, uses, moved
        self._nodes = {site.node for site in sites}
        self.untouched: list[ir.Value] = []
        self.compensated: list[Site] = []

    def check(self, value: ir.Value, what: str) -> Refusal | None:
        for use in value.uses():
            node, index = use.node, use.idx
            if node.op_type == "Shape" or (index == 0 and node in self._nodes):
                continue
            if (node, index) in self._uses:
                if node.op_type == "Split":  # what it hands to others
                    self.untouched.extend(node.outputs)
            elif index == 0 and not self._moved and (kept := self._walker.floats.get(node)) and _is_alone(kept):
                self.compensated.append(kept)
            elif not self._selects(node, index):
                return Refusal(node_name(node), f"{node.op_type} reads {what}")
        return None

    def _selects(self, node: ir.Node, index: int) -> bool:
        """Whether a reader beside the way only takes a part of what it is given, perhaps after moving it."""
        if index != 0 or node.op_type not in MOVES or node.domain not in STANDARD_DOMAINS:
            return False
        if node.op_type in SELECTS:
            self.untouched.extend(node.outputs)
            return True
        readers = node.outputs[0].uses()
        return bool(readers) and all(self._selects(use.node, use.idx) for use in readers)


def _merge_tied(groups: Sequence[Group], sites: Sequence[Site], walker: _Walker) -> tuple[Group, ...]:
    """Groups with a weight in common as one, since that weight can only be scaled in one way."""
    order = {site: position for position, site in enumerate(sites)}
    by_weight: dict[tuple[ir.Value, bool], list[Group]] = {}
    merged: dict[Group, list[Group]] = {group: [group] for group in groups}
    for group in groups:
        for site in group.sites:
            by_weight.setdefault((site.weight, site.transposed), []).append(group)
    for sharing in by_weight.values():
        for other in sharing[1:]:
            if merged[other] is not merged[sharing[0]]:
                merged[sharing[0]].extend(merged[other])
                for one in merged[other]:
                    merged[one] = merged[sharing[0]]
    parts = {id(part): part for part in merged.values()}.values()
    joined = [_whole_branches(_joined(part, order), walker) for part in parts]
    return tuple(sorted(joined, key=lambda group: order[group.sites[0]]))


def _joined(groups: Sequence[Group], order: Mapping[Site, int]) -> Group:
    if len(groups) == 1:
        return groups[0]
    sites = tuple(sorted((site for group in groups for site in group.sites), key=order.__getitem__))
    refused = next((group for group in groups if isinstance(group.routes, Refusal)), None)
    if refused is not None:
        assert isinstance(refused.routes, Refusal)
        return Group(sites, Refusal(refused.routes.what, f"one weight, used twice: {refused.routes.reason}"))
    if len({site.K for site in sites}) > 1:
        return Group(sites, Refusal(groups[0].name, "layers of several widths share its weights"))
    return Group(
        sites,
        tuple(route for group in groups if not isinstance(group.routes, Refusal) for route in group.routes),
        tuple(site for group in groups for site in group.compensated),
        tuple(dict.fromkeys(name for group in groups for name in group.caches)),
    )


def _whole_branches(group: Group, walker: _Walker) -> Group:
    """Refuse a group that divides what one branch of an If returns and not what the other does."""
    if isinstance(group.routes, Refusal):
        return group
    divided = {value for route in group.routes for value in route.values}
    for inner, outer in walker.branch_outputs.items():
        if outer in divided and inner not in divided:
            return Group(group.sites, Refusal(inner.name or "", "the other branch of an If returns it undivided"))
    return group


def _is_alone(layer: Site) -> bool:
    """Whether a layer kept in float has a weight that nothing else reads, so that it may be changed."""
    return all(len(value.uses()) == 1 for value in (layer.weight, layer.node.inputs[1]) if value is not None)


def _arrival(way: _Way, absorber: Absorber) -> _Arrival | Refusal:
    """The end of a way, if the constants it passed have a number for each channel of the absorber."""
    for vector in absorber.vectors:
        inside = attention_op(vector.node) is not None
        if vector.tensor.size != absorber.channels and not (inside and vector.tensor.size > absorber.channels):
            return Refusal(node_name(vector.node), "what it adds does not have a number for each channel")
    return _Arrival(way, absorber)


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
