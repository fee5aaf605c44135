"""What would be done to a model, and what was done to one: from the graph alone, no weight is read."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from awq_onnx import labels, sizing
from awq_onnx.footprint import Footprint, footprint_of
from awq_onnx.labels import Label
from awq_onnx.passes import sites
from awq_onnx.passes.absorb import Group
from awq_onnx.passes.constants import constant
from awq_onnx.passes.packed import MATMUL, Packed, packed_weights
from awq_onnx.passes.sites import Refusal
from awq_onnx.plain import plain
from awq_onnx.plan import Plan, items_of, make_plan
from awq_onnx.recipe import Recipe
from awq_onnx.sizing import Item
from awq_onnx.store import ModelSource, OpenedModel, open_model


@dataclass(frozen=True)
class PlannedLayer:
    """A layer, or the lookup in a table, that would be quantised: K in, N out. bits, block_size,
    packed_bytes: None where `quantize` would choose them.

    folded_into: what its scale would be divided out of, as far as the graph tells: whether every channel arrives there
    is traced when the model runs. reason: why there is nothing, blocked_by: what is in the way. size_bytes: of its
    weight now; packed_bytes: then, with scales and zero points. Where several have one weight, the first has its bytes
    and the others 0.
    """

    name: str
    op_type: str
    K: int
    N: int
    bits: int | None
    block_size: int | None
    size_bytes: int
    packed_bytes: int | None
    folded_into: str | None = None
    reason: str | None = None
    blocked_by: str | None = None


@dataclass(frozen=True)
class Forecast:
    """What `quantize` would do with a model. kept: what could be quantised and would not be, each with its reason.

    size_bytes: of all its files, footprint: what these are for. predicted_bytes: of the output, within a few parts in a
    thousand.
    """

    model: str
    opset: int
    ir_version: int
    size_bytes: int
    footprint: Footprint
    predicted_bytes: int
    recipe: Recipe
    layers: tuple[PlannedLayer, ...]
    kept: tuple[Refusal, ...]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Everything, as plain values for JSON."""
        return {"kind": "forecast", **plain(self)}


@dataclass(frozen=True)
class PackedLayer:
    """A node with a weight of few bits: K in, N out; size_bytes with scales and zero points.

    What the graph does not tell is None. label: what awq-onnx wrote of it. Where several have one weight, the first has
    its bytes and the others 0.
    """

    name: str
    op_type: str
    K: int | None
    N: int | None
    bits: int | None
    block_size: int | None
    zero_points: bool
    accuracy_level: int | None
    size_bytes: int
    label: Label | None


@dataclass(frozen=True)
class Findings:
    """How a model was quantised. version: of awq-onnx, recipe: its settings; None where another tool made it."""

    model: str
    opset: int
    ir_version: int
    size_bytes: int
    footprint: Footprint
    layers: tuple[PackedLayer, ...]
    version: str | None
    recipe: dict[str, Any] | None

    def to_dict(self) -> dict[str, Any]:
        """Everything, as plain values for JSON."""
        return {"kind": "findings", **plain(self)}


Inspection: TypeAlias = "Forecast | Findings"


def inspect(model: ModelSource, recipe: Recipe | None = None) -> Inspection:
    """What `quantize` would do with a model, or how one that is quantised was made. Takes seconds, whatever its size.

    recipe: for a model that is not quantised yet. Raises ModelError, RecipeError.
    """
    with open_model(model) as opened:
        packed = packed_weights(opened.model.graph)
        quantized = any(not one.is_table for one in packed)
        return _findings(opened, packed) if quantized else _forecast(opened, recipe or Recipe())


def _forecast(opened: OpenedModel, recipe: Recipe) -> Forecast:
    header, footprint = _header(opened), footprint_of(opened.model, opened.size_bytes)  # before anything is brought out
    plan = make_plan(opened.model, recipe)
    items = items_of(plan, recipe)
    if recipe.chooses_formats:
        sizing.check(items, opened, recipe)
    places = _places(plan)
    rows = [row for item in items for row in _planned(item, places, recipe)]
    size_bytes = sizing.wanted_bytes(items, opened, recipe)
    return Forecast(
        **header,
        footprint=footprint,
        predicted_bytes=size_bytes,
        recipe=recipe,
        layers=tuple(rows),
        kept=plan.kept,
        notes=plan.notes,
    )


def _header(opened: OpenedModel) -> dict[str, Any]:
    return {
        "model": str(opened.path or "a model in memory"),
        "opset": opened.model.opset_imports.get("", 0),
        "ir_version": opened.model.ir_version,
        "size_bytes": opened.size_bytes,
    }


def _places(plan: Plan) -> dict[str, dict[str, str]]:
    """What the scale of each layer would be folded into, or why it would not be: fields of its row."""
    return {site.name: _place(group) for group in plan.groups for site in group.sites}


def _place(group: Group) -> dict[str, str]:
    if isinstance(group.routes, Refusal):
        return {"reason": group.routes.reason, "blocked_by": group.routes.what}
    return {"folded_into": ", ".join(route.absorber.name for route in group.routes)}


def _planned(item: Item, places: Mapping[str, Mapping[str, str]], recipe: Recipe) -> Iterator[PlannedLayer]:
    """The rows of one weight."""
    K, N = item.shape
    fmt = item.plain
    chosen = recipe.chooses_formats and len(item.formats) > 1
    names = [(item.table.name, "Gather")] if item.table else [(site.name, site.node.op_type) for site in item.sites]
    for number, (name, op_type) in enumerate(names):
        size_bytes, packed_bytes = (item.stored_bytes, sum(fmt.sizes(K, N))) if number == 0 else (0, 0)
        yield PlannedLayer(
            name=name,
            op_type=op_type,
            K=K,
            N=N,
            bits=None if chosen else fmt.bits,
            block_size=None if chosen else fmt.block_size,
            size_bytes=size_bytes,
            packed_bytes=None if chosen else packed_bytes,
            **places.get(name, {}),
        )


def _findings(opened: OpenedModel, packed: Sequence[Packed]) -> Findings:
    seen: set[int] = set()
    told = opened.model.metadata_props
    return Findings(
        **_header(opened),
        footprint=footprint_of(opened.model, opened.size_bytes),
        layers=tuple(_row(one, seen) for one in packed),
        version=told.get(labels.VERSION),
        recipe=_parsed(told.get(labels.RECIPE)),
    )


def _parsed(recipe: str | None) -> dict[str, Any] | None:
    try:
        parsed = json.loads(recipe or "")
    except ValueError:
        return None
    return parsed if isinstance(parsed, dict) else None


def _row(weight: Packed, seen: set[int]) -> PackedLayer:
    """seen: the tensors that were counted already."""
    stored = map(constant, (weight.codes, weight.scales, weight.zero_points))
    tensors = {id(one): one for one in stored if one is not None}
    size_bytes = sum(one.nbytes for key, one in tensors.items() if key not in seen)
    seen.update(tensors)
    op_type, number = weight.node.op_type, weight.node.attributes.get_int
    return PackedLayer(
        name=sites.node_name(weight.layer),
        op_type=op_type,
        K=weight.K,
        N=weight.N,
        bits=weight.bits,
        block_size=weight.block_size,
        zero_points=weight.zero_points is not None,
        accuracy_level=number("accuracy_level", 0) if op_type == MATMUL else None,
        size_bytes=size_bytes,
        label=Label.read(weight.layer.metadata_props),
    )
