"""Group the layers that share a scale, and name what absorbs it, or say why nothing can.

Dividing x by s costs nothing at run time where x comes, through steps that carry its channels (walk.py), from something
that can be divided instead: the gain and beta of a norm, or the weight and bias of a linear layer before (v_proj for
o_proj, up_proj for down_proj). Every input that comes from the same absorber is divided with it, so all layers behind
one absorber form a group and share s; anything else that reads what is divided is a reason to refuse. No model family
is known here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from awq_onnx.passes.constants import STANDARD_DOMAINS, depends_on_data
from awq_onnx.passes.sites import Refusal, Site, Survey, node_name
from awq_onnx.passes.steps import MOVES, SELECTS, is_cache_pair, steps_back
from awq_onnx.passes.walk import Absorber, Arrival, Gain, Linear, Vector, Walker, is_alone

__all__ = ["Absorber", "Gain", "Group", "Linear", "Route", "Vector", "find_groups"]


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


def find_groups(survey: Survey) -> tuple[Group, ...]:
    """The sites of a survey in groups that share a scale, each with what absorbs it; in graph order."""
    walker = Walker(survey)
    groups: list[Group] = []
    grouped: set[ir.Value] = set()
    for value in walker.ends:
        if value not in grouped:
            groups.append(_group(value, walker, grouped))
            grouped.update(groups[-1].inputs)
    return _merge_tied(groups, survey.sites, walker)


def _group(value: ir.Value, walker: Walker, grouped: set[ir.Value]) -> Group:
    """The group of the sites that read `value`: by the first of its ways that may be divided."""
    refusal: Refusal | Arrival | None = None
    for end in walker.ends[value]:
        found: Arrival | Group | Refusal = end
        if isinstance(end, Arrival):
            others = walker.arrivals[end.absorber.output]
            width = walker.width(value)
            alike = {one: way for one, way in others.items() if one not in grouped and walker.width(one) == width}
            members = {**alike, value: end}
            found = _divided(members, walker)
        if isinstance(found, Group):
            return found
        refusal = found
    assert isinstance(refusal, Refusal)
    return Group(tuple(site for site in walker.sites.values() if site.input is value), refusal)


def _divided(members: Mapping[ir.Value, Arrival], walker: Walker) -> Group | Refusal:
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
        self, walker: Walker, sites: Sequence[Site], uses: frozenset[tuple[ir.Node, int]], moved: bool
    ) -> None:
        self._walker, self._uses, self._moved = walker, uses, moved
        self._nodes = {site.node for site in sites}
        self.untouched: list[ir.Value] = []
        self.compensated: list[Site] = []

    def check(self, value: ir.Value, what: str) -> Refusal | None:
        for use in value.uses():
            node, index = use.node, use.idx
            if (node, index) in self._uses:
                if node.op_type == "Split":  # what it hands to others
                    self.untouched.extend(node.outputs)
            elif not (index == 0 and node in self._nodes) and not self._is_harmless(node, index, self._moved):
                return Refusal(node_name(node), f"{node.op_type} reads {what}")
        return None

    def _is_harmless(self, node: ir.Node, index: int, moved: bool) -> bool:
        """Whether a reader beside the ways does not notice, or can be made not to. moved: channels before it may be."""
        if node.op_type == "Shape":
            return True
        if index != 0:
            return False
        layer = self._walker.floats.get(node)
        if layer is not None:
            if moved or not is_alone(layer):
                return False
            self.compensated.append(layer)
            return True
        if node.op_type not in MOVES or node.domain not in STANDARD_DOMAINS:
            return False
        if node.op_type in SELECTS:
            self.untouched.extend(node.outputs)
            return not any(depends_on_data(value) for value in node.inputs[1:])
        output = node.outputs[0]
        moved = moved or any(step.moves for step in steps_back(output, self._walker.facts))
        readers = output.uses()
        return (
            bool(readers)
            and not output.is_graph_output()
            and all(self._is_harmless(use.node, use.idx, moved) for use in readers)
        )


def _merge_tied(groups: Sequence[Group], sites: Sequence[Site], walker: Walker) -> tuple[Group, ...]:
    """Groups with a weight in common as one, since that weight can only be scaled in one way."""
    order = {site: position for position, site in enumerate(sites)}
    by_weight: dict[tuple[ir.Value, bool, ir.DataType], list[Group]] = {}
    merged: dict[Group, list[Group]] = {group: [group] for group in groups}
    for group in groups:
        for site in group.sites:
            by_weight.setdefault((site.weight, site.transposed, site.dtype), []).append(group)
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


def _whole_branches(group: Group, walker: Walker) -> Group:
    """Refuse a group that divides what one branch of an If returns and not what the other does."""
    if isinstance(group.routes, Refusal):
        return group
    divided = {value for route in group.routes for value in route.values}
    for inner, outputs in walker.branch_outputs.items():
        if inner not in divided and not divided.isdisjoint(outputs):
            return Group(group.sites, Refusal(inner.name or "", "the other branch of an If returns it undivided"))
    return group
