"""Move the nodes that the CUDA kernels serve to a domain of their own, the others stay onnxruntime's."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from awq_onnx.errors import ModelError
from awq_onnx.output import OutputFiles
from awq_onnx.store import ModelSource, open_model

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


def adopt(model: ModelSource, output: str | os.PathLike[str], *, overwrite: bool = False) -> Adoption:
    """Write a model whose MatMulNBits nodes are ours, awq_onnx::MatMulNBits, wherever the CUDA kernels serve them.

    It runs in sessions with the library registered, see `register`: with replace=False the nodes that were left run on
    onnxruntime's own kernel. The weights are copied as they are. The output appears whole or not at all.

    Raises ModelError where no node can be moved, OutputError where the output exists or cannot be written.
    """
    with open_model(model) as opened, OutputFiles(Path(output), opened, overwrite=overwrite) as files:
        adoption = _move(opened.model)
        if not adoption.moved:
            raise ModelError(f"{opened.path or 'the model'} has nothing for the kernels: {_why_nothing(adoption.left)}")
        opened.model.opset_imports[TO] = VERSION
        files.write(opened.model)
        files.publish()
    return adoption


def _move(model: ir.Model) -> Adoption:
    moved, left = [], []
    for node in _nodes(model):
        reason = refusal(node)
        if reason is None:
            node.domain = TO
            moved.append(node.name or "")
        else:
            left.append(Left(node.name or "", reason))
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


def _why_nothing(left: tuple[Left, ...]) -> str:
    if not left:
        return f"it has no {FROM}::{OP_TYPE}; quantise it with awq-onnx first"
    return f"none of its {len(left)} {OP_TYPE} can be moved; of {left[0].name}, {left[0].reason}"


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
