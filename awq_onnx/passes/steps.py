"""One step back through a graph: which inputs of a node carry the channels of its output.

A step may move and copy channels and multiply them by something that does not depend on them; then dividing what
it reads by s divides what it makes. A step that can is known by its op, never by the model it stands in. Where the
channels go on the way is not told here but traced, see skeleton.py.

Sources: the operator documents of ONNX and https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from awq_onnx.passes.constants import FLOATS, STANDARD_DOMAINS, computed, depends_on_data, is_computed
from awq_onnx.passes.facts import Facts

# Steps that move or copy channels of their first input, and change no value.
MOVES = frozenset(
    {
        "Reshape",
        "Transpose",
        "Unsqueeze",
        "Squeeze",
        "Expand",
        "Slice",
        "Flatten",
        "Split",
        "Gather",
        "GatherND",
        "Tile",
    }
)
# Moves that keep the order of all numbers: where the last axis keeps its size, every channel keeps its place.
RESHAPES = frozenset({"Reshape", "Unsqueeze", "Squeeze", "Flatten"})
# Moves that hand on a part of what they read; what the other parts hold may be read by anybody.
SELECTS = frozenset({"Slice", "Split", "Gather", "GatherND"})
# Steps that change no channel but for a factor that does not depend on it.
CARRIES = frozenset({"Identity", "Cast", "Dropout", "Relu", "LeakyRelu", "Neg"})


@dataclass(frozen=True)
class Step:
    """node.inputs[index] carries the channels of the output it was asked for.

    moves: whether they may have changed places. bias: the input with a constant vector that is added to them; inside:
    to the channels of the input, together with those of others before it (an attention's biases of q, k and v in a
    row). past: the input of the model that holds channels of earlier tokens, present: what holds all of them.
    """

    index: int
    moves: bool = False
    bias: int | None = None
    inside: bool = False
    past: ir.Value | None = None
    present: ir.Value | None = None


@dataclass(frozen=True)
class AttentionOp:
    """Where a fused attention takes its values from: the first of `values` that is given.

    past, present: the value cache's input and output. bias: input with the biases of q, k and v in a row, added
    inside; None where the op has none.
    """

    values: tuple[int, ...]
    past: int
    present: int
    bias: int | None = None


ATTENTION_OPS: Mapping[tuple[str, str], AttentionOp] = {
    ("", "Attention"): AttentionOp(values=(2,), past=5, present=2),
    ("com.microsoft", "GroupQueryAttention"): AttentionOp(values=(2, 0), past=4, present=2),  # 0: q, k, v packed
    ("com.microsoft", "MultiHeadAttention"): AttentionOp(values=(2, 1, 0), past=7, present=2, bias=3),
}


def steps_back(output: ir.Value, facts: Facts) -> Sequence[Step]:
    """The steps from `output` back to the inputs that carry its channels, the likeliest first; none: it ends here."""
    node = output.producer()
    if node is None:
        return ()
    attention = attention_op(node)
    if attention is not None:
        return _through_attention(node, output, attention)
    if node.domain not in STANDARD_DOMAINS:
        return ()
    rule = _RULES.get(node.op_type)
    if rule is not None:
        return rule(node, facts)
    if node.op_type in CARRIES:
        return (Step(0),) if output is node.outputs[0] and _keeps_floats(node) else ()
    return _through_move(node, output, facts) if node.op_type in MOVES else ()


def attention_op(node: ir.Node) -> AttentionOp | None:
    return ATTENTION_OPS.get(("" if node.domain in STANDARD_DOMAINS else node.domain, node.op_type))


def _keeps_floats(node: ir.Node) -> bool:
    return node.op_type != "Cast" or ir.DataType(node.attributes.get_int("to", 0)) in FLOATS


def _through_move(node: ir.Node, output: ir.Value, facts: Facts) -> Sequence[Step]:
    """Which channels a choice takes must not depend on the data: it is traced once, for every run."""
    moves = _may_move(node, output, facts)
    if moves and node.op_type in SELECTS and any(depends_on_data(value) for value in node.inputs[1:]):
        return ()
    return (Step(0, moves=moves),)


def _through_mul(node: ir.Node, _: Facts) -> Sequence[Step]:
    """gate * up: either side may lead to a linear layer, the other is a factor; also x * (a constant number)."""
    return [Step(index) for index in (0, 1) if not is_computed(node.inputs[index])]


def _through_div(_: ir.Node, __: Facts) -> Sequence[Step]:
    return (Step(0),)


def _through_matmul(_: ir.Node, __: Facts) -> Sequence[Step]:
    """softmax(…) @ v mixes tokens, not channels: they come from the right side."""
    return (Step(1, moves=True),)


def _through_einsum(node: ir.Node, _: Facts) -> Sequence[Step]:
    """The same, where an exporter kept torch.einsum."""
    return (Step(1, moves=True),) if len(node.inputs) == 2 else ()


def _through_add(node: ir.Node, facts: Facts) -> Sequence[Step]:
    """A constant vector, the bias of a linear layer or of a norm, is divided with what it is added to."""
    for index in (0, 1):
        if is_vector(node.inputs[index], facts) and not is_computed(node.inputs[1 - index]):
            return (Step(1 - index, bias=index),)
    return ()


def _through_concat(node: ir.Node, _: Facts) -> Sequence[Step]:
    """Concat(past, new) is a key/value cache: what it returns is what it is given later."""
    pasts = [value for value in node.inputs if value is not None and is_past(value)]
    if len(node.inputs) != 2 or len(pasts) != 1:
        return ()
    index = 1 if node.inputs[0] is pasts[0] else 0
    return (Step(index, moves=True, past=pasts[0]),)


def _through_attention(node: ir.Node, output: ir.Value, op: AttentionOp) -> Sequence[Step]:
    value = next((index for index in op.values if given(node.inputs, index) is not None), None)
    if output is not node.outputs[0] or value is None:
        return ()
    bias = op.bias if op.bias is not None and given(node.inputs, op.bias) is not None else None
    past, present = given(node.inputs, op.past), given(node.outputs, op.present)
    return (Step(value, moves=True, bias=bias, inside=bias is not None, past=past, present=present),)


def given(values: Sequence[ir.Value | None], index: int) -> ir.Value | None:
    """An optional input or output, None where it is left out."""
    value = values[index] if len(values) > index else None
    return value if value is not None and value.name else None


def _may_move(node: ir.Node, output: ir.Value, facts: Facts) -> bool:
    """Whether a move may put channels, the numbers along the last axis, into other places."""
    before, after = facts.last_axis(node.inputs[0]), facts.last_axis(output)
    if before is None or before != after:
        return True
    if node.op_type in RESHAPES:
        return False
    rank = len(facts.shape(node.inputs[0]) or ())
    if node.op_type in ("Gather", "Split"):
        return node.attributes.get_int("axis", 0) % rank == rank - 1
    if node.op_type == "Transpose":
        return list(node.attributes.get_ints("perm", [0]))[-1] != rank - 1
    return True


def is_vector(value: ir.Value | None, facts: Facts) -> bool:
    """Whether a value is known and has one number for each channel: (K,), (1, K), ..."""
    tensor = computed(value, facts.opsets)
    return tensor is not None and tensor.size > 1 and tensor.size == tensor.shape.numpy()[-1]


def is_past(value: ir.Value) -> bool:
    """Whether a value is an input of the model that holds a cache."""
    return value.is_graph_input() and (value.name or "").startswith("past")


def is_cache_pair(past: ir.Value, present: str) -> bool:
    """Whether a graph input and an output are the two ends of one cache: past_key_values.3.value, present.3.value."""
    if not is_past(past) or not present.startswith("present"):
        return False
    return _without_prefix(past.name or "") == _without_prefix(present)


def _without_prefix(name: str) -> str:
    return re.sub(r"^(past|present)(_key_values)?", "", name)


_RULES: dict[str, Callable[[ir.Node, Facts], Sequence[Step]]] = {
    "Mul": _through_mul,
    "Div": _through_div,
    "MatMul": _through_matmul,
    "Einsum": _through_einsum,
    "Add": _through_add,
    "Concat": _through_concat,
}
