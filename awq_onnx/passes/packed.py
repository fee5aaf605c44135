"""The weights of few bits that a graph holds, in whatever nodes read them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as ir

from awq_onnx.passes import sites
from awq_onnx.passes.bodies import all_nodes
from awq_onnx.passes.constants import constant

MATMUL, LOOKUP, DEQUANTIZE = "MatMulNBits", "GatherBlockQuantized", "DequantizeLinear"


@dataclass(frozen=True)
class Packed:
    """A weight of K inputs and N outputs, or a table of N rows of K numbers. What the graph does not tell is None.

    node: that holds it. layer: that is the linear layer, or the lookup: `node` itself, or the MatMul behind a
    DequantizeLinear. codes, scales, zero_points: its tensors; of a node that is not known, the first three constants.
    """

    node: ir.Node
    layer: ir.Node
    codes: ir.Value | None
    scales: ir.Value | None
    zero_points: ir.Value | None
    K: int | None = None
    N: int | None = None
    bits: int | None = None
    block_size: int | None = None

    @property
    def is_table(self) -> bool:
        return self.node.op_type == LOOKUP


def packed_weights(graph: ir.Graph) -> list[Packed]:
    """Those of layers in the order of the graph, then the tables."""
    tables = [node for node in all_nodes(graph) if node.op_type == LOOKUP]
    return [_KINDS.get(node.op_type, _unknown)(node) for node in (*sites.quantized_nodes(graph), *tables)]


def _multiplied(node: ir.Node) -> Packed:
    number = node.attributes.get_int
    K, N, block_size = (number(name, 0) or None for name in ("K", "N", "block_size"))
    codes, scales, zero_points = _inputs(node, 1, 2, 3)
    return Packed(node, node, codes, scales, zero_points, K, N, number("bits", 4), block_size)


def _looked_up(node: ir.Node) -> Packed:
    codes, scales, zero_points = _inputs(node, 0, 2, 3)
    block_size, known = node.attributes.get_int("block_size", 128), constant(scales)
    V, blocks = known.shape.numpy() if known is not None and len(known.shape) == 2 else (None, None)
    D = blocks and blocks * block_size
    return Packed(node, node, codes, scales, zero_points, D, V, node.attributes.get_int("bits", 4), block_size)


def _dequantized(node: ir.Node) -> Packed:
    tensor, readers = constant(node.inputs[0]), node.outputs[0].consumers()
    if tensor is None or [reader.op_type for reader in readers] != ["MatMul"]:
        return _unknown(node)
    K, N = tensor.shape.numpy()
    block_size = node.attributes.get_int("block_size", K)
    codes, scales, zero_points = _inputs(node, 0, 1, 2)
    return Packed(node, readers[0], codes, scales, zero_points, K, N, tensor.dtype.bitwidth, block_size)


def _unknown(node: ir.Node) -> Packed:
    constants = [value for value in node.inputs if constant(value) is not None]
    codes, scales, zero_points = [*constants, None, None, None][:3]
    return Packed(node, node, codes, scales, zero_points)


def _inputs(node: ir.Node, *places: int) -> Iterator[ir.Value | None]:
    yield from (node.inputs[at] if at < len(node.inputs) else None for at in places)


_KINDS = {MATMUL: _multiplied, LOOKUP: _looked_up, DEQUANTIZE: _dequantized}
