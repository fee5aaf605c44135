"""Find every linear layer with a constant weight, in whatever form an exporter writes it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import onnx_ir as ir

from awq_onnx.passes.bodies import all_nodes, branch_outputs
from awq_onnx.passes.constants import FLOATS, STANDARD_DOMAINS, Opsets, computed, constant, is_computed
from awq_onnx.passes.facts import Dims, Facts, facts_of
from awq_onnx.passes.normalized import head_size

LAYER_OPS = ("MatMul", "Gemm", "FusedMatMul")  # what MatMulNBits may stand in the place of
QUANTIZED_OPS = frozenset({"MatMulNBits", "MatMulBnb4", "MatMulInteger", "QLinearMatMul", "DynamicQuantizeMatMul"})
FEW_BITS = frozenset({ir.DataType.INT4, ir.DataType.UINT4, ir.DataType.INT2, ir.DataType.UINT2})
QUANTIZABLE_DTYPES = frozenset({ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16})
# What may stand between the lm_head and the graph output: a bias, a soft cap, a temperature, probabilities.
AFTER_HEAD = frozenset({"Cast", "Identity", "Add", "Mul", "Div", "Tanh", "Reshape", "Squeeze", "Unsqueeze"})
AFTER_HEAD |= {"Softmax", "LogSoftmax"}
BIAS_OR_TYPE = frozenset({"Add", "Cast", "Identity"})  # all that moves no error of a layer
NO_TOKENS = frozenset({"position_ids", "token_type_ids"})
# What may stand between a router of experts and the TopK that chooses them.
AFTER_ROUTER = frozenset({"Cast", "Identity", "Add", "Reshape", "Softmax", "Sigmoid", "Unsqueeze", "Squeeze"})
# Nodes with the weights of linear layers inside, that cannot become MatMulNBits as they are: op -> input, what it is.
OTHER_HOLDERS = {
    "Attention": (1, "a fused Attention holds the weights of q, k and v; export without that fusion"),
    "MoE": (2, "a fused MoE holds the weights of its experts"),
    "LSTM": (1, "it is a recurrent layer"),
    "GRU": (1, "it is a recurrent layer"),
    "RNN": (1, "it is a recurrent layer"),
}


@dataclass(frozen=True)
class Refusal:
    """Something that is left as it is, and why.

    what: the node or value in the way. reason: without names, so that equal reasons can be told together.
    """

    what: str
    reason: str


@dataclass(frozen=True, eq=False)
class Site:
    """One linear layer: factor * x W + beta * bias, W (K, N) constant.

    name: of the node, kept here since a rewrite takes the names of its values away. weight: the value W comes from,
    of which `tensor` is the content, `transposed` where that is (N, K). dtype: of x, so of the scales too.
    bias: what the node itself adds (a Gemm's C), N numbers or one. is_head: whether it makes the logits.
    head_size: how many neighbouring columns are normalised together right after, None where none are.
    """

    node: ir.Node
    name: str
    weight: ir.Value
    tensor: ir.TensorProtocol
    transposed: bool
    dtype: ir.DataType
    K: int
    N: int
    factor: float = 1.0
    bias: ir.TensorProtocol | None = None
    beta: float = 1.0
    is_head: bool = False
    head_size: int | None = None

    @property
    def input(self) -> ir.Value:
        return _given(self.node.inputs[0])

    @property
    def output(self) -> ir.Value:
        return self.node.outputs[0]


@dataclass(frozen=True)
class Choice:
    """Which layers the user wants. include, exclude: shell patterns of node names; include empty: all. head: the
    lm_head too.
    """

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    head: bool = False

    def refuses(self, name: str) -> str | None:
        pattern = next((p for p in self.exclude if fits(name, p)), None)
        if pattern is not None:
            return f"--exclude {pattern} names it"
        if self.include and not any(fits(name, p) for p in self.include):
            return "no --include names it"
        return None


def fits(name: str, pattern: str) -> bool:
    """Whether a node name fits a shell pattern; * goes over slashes too."""
    return fnmatchcase(name, pattern)


@dataclass(frozen=True)
class Survey:
    """sites: what will be quantised, in graph order. kept: what could be, and is not, each with its reason.

    floats: the kept ones that are plain linear layers all the same.
    """

    graph: ir.Graph
    facts: Facts
    sites: tuple[Site, ...]
    kept: tuple[Refusal, ...]
    floats: tuple[Site, ...]


def survey(model: ir.Model, choice: Choice | None = None) -> Survey:
    """All linear layers with a constant weight, those in the bodies of If, Loop and Scan included."""
    choice = choice or Choice()
    sites, kept, floats = [], [], []
    graph, facts = model.graph, facts_of(model)
    outer = branch_outputs(graph)
    vocabulary = _embedding_rows(graph)
    for node in all_nodes(graph):
        found = find_site(node, facts)
        if found is None:
            continue
        if isinstance(found, Refusal):
            kept.append(found)
            continue
        found = replace(
            found,
            is_head=makes_logits(found.output, found.N, vocabulary, outer),
            head_size=head_size(found.output, found.N, facts),
        )
        reason = _why_left(found, choice) or choice.refuses(found.name)
        if reason is None:
            sites.append(found)
        else:
            kept.append(Refusal(found.name, reason))
            floats.append(found)
    return Survey(graph, facts, tuple(sites), tuple(kept), tuple(floats))


def quantized_nodes(graph: ir.Graph) -> list[ir.Node]:
    """Nodes that hold weights of few bits already."""
    return [node for node in all_nodes(graph) if node.op_type in QUANTIZED_OPS or _dequantizes_few_bits(node)]


def _dequantizes_few_bits(node: ir.Node) -> bool:
    """Or more bits, in blocks."""
    tensor = constant(node.inputs[0]) if node.op_type == "DequantizeLinear" else None
    if tensor is None or len(tensor.shape) != 2:
        return False
    return tensor.dtype in FEW_BITS or "block_size" in node.attributes


def find_site(node: ir.Node, facts: Facts) -> Site | Refusal | None:
    """The node as a Site, a Refusal for a linear layer that cannot be one, None for everything else."""
    form = _form(node)
    if form is None:
        return _refused_holder(node)
    source = _weight_source(node.inputs[1], facts.opsets)
    if source is None or is_computed(node.inputs[0]):
        return _refused_left(node)
    weight, tensor, transposed, dtype = source
    if len(tensor.shape) < 2:
        return None
    reason = form.reason or _why_not(tensor, dtype, facts.shape(node.inputs[0]))
    if reason:
        return Refusal(node_name(node), reason)
    rows, columns = tensor.shape.numpy()
    transposed = transposed != form.transposed
    K, N = (columns, rows) if transposed else (rows, columns)
    bias = computed(node.inputs[2], facts.opsets) if form.bias else None
    if form.bias and (bias is None or bias.size not in (1, N) or bias.size != (bias.shape.numpy() or (1,))[-1]):
        return Refusal(node_name(node), "what it adds is no constant vector")
    return Site(node, node_name(node), weight, tensor, transposed, dtype, K, N, form.factor, bias, form.beta)


def maker_of(value: ir.Value, facts: Facts) -> Site | None:
    """The layer that makes a value, which may then get another type or a constant added; None where no layer does."""
    while (node := value.producer()) is not None:
        found = find_site(node, facts)
        if isinstance(found, Site):
            return found
        others = [one for one in node.inputs if one is not None and constant(one) is None]
        if node.op_type not in BIAS_OR_TYPE or len(others) != 1:
            return None
        (value,) = others
    return None


@dataclass(frozen=True)
class _Form:
    """How a node type writes x W: what its attributes say; reason: why it cannot be rewritten."""

    transposed: bool = False
    factor: float = 1.0
    bias: bool = False
    beta: float = 1.0
    reason: str | None = None


def _form(node: ir.Node) -> _Form | None:
    if node.domain in STANDARD_DOMAINS and node.op_type == "MatMul":
        return _Form()
    number, flag = node.attributes.get_float, node.attributes.get_int
    if node.domain in STANDARD_DOMAINS and node.op_type == "Gemm":
        return _Form(
            transposed=bool(flag("transB", 0)),
            factor=number("alpha", 1.0),
            bias=len(node.inputs) > 2 and node.inputs[2] is not None,
            beta=number("beta", 1.0),
            reason="it transposes its input" if flag("transA", 0) else None,
        )
    if node.domain == "com.microsoft" and node.op_type == "FusedMatMul":
        odd = any(flag(name, 0) for name in ("transA", "transBatchA", "transBatchB"))
        return _Form(
            transposed=bool(flag("transB", 0)),
            factor=number("alpha", 1.0),
            reason="it transposes its input" if odd else None,
        )
    return None


def _refused_holder(node: ir.Node) -> Refusal | None:
    """A node with the weights of linear layers inside it that stays as it is."""
    index, reason = OTHER_HOLDERS.get(node.op_type, (None, ""))
    if node.op_type == "Conv":
        index, reason = 1, "it is a 1x1 Conv over channels that come first"
    value = node.inputs[index] if index is not None and len(node.inputs) > index else None
    tensor = constant(value)
    if tensor is None or len(tensor.shape) < 2:
        return None
    if node.op_type == "Conv" and set(tensor.shape.numpy()[2:]) != {1}:
        return None  # a real convolution, no linear layer
    return Refusal(node_name(node), reason)


def _refused_left(node: ir.Node) -> Refusal | None:
    """A MatMul whose weight stands on the left, where it mixes rows instead of channels."""
    tensor = constant(node.inputs[0])
    if tensor is None or len(tensor.shape) != 2 or min(tensor.shape.numpy()) < 2 or is_computed(node.inputs[1]):
        return None
    return Refusal(node_name(node), "its weight stands on the left")


def _why_not(tensor: ir.TensorProtocol, dtype: ir.DataType, x: Dims | None) -> str | None:
    if len(tensor.shape) != 2:
        return f"its weight has {len(tensor.shape)} dimensions, only 2 are supported"
    if dtype not in QUANTIZABLE_DTYPES or tensor.dtype not in FLOATS:
        return f"its weight is {tensor.dtype.name}, only FLOAT, FLOAT16 and BFLOAT16 have a kernel"
    if 0 in tensor.shape.numpy():
        return "its weight is empty"
    if x is not None and len(x) < 2:
        return "its input has one dimension, MatMulNBits wants two or more"
    return None


def _weight_source(
    value: ir.Value | None, opsets: Opsets
) -> tuple[ir.Value, ir.TensorProtocol, bool, ir.DataType] | None:
    """Follow a weight back to its constant: the value, its tensor, whether it is transposed, the dtype that arrives.

    Transpose, Cast and Identity are stepped over, so that a large weight is read where it lies; anything else that
    constants are put through is computed.
    """
    transposed, dtype = False, None
    while value is not None:
        tensor = constant(value)
        if tensor is None and not is_view(value):
            tensor = computed(value, opsets)
            if tensor is None:
                return None
        if tensor is not None:
            return value, tensor, transposed, dtype or tensor.dtype
        node = value.producer()
        assert node is not None
        if node.op_type == "Transpose":
            transposed = not transposed
        elif node.op_type == "Cast" and dtype is None:
            dtype = ir.DataType(node.attributes.get_int("to", 0))
        value = node.inputs[0]
    return None


def is_view(value: ir.Value) -> bool:
    node = value.producer()
    if node is None or node.domain not in STANDARD_DOMAINS:
        return False
    if node.op_type == "Transpose":
        return list(node.attributes.get_ints("perm", [1, 0])) == [1, 0]
    if node.op_type == "Cast":
        return ir.DataType(node.attributes.get_int("to", 0)) in FLOATS
    return node.op_type == "Identity"


def _embedding_rows(graph: ir.Graph) -> set[int]:
    """How many rows the tables have that tokens look up: one of them is the vocabulary, if the model has one."""
    nodes = [node for node in all_nodes(graph) if node.op_type == "Gather" and is_token(node.inputs[1])]
    tables = [constant(node.inputs[0]) for node in nodes]
    return {int(table.shape.numpy()[0]) for table in tables if table is not None and len(table.shape) == 2}


def is_token(index: ir.Value | None) -> bool:
    """Whether an index is an input of the model, other than positions and segments."""
    while index is not None and not index.is_graph_input():
        node = index.producer()
        index = node.inputs[0] if node is not None and node.op_type in ("Cast", "Reshape", "Identity") else None
    return index is not None and index.name not in NO_TOKENS


def _why_left(site: Site, choice: Choice) -> str | None:
    if site.is_head and not choice.head:
        return "it is the lm_head, which stays as it is"
    if any(_chooses(reader) for reader in _followers(site.output)):
        return "it chooses experts: a router stays as it is"
    return None


def makes_logits(
    output: ir.Value, columns: int, vocabulary: Collection[int], outer: Mapping[ir.Value, Sequence[ir.Value]]
) -> bool:
    """Whether a layer with this output of so many columns makes the logits: nothing but steps of `AFTER_HEAD` between
    it and a graph output. vocabulary: rows of the tables of embeddings. outer: as from `branch_outputs`.
    """
    value = output
    while not value.is_graph_output() or value in outer:
        if value in outer:
            value = outer[value][0]
            continue
        followers = list(value.consumers())
        if len(followers) != 1 or followers[0].op_type not in AFTER_HEAD:
            return False
        (follower,) = followers
        if any(constant(other) is None for other in follower.inputs if other is not value):
            return False
        value = follower.outputs[0]
    return columns in vocabulary or "logits" in (value.name or "")


def _followers(value: ir.Value) -> Iterator[ir.Node]:
    """The nodes that read `value`, and what they make, through steps of `AFTER_ROUTER`."""
    waiting, seen = [value], {value}
    while waiting:
        for node in waiting.pop().consumers():
            yield node
            others = [other for other in node.inputs if other not in seen]
            carries = node.op_type in AFTER_ROUTER and all(is_computed(other) for other in others if other is not None)
            if carries and node.outputs[0] not in seen:
                seen.add(node.outputs[0])
                waiting.append(node.outputs[0])


def _chooses(node: ir.Node) -> bool:
    """Whether a TopK chooses what the model does next, and is no answer of the model."""
    return node.op_type == "TopK" and any(output.uses() for output in node.outputs)


def node_name(node: ir.Node) -> str:
    """The node's name, or for a node without one what it makes."""
    return node.name or f"{node.op_type} of {node.outputs[0].name}"


def _given(value: ir.Value | None) -> ir.Value:
    assert value is not None, "a MatMul has no empty inputs"
    return value
