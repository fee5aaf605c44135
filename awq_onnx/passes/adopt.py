"""Move the MatMulNBits nodes that the CUDA kernels serve to a domain of ours; the others stay onnxruntime's."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as ir

OP_TYPE, FROM, TO, VERSION = "MatMulNBits", "com.microsoft", "awq_onnx", 1
SCALES, ZERO_POINTS, G_IDX = 2, 3, 4  # inputs
BLOCK_SIZES = (16, 32, 64, 128, 256)
TYPES = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.FLOAT)
VIEWS = ("Identity", "Reshape")  # what an exporter puts between a shared tensor and its reader


@dataclass(frozen=True)
class Left:
    """A node that stays onnxruntime's, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Adoption:
    """Names of the nodes that were moved, and what was left."""

    moved: tuple[str, ...]
    left: tuple[Left, ...]


def move(model: ir.Model) -> Adoption:
    """Give the nodes that are served our domain, in place."""
    moved, left = [], []
    for node in _nodes(model):
        reason = refusal(node)
        if reason is None:
            node.domain = TO
            moved.append(node.name or "")
        else:
            left.append(Left(node.name or "", reason))
    if moved:
        model.opset_imports[TO] = VERSION
    return Adoption(tuple(moved), tuple(left))


def _nodes(model: ir.Model) -> Iterator[ir.Node]:
    for graph in model.graphs():
        yield from (node for node in graph if node.op_type == OP_TYPE and node.domain == FROM)


def refusal(node: ir.Node) -> str | None:
    """Why the CUDA kernels do not serve a MatMulNBits node, None where they do. ort_op.c checks it too, and shapes."""
    bits, block_size = (_integer(node, name, default) for name, default in (("bits", 4), ("block_size", 0)))
    scales, zero_points, g_idx = (_input(node, index) for index in (SCALES, ZERO_POINTS, G_IDX))
    dtype = _dtype(scales)
    if bits != 4:
        return f"its weight has {bits} bits, the kernels know 4"
    if block_size not in BLOCK_SIZES:
        return f"its block_size is {block_size}, the kernels know {', '.join(map(str, BLOCK_SIZES))}"
    if _integer(node, "weight_prepacked", 0):
        return "its weight is packed for another kernel"
    if g_idx is not None:
        return "it has the input g_idx, which the kernels do not know"
    if zero_points is not None and _dtype(zero_points) != ir.DataType.UINT8:
        return "its zero points are not uint8, two in a byte"
    if dtype not in TYPES:
        known = "unknown" if dtype is None else str(dtype.numpy())
        return f"its type is {known}, the kernels know float16, bfloat16 and float32"
    return None


def _integer(node: ir.Node, name: str, default: int) -> int:
    return node.attributes.get_int(name, default)


def _input(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if index < len(node.inputs) else None


def _dtype(value: ir.Value | None) -> ir.DataType | None:
    """Of a value, or of what it is a view of."""
    while value is not None and value.dtype is None:
        if value.const_value is not None:
            return value.const_value.dtype
        producer = value.producer()
        value = producer.inputs[0] if producer is not None and producer.op_type in VIEWS else None
    return None if value is None else value.dtype
