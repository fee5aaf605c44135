"""What would be done to a model, and what was done to one: from the graph alone, no weight is read."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

import onnx_ir as ir

from awq_onnx import labels, sizing
from awq_onnx.labels import Label
from awq_onnx.passes import sites
from awq_onnx.passes.absorb import Group
from awq_onnx.passes.bodies import all_nodes
from awq_onnx.passes.constants import constant
from awq_onnx.passes.sites import Refusal
from awq_onnx.plan import items_of, make_plan
from awq_onnx.recipe import Recipe
from awq_onnx.sizing import Item
from awq_onnx.store import ModelSource, OpenedModel, open_model

LOOKUP = "GatherBlockQuantized"
ZERO_POINTS = 2  # of the inputs with a weight, behind codes and scales


@dataclass(frozen=True)
class PlannedLayer:
    """A layer, or the lookup in a table, that would be quantised: K in, N out. bits, block_size: None where `quantize`
    would choose them.

    folded_into: what its scale would be divided out of, as far as the graph tells: whether every channel arrives there
    is traced when the model runs. reason: why there is nothing. size_bytes: of its weight now; packed_bytes: then, with
    scales and zero points. Where several have one weight, the first has its bytes and the others 0.
    """

    name: str
    op_type: str
    K: int
    N: int
    bits: int | None
    block_size: int | None
    folded_into: str | None
    reason: str | None
    size_bytes: int
    packed_bytes: int


@dataclass(frozen=True)
class Forecast:
    """What `quantize` would do with a model. kept: what could be quantised and would not be, each with its reason.

    size_bytes: of all its files. predicted_bytes: of the output, within a few parts in a thousand.
    """

    model: str
    opset: int
    ir_version: int
    size_bytes: int
    predicted_bytes: int
    recipe: Recipe
    layers: tuple[PlannedLayer, ...]
    kept: tuple[Refusal, ...]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Everything, as plain values for JSON."""
        return {"kind": "forecast"} | asdict(self)


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
    layers: tuple[PackedLayer, ...]
    version: str | None
    recipe: dict[str, Any] | None

    def to_dict(self) -> dict[str, Any]:
        """Everything, as plain values for JSON."""
        return {"kind": "findings"} | asdict(self)


Inspection: TypeAlias = "Forecast | Findings"


def inspect(model: ModelSource, recipe: Recipe | None = None) -> Inspection:
    """What `quantize` would do with a model, or how one that is quantised was made. Takes seconds, whatever its size.

    recipe: for a model that is not quantised yet. Raises ModelError, RecipeError.
    """
    with open_model(model) as opened:
        packed = sites.quantized_nodes(opened.model.graph)
        return _findings(opened, packed) if packed else _forecast(opened, recipe or Recipe())


def _forecast(opened: OpenedModel, recipe: Recipe) -> Forecast:
    header = _header(opened)
    plan = make_plan(opened.model, recipe)
    items = items_of(plan, recipe)
    places = {site.name: _place(group) for group in plan.groups for site in group.sites}
    rows = [row for item in items for row in _planned(item, places, recipe)]
    size_bytes = sizing.wanted_bytes(items, opened, recipe)
    return Forecast(
        **header, predicted_bytes=size_bytes, recipe=recipe, layers=tuple(rows), kept=plan.kept, notes=plan.notes
    )


def _header(opened: OpenedModel) -> dict[str, Any]:
    return {
        "model": str(opened.path or "a model in memory"),
        "opset": opened.model.opset_imports.get("", 0),
        "ir_version": opened.model.ir_version,
        "size_bytes": opened.size_bytes,
    }


def _place(group: Group) -> tuple[str | None, str | None]:
    """What the scale of a group would be folded into, and why it would not be."""
    if isinstance(group.routes, Refusal):
        return None, f"{group.routes.reason} ({group.routes.what})"
    return ", ".join(route.absorber.name for route in group.routes), None


def _planned(item: Item, places: Mapping[str, tuple[str | None, str | None]], recipe: Recipe) -> Iterator[PlannedLayer]:
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
            folded_into=places.get(name, (None, None))[0],
            reason=places.get(name, (None, None))[1],
            size_bytes=size_bytes,
            packed_bytes=packed_bytes,
        )


def _findings(opened: OpenedModel, packed: list[ir.Node]) -> Findings:
    lookups = [node for node in all_nodes(opened.model.graph) if node.op_type == LOOKUP]
    seen: set[int] = set()
    told = opened.model.metadata_props
    return Findings(
        **_header(opened),
        layers=tuple(_packed(node, seen) for node in (*packed, *lookups)),
        version=told.get(labels.VERSION),
        recipe=_parsed(told.get(labels.RECIPE)),
    )


def _parsed(recipe: str | None) -> dict[str, Any] | None:
    try:
        parsed = json.loads(recipe or "")
    except ValueError:
        return None
    return parsed if isinstance(parsed, dict) else None


def _packed(node: ir.Node, seen: set[int]) -> PackedLayer:
    """seen: the tensors that were counted already."""
    weight = _WEIGHTS.get(node.op_type, _of_another_tool)(node)
    tensors = {id(one): one for one in map(constant, weight.inputs) if one is not None}
    size_bytes = sum(one.nbytes for key, one in tensors.items() if key not in seen)
    seen.update(tensors)
    return PackedLayer(
        name=sites.node_name(weight.reader),
        op_type=node.op_type,
        K=weight.K,
        N=weight.N,
        bits=weight.bits,
        block_size=weight.block_size,
        zero_points=len(weight.inputs) > ZERO_POINTS and weight.inputs[ZERO_POINTS] is not None,
        accuracy_level=node.attributes.get_int("accuracy_level", 0) if node.op_type == "MatMulNBits" else None,
        size_bytes=size_bytes,
        label=Label.read(weight.reader.metadata_props),
    )


@dataclass(frozen=True)
class _Weight:
    """inputs: codes, scales, zero points. reader: the node that was the layer."""

    reader: ir.Node
    inputs: Sequence[ir.Value | None]
    K: int | None = None
    N: int | None = None
    bits: int | None = None
    block_size: int | None = None


def _of_matmul(node: ir.Node) -> _Weight:
    number = node.attributes.get_int
    K, N, block_size = (number(name, 0) or None for name in ("K", "N", "block_size"))
    return _Weight(node, node.inputs[1:], K, N, number("bits", 4), block_size)


def _of_lookup(node: ir.Node) -> _Weight:
    codes, _, scales, *zero_points = node.inputs
    block_size, table = node.attributes.get_int("block_size", 128), constant(scales)
    V, blocks = table.shape.numpy() if table is not None else (None, None)
    D = blocks and blocks * block_size
    return _Weight(node, [codes, scales, *zero_points], D, V, node.attributes.get_int("bits", 4), block_size)


def _of_dequantized(node: ir.Node) -> _Weight:
    codes, readers = constant(node.inputs[0]), node.outputs[0].consumers()
    if codes is None or [reader.op_type for reader in readers] != ["MatMul"]:
        return _of_another_tool(node)
    K, N = codes.shape.numpy()
    return _Weight(readers[0], node.inputs, K, N, codes.dtype.bitwidth, node.attributes.get_int("block_size", K))


def _of_another_tool(node: ir.Node) -> _Weight:
    return _Weight(node, [value for value in node.inputs if constant(value) is not None])


_WEIGHTS = {"MatMulNBits": _of_matmul, "DequantizeLinear": _of_dequantized, LOOKUP: _of_lookup}
