"""Write 1x1 Convs between two Transposes as the linear layers they are, and drop the Transposes.

    x -> Transpose -> Conv -> Relu -> Conv -> Transpose -> y        becomes        x -> MatMul -> Relu -> MatMul -> y

A Conv whose channels come first on both sides would need Transposes that are not there: it stays.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import onnx_ir as ir

from awq_onnx.passes.bodies import all_nodes
from awq_onnx.passes.constants import STANDARD_DOMAINS, constant, reshaped
from awq_onnx.passes.fold import remove_unread
from awq_onnx.passes.names import Names
from awq_onnx.passes.rewrite import take_over

# Steps that do the same wherever the channels are.
ELEMENTWISE = frozenset(
    {"Relu", "LeakyRelu", "Gelu", "Sigmoid", "Tanh", "Erf", "Elu", "Softplus", "HardSwish", "Cast", "Identity", "Neg"}
    | {"Mul", "Add", "Sub", "Div", "Dropout"}
)


@dataclass
class _Region:
    """Nodes between Transposes. starts: the Transposes before it, ends: those behind it."""

    nodes: dict[ir.Node, None] = field(default_factory=dict)
    starts: dict[ir.Node, None] = field(default_factory=dict)
    ends: dict[ir.Node, None] = field(default_factory=dict)


def write_as_matmuls(graph: ir.Graph) -> int:
    """Rewrite every such region of `graph`; how many Convs that were."""
    rewritten, names = 0, Names(graph)
    for node in list(all_nodes(graph)):
        if node.graph is None or not _is_pointwise(node):
            continue
        region = _region(node)
        if region is not None:
            rewritten += _rewrite(region, names)
    return rewritten


def _is_pointwise(node: ir.Node) -> bool:
    """Whether a Conv is a linear layer over the axis 1: kernel 1, no stride, no groups, a constant weight."""
    if node.op_type != "Conv" or node.domain not in STANDARD_DOMAINS:
        return False
    tensor = constant(node.inputs[1])
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if tensor is None or set(tensor.shape.numpy()[2:]) != {1} or (bias is not None and constant(bias) is None):
        return False
    numbers = node.attributes
    ones = set(numbers.get_ints("strides", [1])) | set(numbers.get_ints("dilations", [1]))
    return ones == {1} and not any(numbers.get_ints("pads", [0])) and numbers.get_int("group", 1) == 1


def _region(first: ir.Node) -> _Region | None:
    """The nodes around a Conv that see channels first, if Transposes close them in on all sides."""
    tensor = constant(first.inputs[1])
    assert tensor is not None
    rank = len(tensor.shape)
    to_first, to_last = [0, rank - 1, *range(1, rank - 1)], [0, *range(2, rank), 1]
    region, waiting = _Region(), [first]
    while waiting:
        node = waiting.pop()
        if node in region.nodes:
            continue
        if not _is_pointwise(node) and not _is_elementwise(node):
            return None
        region.nodes[node] = None
        for value in _activations(node):
            maker = value.producer()
            if maker is None:
                return None
            if _permutes(maker, to_first):
                region.starts[maker] = None
            else:
                waiting.append(maker)
        for output in node.outputs:
            if output.is_graph_output():
                return None
            for reader in output.consumers():
                if _permutes(reader, to_last):
                    region.ends[reader] = None
                    if reader.outputs[0].is_graph_output() and len(output.uses()) > 1:
                        return None  # one value cannot have two names
                else:
                    waiting.append(reader)
    return region


def _is_elementwise(node: ir.Node) -> bool:
    """Whether a node treats all numbers alike; constants it takes have to be single numbers."""
    if node.op_type not in ELEMENTWISE or node.domain not in STANDARD_DOMAINS:
        return False
    constants = [tensor for value in node.inputs if (tensor := constant(value)) is not None]
    return all(tensor.size == 1 for tensor in constants)


def _activations(node: ir.Node) -> Sequence[ir.Value]:
    values = node.inputs[:1] if node.op_type == "Conv" else node.inputs
    return [value for value in values if value is not None and constant(value) is None]


def _permutes(node: ir.Node, perm: Sequence[int]) -> bool:
    return (
        node.op_type == "Transpose"
        and node.domain in STANDARD_DOMAINS
        and list(node.attributes.get_ints("perm", [])) == list(perm)
    )


def _rewrite(region: _Region, names: Names) -> int:
    convs = [node for node in region.nodes if node.op_type == "Conv"]
    for node in region.nodes:
        for output in node.outputs:
            output.shape = None  # the axes change places
    for start in region.starts:
        for use in list(start.outputs[0].uses()):
            if use.node in region.nodes:
                use.node.replace_input_with(use.idx, start.inputs[0])
    for end in region.ends:
        before, after = end.inputs[0], end.outputs[0]
        assert before is not None
        take_over(after, before)
    for conv in convs:
        _to_matmul(conv, names)
    for node in (*region.ends, *region.starts):
        remove_unread(node.outputs[0])
    return len(convs)


def _to_matmul(conv: ir.Node, names: Names) -> None:
    """MatMul and Add in the place of a Conv whose input has its channels last by now."""
    graph = conv.graph
    assert isinstance(graph, ir.Graph)
    x, weight = conv.inputs[:2]
    bias = conv.inputs[2] if len(conv.inputs) > 2 else None
    nodes = list(_linear(graph, conv, x, weight, bias, names))
    take_over(conv.outputs[0], nodes[-1].outputs[0])
    for node in nodes:
        graph.insert_before(conv, node)
    graph.remove(conv, safe=True)
    remove_unread(weight)


def _linear(
    graph: ir.Graph,
    conv: ir.Node,
    x: ir.Value | None,
    weight: ir.Value | None,
    bias: ir.Value | None,
    names: Names,
) -> Iterator[ir.Node]:
    tensor = constant(weight)
    assert tensor is not None
    rows, columns = tensor.shape.numpy()[:2]
    name = conv.name or conv.outputs[0].name
    matrix = ir.val(
        names.fresh(f"{name}.matrix"), tensor.dtype, [rows, columns], const_value=reshaped(tensor, (rows, columns))
    )
    graph.register_initializer(matrix)
    transpose = ir.node("Transpose", [matrix], {"perm": [1, 0]}, name=names.fresh(f"{name}.matrix.Transpose"))
    transpose.outputs[0].name = names.fresh(f"{name}.matrix.transposed")
    yield transpose
    product = ir.node(
        "MatMul",
        [x, transpose.outputs[0]],
        name=conv.name,
        doc_string=conv.doc_string,
        metadata_props=conv.metadata_props,
    )
    product.outputs[0].name = names.fresh(f"{name}.product")
    yield product
    if bias is not None:
        yield ir.node("Add", [product.outputs[0], bias], name=names.fresh(f"{name}.bias"))
