"""The model without its weights, to trace which channel of an absorber becomes which channel of an input.

Between v_proj and o_proj exporters reshape, transpose, repeat and concatenate in ways of their own. Rather than
recognising each, the graph itself is asked: every linear layer is replaced by ones of the shape it would have made,
and what an absorber makes by a vector that the caller chooses ("drive"). The steps of the walk (steps.py) only
carry channels and multiply them, so what arrives at channel k of the input is a factor, which does not depend on the
drive, times drive[n]. That tells n. No weight is read: it runs in an instant.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import onnx
import onnx_ir as ir
from onnx import helper

from awq_onnx.passes.absorb import Absorber, Group, Route
from awq_onnx.passes.sites import Refusal, Site
from awq_onnx.passes.steps import attention_op


@dataclass(frozen=True)
class Skeleton:
    """model: with the inputs of the original plus one float vector for each of `drives`, name -> (length, dtype).

    outputs: the names of all values to look at: behind the last move to each input, and what must stay untouched.
    """

    model: onnx.ModelProto
    drives: dict[str, tuple[int, ir.DataType]]
    outputs: tuple[str, ...]


def traced_routes(groups: Iterable[Group]) -> list[Route]:
    """The routes on which channels have to be traced."""
    return [
        route
        for group in groups
        if not isinstance(group.routes, Refusal)
        for route in group.routes
        if route.needs_tracing
    ]


def drive_name(absorber: Absorber) -> str:
    return f"awq_onnx.drive.{absorber.channels}.{absorber.dtype.name}"


def build(model: onnx.ModelProto, routes: Sequence[Route], layers: Iterable[Site]) -> Skeleton:
    """The skeleton that traces `routes`. layers: all linear layers of `model`, which is taken apart."""
    ones = {site.output.name: site for site in layers}
    driven = {route.absorber.output.name: route.absorber for route in routes}
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        replaced = ones.get(node.output[0]) if node.output else None
        nodes.extend(_ones(replaced) if replaced is not None else [node])
        for name in list(node.output):
            if name in driven:
                nodes.extend(_drive(nodes[-1], name, driven[name]))
    _drop_inner_biases(nodes, routes)
    made = {name for node in nodes for name in node.output}
    outputs = _outputs(routes, made)
    drives = {drive_name(a): (a.channels, a.dtype) for a in driven.values()}
    _replace(model.graph, leading_to(nodes, outputs), outputs, drives)
    return Skeleton(model, drives, outputs)


def _outputs(routes: Sequence[Route], made: set[str]) -> tuple[str, ...]:
    names = (value.name or "" for route in routes for value in (*route.inputs.values(), *route.untouched) if value)
    return tuple(dict.fromkeys(name for name in names if name in made))


def _replace(
    graph: onnx.GraphProto,
    nodes: Sequence[onnx.NodeProto],
    outputs: Sequence[str],
    drives: dict[str, tuple[int, ir.DataType]],
) -> None:
    del graph.node[:]
    graph.node.extend(nodes)
    graph.input.extend(helper.make_tensor_value_info(n, dtype, [size]) for n, (size, dtype) in drives.items())
    del graph.output[:]
    graph.output.extend(onnx.ValueInfoProto(name=name) for name in outputs)
    read = set(_names_read(graph))
    kept = [tensor for tensor in graph.initializer if tensor.name in read]
    del graph.initializer[:]
    graph.initializer.extend(kept)


def _ones(site: Site) -> list[onnx.NodeProto]:
    """Nodes that make ones (…, N) for x (…, K): in the place of x @ W."""
    name = site.output.name or ""
    one = helper.make_tensor("", site.dtype, [1], [1.0])
    return [
        helper.make_node("Shape", [site.input.name or ""], [f"{name}.shape"]),
        _integers(f"{name}.zero", [0]),
        _integers(f"{name}.last", [-1]),
        _integers(f"{name}.columns", [site.N]),
        helper.make_node("Slice", [f"{name}.shape", f"{name}.zero", f"{name}.last"], [f"{name}.leading"]),
        helper.make_node("Concat", [f"{name}.leading", f"{name}.columns"], [f"{name}.target"], axis=0),
        helper.make_node("ConstantOfShape", [f"{name}.target"], [name], value=one),
    ]


def _drive(maker: onnx.NodeProto, name: str, absorber: Absorber) -> list[onnx.NodeProto]:
    """Rename what `maker` makes and put the drive, in the same shape, in its place."""
    maker.output[list(maker.output).index(name)] = f"{name}.undriven"
    return [
        helper.make_node("Shape", [f"{name}.undriven"], [f"{name}.driven_shape"]),
        helper.make_node("Expand", [drive_name(absorber), f"{name}.driven_shape"], [name]),
    ]


def _drop_inner_biases(nodes: Sequence[onnx.NodeProto], routes: Sequence[Route]) -> None:
    """An attention that adds a bias to the values must not add it to the drive."""
    inner = {
        vector.node.outputs[0].name: vector.index
        for route in routes
        for vector in route.absorber.vectors
        if attention_op(vector.node) is not None
    }
    for node in nodes:
        if node.output and node.output[0] in inner:
            node.input[inner[node.output[0]]] = ""


def leading_to(nodes: Sequence[onnx.NodeProto], outputs: Iterable[str]) -> list[onnx.NodeProto]:
    """The nodes that take part in making `outputs`, in order: the weights of all others need not be there."""
    wanted, needed = set(outputs), []
    for node in reversed(nodes):
        if wanted.intersection(node.output):
            needed.append(node)
            wanted.update(_read_by(node))
    return needed[::-1]


def _integers(name: str, values: list[int]) -> onnx.NodeProto:
    return helper.make_node(
        "Constant", [], [name], value=helper.make_tensor(name, ir.DataType.INT64, [len(values)], values)
    )


def _names_read(graph: onnx.GraphProto) -> Iterator[str]:
    """What the nodes of a graph read, and those of the bodies in it."""
    for node in graph.node:
        yield from _read_by(node)
    yield from (value.name for value in graph.output)


def _read_by(node: onnx.NodeProto) -> Iterator[str]:
    yield from node.input
    for attribute in node.attribute:
        for body in [attribute.g, *attribute.graphs]:
            yield from _names_read(body)
