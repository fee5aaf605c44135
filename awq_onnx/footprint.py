"""Where the bytes of a model are."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import onnx_ir as ir

from awq_onnx.passes.bodies import all_nodes, branch_outputs
from awq_onnx.passes.constants import constant
from awq_onnx.passes.facts import Facts
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
    kinds = dict.fromkeys(_tables(nodes), EMBEDDING)
    heads = _Heads(model.graph, kinds)
    for node in nodes:
        for value, kind in _weights(node, facts, heads):
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


def _tables(nodes: Collection[ir.Node]) -> Iterator[ir.Value]:
    """What tokens are looked up in: a table, or its codes, scales and zero points."""
    for node in nodes:
        if node.op_type == "Gather" and is_token(node.inputs[1]):
            yield from _read(node, 0)
        elif node.op_type == "GatherBlockQuantized":
            yield from _read(node, 0, 2, 3)


def _weights(node: ir.Node, facts: Facts, heads: _Heads) -> Iterator[tuple[ir.Value, str]]:
    """The weight of a linear layer, with its kind."""
    if node.op_type == "MatMulNBits":
        columns = node.attributes.get_int("N", 0)
        for at, kind in enumerate((CODES, SCALES, ZERO_POINTS), 1):
            for value in _read(node, at):
                yield value, heads.kind(node.outputs[0], columns, kind)
    elif isinstance(site := find_site(node, facts), Site):
        yield site.weight, heads.kind(site.output, site.N, LAYERS)


def _read(node: ir.Node, *inputs: int) -> Iterator[ir.Value]:
    """What stands at some inputs, seen through Reshapes and Transposes."""
    for at in inputs:
        value = node.inputs[at] if at < len(node.inputs) else None
        while value is not None and (maker := value.producer()) is not None:
            if maker.op_type not in ("Reshape", "Transpose", "Identity"):
                break
            value = maker.inputs[0]
        if value is not None:
            yield value


def _bytes(value: ir.Value) -> int:
    tensor = constant(value)
    return 0 if tensor is None else tensor.nbytes
