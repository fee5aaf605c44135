"""Where the bytes of a model are."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import onnx_ir as ir

from awq_onnx.passes.bodies import all_nodes, branch_outputs
from awq_onnx.passes.constants import constant
from awq_onnx.passes.facts import Facts
from awq_onnx.passes.packed import Packed, packed_weights
from awq_onnx.passes.sites import Site, find_site, is_token, makes_logits

CODES, SCALES, ZERO_POINTS, LAYERS, LM_HEAD, EMBEDDING = (
    "codes",
    "scales",
    "zero_points",
    "layers",
    "lm_head",
    "embedding",
)


@dataclass(frozen=True)
class Footprint:
    """Bytes by kind.

    codes, scales, zero_points: of quantised layers other than the lm_head. layers: weights of linear layers in floats.
    lm_head, embedding: all of theirs; what both read is the embedding's. rest: norms, biases, the graph, what else the
    files hold.
    """

    codes: int
    scales: int
    zero_points: int
    layers: int
    lm_head: int
    embedding: int
    rest: int


def footprint_of(model: ir.Model, size_bytes: int) -> Footprint:
    """size_bytes: of all files of the model."""
    nodes, facts = list(all_nodes(model.graph)), Facts(model.graph.opset_imports, {})  # no shape is asked for
    packed = packed_weights(model.graph)
    kinds = dict.fromkeys(_tables(nodes, packed), EMBEDDING)
    heads = _Heads(model.graph, kinds)
    found = [pair for one in packed for pair in _packed(one, heads)]
    found += [pair for node in nodes for pair in _floats(node, facts, heads)]
    for value, kind in found:
        kinds.setdefault(value, kind)
    known = dict.fromkeys((CODES, SCALES, ZERO_POINTS, LAYERS, LM_HEAD, EMBEDDING), 0)
    for value, kind in kinds.items():
        known[kind] += _bytes(value)
    return Footprint(**known, rest=max(size_bytes - sum(known.values()), 0))


class _Heads:
    """Tells the lm_head."""

    def __init__(self, graph: ir.Graph, tables: Collection[ir.Value]) -> None:
        shapes = [table.const_value.shape.numpy() for table in tables if table.const_value is not None]
        self._vocabulary = {int(shape[0]) for shape in shapes if shape}
        self._outer = branch_outputs(graph)

    def kind(self, output: ir.Value, columns: int, otherwise: str) -> str:
        return LM_HEAD if makes_logits(output, columns, self._vocabulary, self._outer) else otherwise


def _tables(nodes: Collection[ir.Node], packed: Collection[Packed]) -> Iterator[ir.Value]:
    """What tokens are looked up in: a table, or its codes, scales and zero points."""
    for node in nodes:
        if node.op_type == "Gather" and is_token(node.inputs[1]):
            yield from _seen_through(node.inputs[0])
    for one in packed:
        if one.is_table:
            for value in (one.codes, one.scales, one.zero_points):
                yield from _seen_through(value)


def _packed(weight: Packed, heads: _Heads) -> Iterator[tuple[ir.Value, str]]:
    """The tensors of a quantised layer, each with its kind."""
    tensors = ((weight.codes, CODES), (weight.scales, SCALES), (weight.zero_points, ZERO_POINTS))
    for tensor, kind in tensors:
        for value in _seen_through(tensor):
            yield value, heads.kind(weight.layer.outputs[0], weight.N or 0, kind)


def _floats(node: ir.Node, facts: Facts, heads: _Heads) -> Iterator[tuple[ir.Value, str]]:
    """The weight of a linear layer in floats, with its kind."""
    site = find_site(node, facts)
    if isinstance(site, Site):
        yield site.weight, heads.kind(site.output, site.N, LAYERS)


def _seen_through(value: ir.Value | None) -> Iterator[ir.Value]:
    """What a value is before Reshapes and Transposes."""
    while value is not None and (maker := value.producer()) is not None:
        if maker.op_type not in ("Reshape", "Transpose", "Identity"):
            break
        value = maker.inputs[0]
    if value is not None:
        yield value


def _bytes(value: ir.Value) -> int:
    tensor = constant(value)
    return 0 if tensor is None else tensor.nbytes
