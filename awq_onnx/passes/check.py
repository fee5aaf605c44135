"""What must still be true of the graph after it was rewritten. A failure is a fault of ours, never the user's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir

from awq_onnx.errors import InternalError
from awq_onnx.passes.bodies import all_nodes
from awq_onnx.passes.constants import constant, is_plain
from awq_onnx.passes.sites import LAYER_OPS, node_name


@dataclass(frozen=True)
class Outline:
    """What a rewrite must not change: the names of inputs and outputs, and how often each op stands in the graph.

    Nodes that only make constants do not count: they may go with what read them. layers: how many are linear.
    """

    inputs: tuple[str | None, ...]
    outputs: tuple[str | None, ...]
    ops: Counter[str]
    layers: int


def outline_of(graph: ir.Graph) -> Outline:
    constants: set[ir.Value] = set()
    ops: Counter[str] = Counter()
    for node in all_nodes(graph):
        known = (value is None or value in constants or constant(value) is not None for value in node.inputs)
        if node.op_type == "Constant" or (is_plain(node) and all(known)):
            constants.update(node.outputs)
        else:
            ops[node.op_type] += 1
    return Outline(
        tuple(value.name for value in graph.inputs),
        tuple(value.name for value in graph.outputs),
        ops,
        sum(ops[op] for op in LAYER_OPS),
    )


def check(graph: ir.Graph, before: Outline, added: Mapping[str, int]) -> None:
    """Same inputs and outputs, as many nodes added of each op as `added` says, tensors of the right shapes."""
    after = outline_of(graph)
    if (after.inputs, after.outputs) != (before.inputs, before.outputs):
        raise InternalError("the inputs or outputs of the model changed")
    found = after.ops - before.ops
    if found != +Counter(added):
        raise InternalError(f"nodes were added: {dict(found)}, not {dict(added)}")
    replaced = before.layers - after.layers
    if replaced != added.get("MatMulNBits", 0):
        raise InternalError(f"{replaced} layers replaced by {added.get('MatMulNBits', 0)}")
    for node in all_nodes(graph):
        if node.op_type == "MatMulNBits":
            _check_node(node)
        elif node.op_type == "DequantizeLinear" and "block_size" in node.attributes:
            _check_dequantized(node)


def _check_dequantized(node: ir.Node) -> None:
    """Of blocks: a scale, and a zero point, for each."""
    codes, *others = map(constant, node.inputs)
    axis, block_size = node.attributes.get_int("axis", 1), node.attributes["block_size"].as_int()
    if codes is None:
        return
    expected = list(codes.shape.numpy())
    expected[axis] = -(-expected[axis] // block_size)
    for tensor in others:
        if tensor is None or list(tensor.shape.numpy()) != expected:
            raise InternalError(f"scales or zero points of {node_name(node)} are not {expected}")


def _check_node(node: ir.Node) -> None:
    K, N, block_size, bits = (node.attributes[name].as_int() for name in ("K", "N", "block_size", "bits"))
    blocks = -(-K // block_size)
    expected = [
        (N, blocks, block_size * bits // 8),
        (N, blocks),
        (N, -(-blocks * bits // 8)),
        None,
        (N,),
    ]
    given = [
        (index, value, dims)
        for index, (value, dims) in enumerate(zip(node.inputs[1:], expected, strict=False), 1)
        if value
    ]
    for index, value, dims in given:
        tensor = constant(value)
        if tensor is None or tuple(tensor.shape.numpy()) != dims:
            raise InternalError(f"input {index} of {node_name(node)} is not {dims}")
