"""Divide the tensor that absorbs a scale by it. Nothing that other nodes read is touched."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from awq_onnx.passes.absorb import Gain
from awq_onnx.passes.sites import constant


def fold_into_gain(graph: ir.Graph, gain: Gain, scale: NDArray[np.float32]) -> None:
    """gain / scale, scale float32 of the gain's size."""
    divide_constant(graph, gain.node, gain.index, scale)


def divide_constant(graph: ir.Graph, node: ir.Node, index: int, scale: NDArray[np.float32]) -> None:
    """Divide the constant vector at an input of `node` by `scale`; a copy of it where others read it as well."""
    value = node.inputs[index]
    tensor = constant(value)
    assert value is not None
    assert tensor is not None
    divided = ir.Tensor(divide(tensor.numpy(), scale), dtype=tensor.dtype, name=value.name)
    if value.is_initializer() and len(value.uses()) == 1:
        value.const_value = divided
        return
    name = f"{value.name}.{node.name or node.outputs[0].name}.scaled"
    replacement = ir.val(name, tensor.dtype, tensor.shape.numpy(), const_value=divided)
    divided.name = name
    graph.register_initializer(replacement)
    node.replace_input_with(index, replacement)
    remove_unread(graph, value)


def divide(values: NDArray[Any], scale: NDArray[np.float32]) -> NDArray[Any]:
    """values (…, n) / scale (n,), rounded once."""
    divided: NDArray[Any] = (values.astype(np.float64) / scale).astype(values.dtype)
    return divided


def remove_unread(graph: ir.Graph, value: ir.Value | None) -> None:
    """Remove an initializer, or the node that makes `value` and what only it read, if nothing reads it any more."""
    if value is None or value.uses() or value.is_graph_output() or value.is_graph_input():
        return
    node = value.producer()
    if node is None:
        graph.initializers.pop(value.name or "", None)
        return
    if any(output.uses() or output.is_graph_output() for output in node.outputs):
        return
    inputs = node.inputs
    graph.remove(node, safe=True)
    for read in inputs:
        remove_unread(graph, read)
