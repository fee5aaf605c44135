"""Models with If nodes around their layers, as exporters merge a decoder's first step and its later ones.

Calibration runs the graph part by part and has to see inside: the branch that the calibration data take is put in
the place of the If. The model that is quantised keeps both; layers of the other branch share their weights with it.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from itertools import count

import onnx
import onnx_ir as ir

from awq_onnx.passes.bodies import all_bodies, all_nodes, direct_bodies
from awq_onnx.passes.skeleton import leading_to


def separate_names(graph: ir.Graph) -> None:
    """Give values of different bodies different names: two branches may use one name for two things.

    Names of nodes stay, and so do those of the model's inputs and outputs.
    """
    taken = {value.name for value in graph.outputs}
    for holder in [graph, *(body for node in graph for body in all_bodies(node))]:
        for value in [*holder.inputs, *holder.initializers.values(), *(v for node in holder for v in node.outputs)]:
            if holder is not graph and value.name and value.name in taken:
                value.name = next(name for n in count(1) if (name := f"{value.name}.{n}") not in taken)
            taken.add(value.name)


def conditions(graph: ir.Graph, layers: Iterable[ir.Node]) -> list[str]:
    """The names of the conditions of all Ifs that hold one of `layers`, outer ones first."""
    holding = {node.graph for node in layers}
    found: dict[str, None] = {}
    for node in all_nodes(graph):
        if node.op_type == "If" and any(_holds(body, holding) for body in direct_bodies(node)):
            condition = node.inputs[0]
            found[(condition.name if condition is not None else None) or ""] = None
    return list(found)


def _holds(body: ir.Graph, graphs: Container[object]) -> bool:
    return body in graphs or any(_holds(inner, graphs) for node in body for inner in direct_bodies(node))


def condition_model(model: onnx.ModelProto, names: Iterable[str]) -> onnx.ModelProto:
    """The part of a model that makes conditions of its main graph; its outputs are those that can be had."""
    small = onnx.ModelProto()
    small.CopyFrom(model)
    graph = small.graph
    made = {name for node in graph.node for name in node.output}
    made |= {value.name for value in (*graph.input, *graph.initializer)}
    wanted = [name for name in names if name in made]
    nodes = leading_to(graph.node, wanted)
    del graph.node[:]
    graph.node.extend(nodes)
    del graph.output[:]
    graph.output.extend(onnx.ValueInfoProto(name=name) for name in wanted)
    return small


def take(model: onnx.ModelProto, choices: Mapping[str, bool]) -> onnx.ModelProto:
    """A copy of `model` with one branch of each If in its place. choices: by the name of the condition."""
    taken = onnx.ModelProto()
    taken.CopyFrom(model)
    while any(_is_chosen(node, choices) for node in taken.graph.node):
        nodes = [one for node in taken.graph.node for one in _unwrapped(taken.graph, node, choices)]
        del taken.graph.node[:]
        taken.graph.node.extend(nodes)
    return taken


def _is_chosen(node: onnx.NodeProto, choices: Mapping[str, bool]) -> bool:
    return node.op_type == "If" and node.input[0] in choices


def _unwrapped(graph: onnx.GraphProto, node: onnx.NodeProto, choices: Mapping[str, bool]) -> list[onnx.NodeProto]:
    """The nodes of the branch that is taken, and one for each thing it returns; the weights go to the main graph."""
    if not _is_chosen(node, choices):
        return [node]
    wanted = "then_branch" if choices[node.input[0]] else "else_branch"
    (body,) = (attribute.g for attribute in node.attribute if attribute.name == wanted)
    graph.initializer.extend(body.initializer)
    graph.value_info.extend(body.value_info)
    returned = [
        onnx.helper.make_node("Identity", [inner.name], [outer])
        for inner, outer in zip(body.output, node.output, strict=True)
        if outer and outer != inner.name
    ]
    return [*body.node, *returned]
