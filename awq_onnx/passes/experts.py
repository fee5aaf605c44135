"""Give every expert of a MatMul with a weight (E, K, N) a layer of its own: MatMulNBits knows no third axis.

x (E, T, K) -> MatMul with (E, K, N) -> y        becomes        x -> Split -> E MatMuls with (K, N) -> Concat -> y
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from awq_onnx.passes.bodies import all_nodes
from awq_onnx.passes.constants import STANDARD_DOMAINS, constant
from awq_onnx.passes.facts import Facts
from awq_onnx.passes.fold import remove_unread
from awq_onnx.passes.pointwise import reshaped
from awq_onnx.passes.rewrite import take_over

OLDEST_OPSET = 13  # of Split with its sizes as an input


def split_experts(model: ir.Model, facts: Facts) -> int:
    """Split every such MatMul whose x is known to have three axes, the first of E or 1; how many that were."""
    if facts.opsets.get("", 0) < OLDEST_OPSET:
        return 0
    nodes = [n for n in all_nodes(model.graph) if n.op_type == "MatMul" and n.domain in STANDARD_DOMAINS]
    return sum(_split(node, facts) for node in nodes)


def _split(node: ir.Node, facts: Facts) -> bool:
    weight, transposed = _weight(node.inputs[1])
    x = node.inputs[0]
    shape = facts.shape(x)
    if weight is None or x is None or shape is None or len(shape) != 3 or constant(x) is not None:
        return False
    tensor = constant(weight)
    assert tensor is not None
    experts, *matrix = (int(size) for size in tensor.shape.numpy())
    graph = node.graph
    if 0 in (experts, *matrix) or shape[0] not in (1, experts) or not isinstance(graph, ir.Graph):
        return False
    name = node.name or node.outputs[0].name or ""
    new: list[ir.Node] = []
    rows = [x] * experts if shape[0] == 1 else _parts(graph, x, experts, name, new)
    products = [
        _product(rows[index], _matrix(graph, weight, tensor, index, matrix), transposed, f"{name}.{index}", new)
        for index in range(experts)
    ]
    new.append(ir.node("Concat", products, {"axis": 0}, name=f"{name}.Concat"))
    take_over(node.outputs[0], new[-1].outputs[0])
    for one in new:
        graph.insert_before(node, one)
    old_weight = node.inputs[1]
    graph.remove(node, safe=True)
    remove_unread(old_weight)
    return True


def _weight(value: ir.Value | None) -> tuple[ir.Value | None, bool]:
    """The stored weight (E, K, N), or (E, N, K) where it stands behind a Transpose."""
    node = value.producer() if value is not None else None
    transposed = False
    if node is not None and node.op_type == "Transpose" and list(node.attributes.get_ints("perm", [])) == [0, 2, 1]:
        value, transposed = node.inputs[0], True
    tensor = constant(value)
    return (value, transposed) if tensor is not None and len(tensor.shape) == 3 else (None, False)


def _parts(graph: ir.Graph, x: ir.Value, experts: int, name: str, new: list[ir.Node]) -> Sequence[ir.Value]:
    sizes = ir.Tensor(np.ones(experts, np.int64), name=f"{name}.sizes")
    constant_sizes = ir.val(sizes.name, sizes.dtype, [experts], const_value=sizes)
    graph.register_initializer(constant_sizes)
    new.append(ir.node("Split", [x, constant_sizes], {"axis": 0}, name=f"{name}.Split", num_outputs=experts))
    for index, output in enumerate(new[-1].outputs):
        output.name = f"{name}.{index}.input"
    return new[-1].outputs


def _matrix(graph: ir.Graph, weight: ir.Value, tensor: ir.TensorProtocol, index: int, dims: Sequence[int]) -> ir.Value:
    """The weight of one expert, a reference into the same file."""
    size_bytes = tensor.nbytes // int(tensor.shape.numpy()[0])
    part = reshaped(tensor, (dims[0], dims[1]), index * size_bytes)
    value = ir.val(f"{weight.name}.{index}", tensor.dtype, list(dims), const_value=part)
    graph.register_initializer(value)
    return value


def _product(x: ir.Value, matrix: ir.Value, transposed: bool, name: str, new: list[ir.Node]) -> ir.Value:
    if transposed:
        new.append(ir.node("Transpose", [matrix], {"perm": [1, 0]}, name=f"{name}.Transpose"))
        matrix = new[-1].outputs[0]
        matrix.name = f"{name}.matrix"
    new.append(ir.node("MatMul", [x, matrix], name=name))
    new[-1].outputs[0].name = f"{name}.product"
    return new[-1].outputs[0]
