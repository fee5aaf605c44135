"""Give every expert of a MatMul with a weight (E, K, N) a layer of its own: MatMulNBits knows no third axis.

x (E, T, K) -> MatMul with (E, K, N) -> y        becomes        x -> Split -> E MatMuls with (K, N) -> Concat -> y
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from awq_onnx.passes.bodies import all_nodes
from awq_onnx.passes.constants import STANDARD_DOMAINS, constant, is_computed, reshaped
from awq_onnx.passes.facts import Facts
from awq_onnx.passes.fold import remove_unread
from awq_onnx.passes.names import Names
from awq_onnx.passes.rewrite import take_over
from awq_onnx.passes.sites import QUANTIZABLE_DTYPES, Choice, node_name

OLDEST_OPSET = 13  # of Split with its sizes as an input


def split_experts(model: ir.Model, facts: Facts, choice: Choice | None = None) -> int:
    """Split every such MatMul that is chosen and whose x is known to have three axes, the first of E or 1; how many."""
    if facts.opsets.get("", 0) < OLDEST_OPSET:
        return 0
    nodes = [n for n in all_nodes(model.graph) if n.op_type == "MatMul" and n.domain in STANDARD_DOMAINS]
    if choice is not None:
        nodes = [node for node in nodes if choice.refuses(node_name(node)) is None]
    splitter = _Splitter(model.graph, facts)
    return sum(splitter.split(node) for node in nodes)


class _Splitter:
    """Splits MatMuls, and every stack once, however many MatMuls have it."""

    def __init__(self, graph: ir.Graph, facts: Facts) -> None:
        self._graph, self._facts, self._names = graph, facts, Names(graph)
        self._matrices: dict[ir.Value, list[ir.Value]] = {}

    def split(self, node: ir.Node) -> bool:
        weight, transposed = _weight(node.inputs[1])
        tensor, x = constant(weight), node.inputs[0]
        shape = self._facts.shape(x)
        if weight is None or tensor is None or x is None or shape is None or len(shape) != 3 or is_computed(x):
            return False
        experts = int(tensor.shape.numpy()[0])
        holder = node.graph
        if (
            tensor.dtype not in QUANTIZABLE_DTYPES
            or not tensor.size
            or shape[0] not in (1, experts)
            or not isinstance(holder, ir.Graph)
        ):
            return False
        name = node.name or node.outputs[0].name or ""
        new: list[ir.Node] = []
        rows = [x] * experts if shape[0] == 1 else self._parts(x, experts, name, new)
        products = [
            self._product(row, matrix, transposed, f"{name}.{index}", new)
            for index, (row, matrix) in enumerate(zip(rows, self._stack(weight, tensor), strict=True))
        ]
        new.append(ir.node("Concat", products, {"axis": 0}, name=self._names.fresh(f"{name}.Concat")))
        take_over(node.outputs[0], new[-1].outputs[0])
        for one in new:
            holder.insert_before(node, one)
        old_weight = node.inputs[1]
        holder.remove(node, safe=True)
        remove_unread(old_weight)
        return True

    def _parts(self, x: ir.Value, experts: int, name: str, new: list[ir.Node]) -> Sequence[ir.Value]:
        sizes = ir.Tensor(np.ones(experts, np.int64), name=self._names.fresh(f"{name}.sizes"))
        constant_sizes = ir.val(sizes.name, sizes.dtype, [experts], const_value=sizes)
        self._graph.register_initializer(constant_sizes)
        new.append(
            ir.node(
                "Split", [x, constant_sizes], {"axis": 0}, name=self._names.fresh(f"{name}.Split"), num_outputs=experts
            )
        )
        for index, output in enumerate(new[-1].outputs):
            output.name = self._names.fresh(f"{name}.{index}.input")
        return new[-1].outputs

    def _stack(self, weight: ir.Value, tensor: ir.TensorProtocol) -> list[ir.Value]:
        """The weights of the experts, references into the same file; in the main graph, where bodies see them too."""
        if weight not in self._matrices:
            experts, *dims = (int(size) for size in tensor.shape.numpy())
            made = []
            for index in range(experts):
                part = reshaped(tensor, (dims[0], dims[1]), index * (tensor.nbytes // experts))
                name = self._names.fresh(f"{weight.name}.{index}")
                made.append(ir.val(name, tensor.dtype, dims, const_value=part))
                self._graph.register_initializer(made[-1])
            self._matrices[weight] = made
        return self._matrices[weight]

    def _product(self, x: ir.Value, matrix: ir.Value, transposed: bool, name: str, new: list[ir.Node]) -> ir.Value:
        if transposed:
            new.append(ir.node("Transpose", [matrix], {"perm": [1, 0]}, name=self._names.fresh(f"{name}.Transpose")))
            matrix = new[-1].outputs[0]
            matrix.name = self._names.fresh(f"{name}.matrix")
        new.append(ir.node("MatMul", [x, matrix], name=self._names.fresh(name)))
        new[-1].outputs[0].name = self._names.fresh(f"{name}.product")
        return new[-1].outputs[0]


def _weight(value: ir.Value | None) -> tuple[ir.Value | None, bool]:
    """The stored weight (E, K, N), or (E, N, K) where it stands behind a Transpose."""
    node = value.producer() if value is not None else None
    transposed = False
    if node is not None and node.op_type == "Transpose" and list(node.attributes.get_ints("perm", [])) == [0, 2, 1]:
        value, transposed = node.inputs[0], True
    tensor = constant(value)
    return (value, transposed) if tensor is not None and len(tensor.shape) == 3 else (None, False)
