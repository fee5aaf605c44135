"""The model without its weights, to trace which channel of an absorber becomes which channel of an input.

Between v_proj and o_proj exporters reshape, transpose, repeat and concatenate in ways of their own. Rather than
recognising each, the graph itself is asked: every MatMul with a constant weight is replaced by ones of the shape it
would have made, and what an absorber makes by a vector that the caller chooses ("drive"). The steps of the walk in
absorb.py only carry channels and multiply them, so what arrives at channel k of the input is a factor, which
does not depend on the drive, times drive[n]. That tells n. No weight is read: it runs in an instant.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import onnx
import onnx_ir as ir
from onnx import helper

from awq_onnx.passes.absorb import Absorber, Gain, Group, Linear
from awq_onnx.passes.sites import Refusal, Site, find_site


@dataclass(frozen=True)
class Skeleton:
    """model: with the inputs of the original plus one float vector for each of `drives`, name -> (length, dtype).

    outputs: the name of each traced group's input, in the order of the groups.
    """

    model: onnx.ModelProto
    drives: dict[str, tuple[int, ir.DataType]]
    outputs: tuple[str, ...]


def traced(groups: Sequence[Group]) -> list[Group]:
    """The groups whose channels have to be traced: all that do not sit directly behind their gain."""
    return [g for g in groups if isinstance(g.absorber, Linear) or (g.moved and isinstance(g.absorber, Gain))]


def drive_name(absorber: Absorber) -> str:
    return f"awq_onnx.drive.{absorber.channels}.{_dtype(absorber).name}"


def build(model: ir.Model, groups: Sequence[Group]) -> Skeleton:
    """The skeleton that traces `groups`; `model` is not changed."""
    proto = ir.to_proto(model)
    driven = {g.absorber.output.name: g.absorber for g in groups if not isinstance(g.absorber, Refusal)}
    nodes: list[onnx.NodeProto] = []
    for node, written in zip(model.graph, proto.graph.node, strict=True):
        site = find_site(node)
        nodes.extend(_ones(site) if isinstance(site, Site) else [written])
        for output in node.outputs:
            if output.name in driven:
                nodes.extend(_drive(nodes[-1], output.name or "", driven[output.name]))
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    drives = {drive_name(a): (a.channels, _dtype(a)) for a in driven.values()}
    proto.graph.input.extend(helper.make_tensor_value_info(n, dtype, [size]) for n, (size, dtype) in drives.items())
    outputs = tuple(dict.fromkeys(g.input.name or "" for g in groups))
    del proto.graph.output[:]
    proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in outputs)
    _drop_unread_weights(proto.graph)
    return Skeleton(proto, drives, outputs)


def _dtype(absorber: Absorber) -> ir.DataType:
    return absorber.tensor.dtype if isinstance(absorber, Gain) else absorber.site.dtype


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


def _integers(name: str, values: list[int]) -> onnx.NodeProto:
    return helper.make_node(
        "Constant", [], [name], value=helper.make_tensor(name, ir.DataType.INT64, [len(values)], values)
    )


def _drop_unread_weights(graph: onnx.GraphProto) -> None:
    read = set(_names_read(graph))
    kept = [tensor for tensor in graph.initializer if tensor.name in read]
    del graph.initializer[:]
    graph.initializer.extend(kept)


def _names_read(graph: onnx.GraphProto) -> Iterator[str]:
    """What the nodes of a graph read, and those of the bodies in it."""
    for node in graph.node:
        yield from node.input
        for attribute in node.attribute:
            for body in [attribute.g, *attribute.graphs]:
                yield from _names_read(body)
    yield from (value.name for value in graph.output)
