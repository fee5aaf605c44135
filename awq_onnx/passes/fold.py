"""Divide what absorbs a scale by it, multiply what must not see it. Nothing that other nodes read is touched."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from awq_onnx.passes.absorb import Vector
from awq_onnx.passes.sites import Site


def divide_vector(graph: ir.Graph, vector: Vector, scale: NDArray[np.float32]) -> None:
    """Divide the last numbers of a constant by `scale`, one for each; a copy of it where others read it as well."""
    values = vector.tensor.numpy().copy()
    flat = values.reshape(-1)
    flat[-scale.size :] = divide(flat[-scale.size :], scale)
    replace_constant(graph, vector.node, vector.index, ir.Tensor(values, dtype=vector.tensor.dtype))


def multiply_rows(graph: ir.Graph, site: Site, weight: NDArray[Any], scale: NDArray[np.float32]) -> None:
    """Multiply the rows of a layer that stays in float, so that it reads x / s as it read x. weight: (K, N)."""
    multiplied = (weight.astype(np.float64) * scale[:, None]).astype(site.dtype.numpy())
    written = np.ascontiguousarray(multiplied.T if site.node.attributes.get_int("transB", 0) else multiplied)
    replace_constant(graph, site.node, 1, ir.Tensor(written, dtype=site.dtype))


def replace_constant(graph: ir.Graph, node: ir.Node, index: int, tensor: ir.Tensor[Any]) -> None:
    """Put `tensor` in the place of what node.inputs[index] holds, for this node alone."""
    value = node.inputs[index]
    assert value is not None
    if value.is_initializer() and len(value.uses()) == 1 and value.graph is graph:
        tensor.name = value.name
        value.const_value = tensor
        value.dtype, value.shape = tensor.dtype, ir.Shape(tensor.shape.numpy())
        return
    tensor.name = f"{value.name}.{node.name or node.outputs[0].name}.scaled"
    replacement = ir.val(tensor.name, tensor.dtype, tensor.shape.numpy(), const_value=tensor)
    graph.register_initializer(replacement)
    node.replace_input_with(index, replacement)
    remove_unread(value)


def divide(values: NDArray[Any], scale: NDArray[np.float32]) -> NDArray[Any]:
    """values (…, n) / scale (n,), rounded once."""
    divided: NDArray[Any] = (values.astype(np.float64) / scale).astype(values.dtype)
    return divided


def remove_unread(value: ir.Value | None) -> None:
    """Remove an initializer, or the node that makes `value` and what only it read, if nothing reads it any more."""
    if value is None or value.uses() or value.is_graph_output() or value.is_graph_input():
        return
    node, graph = value.producer(), value.graph
    if node is None:
        if graph is not None:
            graph.initializers.pop(value.name or "", None)
        return
    if any(output.uses() or output.is_graph_output() for output in node.outputs):
        return
    inputs = node.inputs
    if node.graph is not None:
        node.graph.remove(node, safe=True)
    for read in inputs:
        remove_unread(read)
