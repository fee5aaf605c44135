"""Find every MatMul with a constant weight, and the groups of them that read the same input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import onnx_ir as ir

QUANTIZED_OPS = frozenset({"MatMulNBits", "MatMulBnb4", "MatMulInteger", "QLinearMatMul", "DynamicQuantizeMatMul"})
WEIGHT_VIEWS = frozenset({"Transpose", "Cast", "Identity"})  # ops a weight may pass on its way to the MatMul
QUANTIZABLE_DTYPES = frozenset({ir.DataType.FLOAT, ir.DataType.FLOAT16})
# What may stand between the lm_head and the graph output: a bias, a soft cap, a temperature.
AFTER_HEAD = frozenset({"Cast", "Identity", "Add", "Mul", "Div", "Tanh", "Reshape", "Squeeze", "Unsqueeze"})


@dataclass(frozen=True)
class Refusal:
    """Something that is left as it is, and why.

    what: the node or value in the way. reason: without names, so that equal reasons can be told together.
    """

    what: str
    reason: str


@dataclass(frozen=True, eq=False)
class Site:
    """One MatMul(x, W) whose W (K, N) is constant.

    name: of the node, kept here since a rewrite takes the names of its values away. tensor: the initializer W comes
    from, `transposed` where the file holds it as (N, K). dtype: of x, so of the scales too.
    """

    node: ir.Node
    name: str
    tensor: ir.TensorProtocol
    transposed: bool
    dtype: ir.DataType
    K: int
    N: int

    @property
    def input(self) -> ir.Value:
        return _given(self.node.inputs[0])

    @property
    def output(self) -> ir.Value:
        return self.node.outputs[0]


SitesByInput: TypeAlias = "dict[ir.Value, list[Site]]"


@dataclass(frozen=True)
class Survey:
    """sites: what will be quantised, in graph order. kept: what could be, and is not, each with its reason."""

    sites: tuple[Site, ...]
    kept: tuple[Refusal, ...]

    def by_input(self) -> SitesByInput:
        """The sites that share an input, and so a scale; in graph order."""
        groups: SitesByInput = {}
        for site in self.sites:
            groups.setdefault(site.input, []).append(site)
        return groups


def survey(graph: ir.Graph) -> Survey:
    """All MatMuls of the main graph with a constant weight."""
    sites, kept = [], []
    vocabulary = _embedding_rows(graph)
    for node in graph:
        found = find_site(node)
        if isinstance(found, Site) and _is_head(found, vocabulary):
            found = Refusal(found.name, "it is the lm_head, which stays as it is")
        if isinstance(found, Site):
            sites.append(found)
        elif found is not None:
            kept.append(found)
    return Survey(tuple(sites), tuple(kept))


def quantized_nodes(graph: ir.Graph) -> list[ir.Node]:
    """Nodes that hold weights of few bits already."""
    return [
        node
        for node in graph
        if node.op_type in QUANTIZED_OPS
        or (node.op_type == "DequantizeLinear" and (tensor := constant(node.inputs[0])) and len(tensor.shape) == 2)
    ]


def find_site(node: ir.Node) -> Site | Refusal | None:
    """The node as a Site, a Refusal for a linear layer that cannot be one, None for everything else."""
    if node.domain not in ("", "ai.onnx") or node.op_type not in ("MatMul", "Gemm"):
        return None
    source = _weight_source(node.inputs[1])
    if source is None or constant(node.inputs[0]) is not None:
        return None
    tensor, transposed, dtype = source
    if len(tensor.shape) < 2:
        return None
    reason = _why_not(node, tensor, dtype)
    if reason:
        return Refusal(node_name(node), reason)
    rows, columns = tensor.shape.numpy()
    K, N = (columns, rows) if transposed else (rows, columns)
    return Site(node, node_name(node), tensor, transposed, dtype, K, N)


def _why_not(node: ir.Node, tensor: ir.TensorProtocol, dtype: ir.DataType) -> str | None:
    if node.op_type == "Gemm":
        return "Gemm is not supported yet, only MatMul"
    if len(tensor.shape) != 2:
        return f"its weight has {len(tensor.shape)} dimensions, only 2 are supported"
    if dtype not in QUANTIZABLE_DTYPES or tensor.dtype not in QUANTIZABLE_DTYPES:
        return f"its weight is {tensor.dtype.name}, only FLOAT and FLOAT16 have a kernel"
    if 0 in tensor.shape.numpy():
        return "its weight is empty"
    rows = node.inputs[0].shape if node.inputs[0] is not None else None
    if rows is not None and len(rows) < 2:
        return "its input has one dimension, MatMulNBits wants two or more"
    return None


def _weight_source(value: ir.Value | None) -> tuple[ir.TensorProtocol, bool, ir.DataType] | None:
    """Follow a weight back to its constant: the tensor, whether it is transposed, the dtype that arrives."""
    transposed, dtype = False, None
    while value is not None:
        tensor = constant(value)
        if tensor is not None:
            return tensor, transposed, dtype or tensor.dtype
        node = value.producer()
        if node is None or node.op_type not in WEIGHT_VIEWS or node.domain not in ("", "ai.onnx"):
            return None
        if node.op_type == "Transpose":
            if list(node.attributes.get_ints("perm", [1, 0])) != [1, 0]:
                return None
            transposed = not transposed
        elif node.op_type == "Cast" and dtype is None:
            dtype = ir.DataType(node.attributes.get_int("to", 0))
        value = node.inputs[0]
    return None


def constant(value: ir.Value | None) -> ir.TensorProtocol | None:
    """The tensor of an initializer that no caller can override, or of a Constant node; else None."""
    if value is None:
        return None
    if value.is_initializer():
        return None if value.is_graph_input() else value.const_value
    node = value.producer()
    if node is None or node.op_type != "Constant" or "sparse_value" in node.attributes:
        return None
    return ir.convenience.get_const_tensor(value)


def _embedding_rows(graph: ir.Graph) -> set[int]:
    """How many rows the embedding tables have: one of them is the vocabulary, if the model has one."""
    tables = [constant(node.inputs[0]) for node in graph if node.op_type == "Gather"]
    return {int(table.shape.numpy()[0]) for table in tables if table is not None and len(table.shape) == 2}


def _is_head(site: Site, vocabulary: set[int]) -> bool:
    """Whether this MatMul makes the logits: nothing but steps of `AFTER_HEAD` between it and a graph output."""
    value = site.output
    while not value.is_graph_output():
        followers = list(value.consumers())
        if len(followers) != 1 or followers[0].op_type not in AFTER_HEAD:
            return False
        (follower,) = followers
        if any(constant(other) is None for other in follower.inputs if other is not value):
            return False
        value = follower.outputs[0]
    return site.N in vocabulary or "logits" in (value.name or "")


def node_name(node: ir.Node) -> str:
    """The node's name, or for a node without one what it makes."""
    return node.name or f"{node.op_type} of {node.outputs[0].name}"


def _given(value: ir.Value | None) -> ir.Value:
    assert value is not None, "a MatMul has no empty inputs"
    return value
