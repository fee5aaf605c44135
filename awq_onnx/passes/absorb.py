"""Name the tensor that can absorb the scale of an input, or say why there is none.

Dividing x by s costs nothing at run time where x comes, through steps that carry every channel unchanged but for a
factor, from a tensor that can be divided instead: the gain of a norm (any Mul by a constant vector), or the weight
and bias of a MatMul before (v_proj for o_proj, up_proj for down_proj). The steps are walked backwards one by one;
which channel became which on the way is not guessed from the steps but traced, see skeleton.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import onnx_ir as ir

from awq_onnx.passes.sites import Refusal, Site, Survey, constant, find_site, node_name

# Steps that move or copy channels of their first input, and change no value.
MOVES = frozenset({"Reshape", "Transpose", "Unsqueeze", "Squeeze", "Expand", "Slice", "Flatten"})
# Steps that change no channel but for a factor that does not depend on it.
CARRIES = frozenset({"Identity", "Cast", "Dropout", "Relu"})


@dataclass(frozen=True, eq=False)
class Gain:
    """x comes from node(…) * gain: the constant vector at `node.inputs[index]` is divided by s."""

    node: ir.Node
    index: int

    @property
    def name(self) -> str:
        return node_name(self.node)

    @property
    def output(self) -> ir.Value:
        return self.node.outputs[0]

    @property
    def tensor(self) -> ir.TensorProtocol:
        tensor = constant(self.node.inputs[self.index])
        assert tensor is not None
        return tensor

    @property
    def channels(self) -> int:
        return self.tensor.size


@dataclass(frozen=True, eq=False)
class Linear:
    """x comes from site.node's output channels: the columns of its weight, and its bias, are divided by s.

    bias: the Add behind the MatMul and the index of its constant, if there is one.
    caches: outputs of the graph that hold these channels (a key/value cache): they are scaled too.
    """

    site: Site
    bias: tuple[ir.Node, int] | None
    caches: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.site.name

    @property
    def output(self) -> ir.Value:
        return self.bias[0].outputs[0] if self.bias else self.site.output

    @property
    def channels(self) -> int:
        return self.site.N


Absorber: TypeAlias = Gain | Linear
Sites: TypeAlias = Mapping[ir.Node, Site]


@dataclass(frozen=True, eq=False)
class Group:
    """The sites that read one input and share its scale.

    absorber: where the scale goes, or why nowhere (then s = 1). moved: whether channels may have changed places
    between the absorber and the input, so that they must be traced.
    """

    input: ir.Value
    sites: tuple[Site, ...]
    absorber: Absorber | Refusal
    moved: bool = False

    @property
    def K(self) -> int:
        return self.sites[0].K

    @property
    def name(self) -> str:
        return self.sites[0].name


@dataclass(frozen=True)
class _Step:
    """One step back: the value to go on from, or where the walk ends."""

    value: ir.Value
    bias: tuple[ir.Node, int] | None = None
    caches: tuple[str, ...] = ()
    moved: bool = False


def find_groups(survey: Survey) -> tuple[Group, ...]:
    """The sites of a survey in groups that read one value, each with its absorber; in graph order."""
    sites = {site.node: site for site in survey.sites}
    return tuple(_group(value, readers, sites) for value, readers in survey.by_input().items())


def _group(value: ir.Value, readers: Sequence[Site], sites: Sites) -> Group:
    other = _other_reader(value, readers)
    if other is not None:
        return Group(value, tuple(readers), other)
    found, moved = _walk(_Step(value), sites)
    if isinstance(found, Gain | Linear) and not moved and found.channels != readers[0].K:
        found = Refusal(found.name, f"what comes before has {found.channels} channels, the input {readers[0].K}")
    return Group(value, tuple(readers), found, moved)


def _other_reader(value: ir.Value, sites: Sequence[Site]) -> Refusal | None:
    """A reader of `value` that is no site of the group, and so would see x / s."""
    name = value.name or ""
    if value.is_graph_output():
        return Refusal(name, "the input is an output of the model as well")
    nodes = {site.node for site in sites}
    for use in value.uses():
        if (use.node in nodes and use.idx == 0) or use.node.op_type == "Shape":
            continue
        return Refusal(node_name(use.node), f"{use.node.op_type} reads the same input")
    return None


def _walk(step: _Step, sites: Sites) -> tuple[Absorber | Refusal, bool]:
    """Walk back from step.value to an absorber: what was found, and whether channels may have moved."""
    node = step.value.producer()
    if node is None:
        return Refusal(step.value.name or "", "the input is an input of the model"), step.moved
    if node in sites:
        return Linear(sites[node], step.bias, step.caches), step.moved
    if find_site(node) is not None:
        return Refusal(node_name(node), f"the {node.op_type} before it is not quantised"), step.moved
    gain = _gain_index(node)
    if gain is not None and step.bias is None:
        return Gain(node, gain), step.moved
    refusal = Refusal(node_name(node), f"{node.op_type} comes before, which cannot be divided")
    for back in _steps_back(node, step):
        outside = _reader_off_path(back.value, node)
        found, moved = (outside, step.moved) if outside else _walk(back, sites)
        if not isinstance(found, Refusal):
            return found, moved
        refusal = found
    return refusal, step.moved


def _gain_index(node: ir.Node) -> int | None:
    if node.op_type != "Mul" or node.domain not in ("", "ai.onnx"):
        return None
    return next((index for index, value in enumerate(node.inputs) if _is_vector(constant(value))), None)


def _is_vector(tensor: ir.TensorProtocol | None) -> bool:
    """Whether a constant has one number for each channel: (K,), (1, K), ..."""
    return tensor is not None and tensor.size > 1 and tensor.size == tensor.shape.numpy()[-1]


def _steps_back(node: ir.Node, step: _Step) -> Sequence[_Step]:
    """The inputs of `node` that carry the channels of its output, the likeliest first."""
    if node.domain not in ("", "ai.onnx") or step.bias is not None:  # a bias stands directly behind its MatMul
        return ()
    op_type = node.op_type
    rule = _RULES.get(op_type)
    if rule is not None:
        return rule(node, step)
    if op_type in CARRIES or op_type in MOVES:
        return _from(step, node.inputs[0], moved=op_type in MOVES)
    return ()


def _from(step: _Step, value: ir.Value | None, *, moved: bool) -> Sequence[_Step]:
    return () if value is None else (_Step(value, None, step.caches, step.moved or moved),)


def _back_through_mul(node: ir.Node, step: _Step) -> Sequence[_Step]:
    """gate * up: either side may lead to a Linear, the other is a factor; also x * (a constant number)."""
    return [back for value in node.inputs if constant(value) is None for back in _from(step, value, moved=False)]


def _back_through_matmul(node: ir.Node, step: _Step) -> Sequence[_Step]:
    """softmax(…) @ v mixes tokens, not channels: they come from the right side."""
    return _from(step, node.inputs[1], moved=True)


def _back_through_add(node: ir.Node, step: _Step) -> Sequence[_Step]:
    """A constant bias vector directly behind a MatMul is divided with it."""
    for index in (0, 1):
        other = node.inputs[1 - index]
        maker = other.producer() if other is not None else None
        if not _is_vector(constant(node.inputs[index])) or other is None or maker is None:
            continue
        if find_site(maker) is not None:
            return (_Step(other, (node, index), step.caches, step.moved),)
    return ()


def _back_through_concat(node: ir.Node, step: _Step) -> Sequence[_Step]:
    """Concat(past, new) -> present is a key/value cache: what it returns is what it is given later."""
    present = node.outputs[0].name or ""
    fresh = [value for value in node.inputs if value is not None and not is_cache_pair(value, present)]
    if len(fresh) != 1 or len(node.inputs) != 2:
        return ()
    return (_Step(fresh[0], None, (*step.caches, present), True),)


def is_cache_pair(past: ir.Value, present: str) -> bool:
    """Whether a graph input and an output are the two ends of one cache: past_key_values.3.value, present.3.value."""
    name = past.name or ""
    if not past.is_graph_input() or not name.startswith("past") or not present.startswith("present"):
        return False
    return _without_prefix(name) == _without_prefix(present)


def _without_prefix(name: str) -> str:
    return re.sub(r"^(past|present)(_key_values)?", "", name)


def _reader_off_path(value: ir.Value, reader: ir.Node) -> Refusal | None:
    """A reader of `value` beside `reader`, that would see it divided. Shapes and caches do not matter."""
    if value.is_graph_output() and not _is_cache_output(value):
        return Refusal(value.name or "", "what comes before is an output of the model as well")
    for use in value.uses():
        if use.node is not reader and use.node.op_type != "Shape":
            return Refusal(node_name(use.node), f"{use.node.op_type} reads what comes before, too")
    if sum(use.node is reader for use in value.uses()) != 1:
        return Refusal(node_name(reader), f"{reader.op_type} reads what comes before twice")
    return None


def _is_cache_output(value: ir.Value) -> bool:
    node = value.producer()
    return (
        node is not None
        and node.op_type == "Concat"
        and any(past is not None and is_cache_pair(past, value.name or "") for past in node.inputs)
    )


_RULES: dict[str, Callable[[ir.Node, _Step], Sequence[_Step]]] = {
    "Mul": _back_through_mul,
    "MatMul": _back_through_matmul,
    "Add": _back_through_add,
    "Concat": _back_through_concat,
}
