"""Divide what absorbs a scale by it, multiply what must not see it. Nothing that other nodes read is touched."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from awq_onnx.passes.absorb import Absorber, Group, Linear, Vector
from awq_onnx.passes.names import Names
from awq_onnx.passes.sites import Site


@dataclass(frozen=True, eq=False)
class Folding:
    """A scale and where it goes: float32 (K,) as the inputs of `group` see it, and (channels,) for each absorber."""

    group: Group
    scale: NDArray[np.float32]
    divided: tuple[tuple[Absorber, NDArray[np.float32]], ...]


def fold_scales(
    graph: ir.Graph,
    foldings: Iterable[Folding],
    read_weight: Callable[[Site], NDArray[np.float32]],
    packed: Container[Site] = (),
) -> dict[Site, NDArray[np.float32]]:
    """Divide gains and biases, and change every layer that a scale concerns; what its columns were divided by.

    read_weight: the weight (K, N) of a layer. packed: layers whose codes know of their scale already: they are not
    changed here, and their columns are still to be divided.
    """
    rows: dict[Site, NDArray[np.float32]] = {}
    columns: dict[Site, NDArray[np.float32]] = {}
    for folding in foldings:
        for absorber, divisor in folding.divided:
            for vector in absorber.vectors:
                divide_vector(graph, vector, divisor)
            if isinstance(absorber, Linear):
                columns[absorber.site] = divisor
        rows.update((layer, folding.scale) for layer in (*folding.group.sites, *folding.group.compensated))
    for layer in {**rows, **columns}:
        if layer not in packed:
            rescale_layer(graph, layer, read_weight(layer), rows.get(layer), columns.get(layer))
    return columns


def divide_vector(graph: ir.Graph, vector: Vector, scale: NDArray[np.float32]) -> None:
    """Divide the last numbers of a constant by `scale`, one for each; a copy of it where others read it as well."""
    values = vector.tensor.numpy().copy()
    flat = values.reshape(-1)
    flat[-scale.size :] = divide(flat[-scale.size :], scale)
    replace_constant(graph, vector.node, vector.index, ir.Tensor(values, dtype=vector.tensor.dtype))


def divided_nodes(absorber: Absorber) -> list[ir.Node]:
    """The nodes that hold what is divided: a norm and what adds its beta, or a layer and what adds its bias."""
    layer = [absorber.site.node] if isinstance(absorber, Linear) else []
    return layer + [vector.node for vector in absorber.vectors]


def rescale_layer(
    graph: ir.Graph,
    site: Site,
    weight: NDArray[Any],
    rows: NDArray[np.float32] | None,
    columns: NDArray[np.float32] | None,
) -> None:
    """Change a layer that stays in float: multiply the rows of its weight (K, N), so that it reads x / s as it read x;
    divide the columns, and the bias, by what its readers want.
    """
    changed = weight.astype(np.float64) / site.factor
    if rows is not None:
        changed *= rows[:, None]
    if columns is not None:
        changed /= columns
    written = changed.T if site.node.attributes.get_int("transB", 0) else changed
    replace_constant(graph, site.node, 1, _typed(written, site.dtype))
    if columns is not None and site.bias is not None:
        bias = np.broadcast_to(site.bias.numpy().astype(np.float64).reshape(-1), columns.shape)
        replace_constant(graph, site.node, 2, _typed(bias / columns, site.dtype))


def _typed(values: NDArray[np.float64], dtype: ir.DataType) -> ir.Tensor[Any]:
    return ir.Tensor(np.ascontiguousarray(values).astype(dtype.numpy()), dtype=dtype)


def insert_mul(
    graph: ir.Graph, value: ir.Value, sites: Sequence[Site], factor: NDArray[np.float32], names: Names
) -> ir.Node:
    """Give `sites` value * factor, factor (K,), in the place of value: what is left where nothing absorbs a scale."""
    first = sites[0].node
    name = names.fresh(f"{value.name}.scaled")
    tensor = ir.Tensor(factor.astype(sites[0].dtype.numpy()), name=names.fresh(f"{name}.by"))
    constant = ir.val(tensor.name, tensor.dtype, tensor.shape.numpy(), const_value=tensor)
    graph.register_initializer(constant)
    node = ir.node("Mul", [value, constant], name=name)
    made = node.outputs[0]
    made.name, made.type, made.shape = name, value.type, value.shape
    holder = first.graph
    assert isinstance(holder, ir.Graph)
    holder.insert_before(first, node)
    for site in sites:
        site.node.replace_input_with(0, made)
    return node


def replace_constant(graph: ir.Graph, node: ir.Node, index: int, tensor: ir.Tensor[Any]) -> None:
    """Put `tensor` in the place of what node.inputs[index] holds, for this node alone."""
    value = node.inputs[index]
    assert value is not None
    alone = len(value.uses()) == 1 and not value.is_graph_output() and not value.is_graph_input()
    if value.is_initializer() and alone and value.graph is graph:
        tensor.name = value.name
        value.const_value = tensor
        value.dtype, value.shape = tensor.dtype, ir.Shape(tensor.shape.numpy())
        return
    tensor.name = _fresh_name(graph, f"{value.name}.{node.name or node.outputs[0].name}.scaled")
    replacement = ir.val(tensor.name, tensor.dtype, tensor.shape.numpy(), const_value=tensor)
    graph.register_initializer(replacement)
    node.replace_input_with(index, replacement)
    remove_unread(value)


def _fresh_name(graph: ir.Graph, wanted: str) -> str:
    """`wanted`, or that with a number where an initializer has the name already."""
    names = (wanted if n == 0 else f"{wanted}.{n}" for n in count())
    return next(name for name in names if name not in graph.initializers)


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
