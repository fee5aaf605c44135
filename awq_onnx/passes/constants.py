"""Which values of a graph are known without running it, and what they are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TypeAlias

import numpy as np
import onnx
import onnx_ir as ir

from awq_onnx import runtime

Opsets: TypeAlias = "Mapping[str, int]"

FLOATS = frozenset({ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE})
STANDARD_DOMAINS = ("", "ai.onnx")
MOST_NODES = 16  # between a value and the constants it is computed from
# What makes something else every time, or cannot be computed ahead.
NEVER_CONSTANT = frozenset({"RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Bernoulli"})


def constant(value: ir.Value | None) -> ir.TensorProtocol | None:
    """The tensor of an initializer that no caller can override, or of a Constant node; else None."""
    if value is None:
        return None
    if value.is_initializer():
        return None if value.is_graph_input() else value.const_value
    node = value.producer()
    if node is None or node.op_type != "Constant" or "sparse_value" in node.attributes:
        return None
    tensor: ir.TensorProtocol | None
    if "value" in node.attributes and not node.attributes["value"].is_ref():
        tensor = node.attributes["value"].value  # nearly always; the general way takes much longer
    else:
        tensor = ir.convenience.get_const_tensor(value)
    return tensor


def is_computed(value: ir.Value | None) -> bool:
    """Whether `value` is a constant, or made of constants by a few standard nodes: 1 + w, a Cast, a dequantised w."""
    return value is not None and _nodes_behind(value) is not None


def computed(value: ir.Value | None, opsets: Opsets) -> ir.TensorProtocol | None:
    """The tensor of a constant or of what `is_computed`; nothing large is read before its values are asked for.

    opsets: of the model, by domain; they tell what the nodes mean.
    """
    stored = constant(value)
    if value is None or stored is not None:
        return stored
    nodes = _nodes_behind(value)
    if not nodes:
        return None
    model = _model(value, nodes, opsets)
    try:
        dtype, dims = _type_of(model)
    except Exception:  # the checks of onnx raise a dozen classes; what cannot be inferred is no weight for us
        return None

    def evaluate() -> ir.TensorProtocol:
        return ir.Tensor(runtime.evaluate(model.SerializeToString(), _folder(nodes)), dtype=dtype)

    return ir.LazyTensor(evaluate, dtype, dims, name=value.name)


def stored(value: ir.Value) -> ir.TensorProtocol | None:
    """As `constant`, and the default of an initializer that a caller may override."""
    return value.const_value if value.is_initializer() else constant(value)


def depends_on_data(value: ir.Value | None) -> bool:
    """Whether a value depends on what the model's inputs hold, and not on their shapes alone."""
    waiting, seen = [value], set()
    while waiting:
        one = waiting.pop()
        if one is None or one in seen or one.is_initializer():
            continue
        seen.add(one)
        node = one.producer()
        if node is None:
            return True
        if node.op_type not in ("Shape", "Size"):
            waiting.extend(node.inputs)
    return False


def _nodes_behind(value: ir.Value) -> list[ir.Node] | None:
    """The nodes that make `value` from constants, in order; None where something else takes part, or too many do."""
    nodes: dict[ir.Node, None] = {}
    visited: set[ir.Node] = set()

    def visit(one: ir.Value) -> bool:
        if constant(one) is not None:
            return True
        node = one.producer()
        if node is None or one.is_graph_input() or not is_plain(node):
            return False
        if node in nodes:
            return True
        visited.add(node)
        if len(visited) > MOST_NODES or not all(visit(read) for read in node.inputs if read is not None):
            return False
        nodes[node] = None
        return True

    return list(nodes) if visit(value) else None


def is_plain(node: ir.Node) -> bool:
    """Whether a node always makes the same of the same inputs, and holds no bodies."""
    bodies = any(a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for a in node.attributes.values())
    return (
        node.domain in STANDARD_DOMAINS
        and node.op_type not in NEVER_CONSTANT
        and node.op_type != "Constant"  # one that `constant` cannot read
        and not bodies
    )


def _leaves(nodes: list[ir.Node]) -> Iterator[tuple[str, ir.TensorProtocol]]:
    for name, value in {v.name or "": v for node in nodes for v in node.inputs if v is not None}.items():
        tensor = constant(value)
        if tensor is not None:
            yield name, tensor


def _model(value: ir.Value, nodes: list[ir.Node], opsets: Opsets) -> onnx.ModelProto:
    """The nodes as a model of their own, without inputs; large tensors stay references into their files."""
    graph = onnx.helper.make_graph(
        [ir.to_proto(node) for node in nodes],
        "constant",
        [],
        [onnx.ValueInfoProto(name=value.name)],
        [_initializer(name, tensor) for name, tensor in _leaves(nodes)],
    )
    return onnx.helper.make_model(
        graph, opset_imports=[onnx.helper.make_opsetid(d, v) for d, v in opsets.items()], ir_version=10
    )


def _initializer(name: str, tensor: ir.TensorProtocol) -> onnx.TensorProto:
    written = ir.to_proto(tensor)
    written.name = name
    return written


def _type_of(model: onnx.ModelProto) -> tuple[ir.DataType, ir.Shape]:
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
    (output,) = inferred.graph.output
    made = output.type.tensor_type
    dims = [dim.dim_value for dim in made.shape.dim if dim.HasField("dim_value")]
    if not made.HasField("shape") or len(dims) != len(made.shape.dim):
        raise ValueError(f"the shape of {output.name} cannot be inferred")
    return ir.DataType(made.elem_type), ir.Shape(dims)


def _folder(nodes: list[ir.Node]) -> Path:
    """Where the references point to: one folder for all of a model (see `store`)."""
    folders = [tensor.base_dir for _, tensor in _leaves(nodes) if isinstance(tensor, ir.ExternalTensor)]
    return Path(folders[0] if folders else ".")


def reshaped(tensor: ir.TensorProtocol, dims: tuple[int, ...], offset_bytes: int = 0) -> ir.TensorProtocol:
    """The same numbers, or a run of them, in another shape; a reference into a file stays one."""
    if isinstance(tensor, ir.ExternalTensor):
        shape = ir.Shape(dims)
        size_bytes = tensor.nbytes * int(np.prod(dims)) // max(tensor.size, 1)
        return ir.ExternalTensor(
            tensor.location,
            (tensor.offset or 0) + offset_bytes,
            size_bytes,
            tensor.dtype,
            shape=shape,
            name=tensor.name or "",
            base_dir=tensor.base_dir,
        )
    values = tensor.numpy()
    start = offset_bytes // values.itemsize
    return ir.Tensor(values.reshape(-1)[start : start + int(np.prod(dims))].reshape(dims), dtype=tensor.dtype)
