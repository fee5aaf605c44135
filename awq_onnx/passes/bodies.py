"""The graphs inside a graph: what If, Loop and Scan nodes hold."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir


def all_nodes(graph: ir.Graph) -> Iterator[ir.Node]:
    """Every node of a graph, each followed by those of its bodies."""
    for node in graph:
        yield node
        for body in direct_bodies(node):
            yield from all_nodes(body)


def direct_bodies(node: ir.Node) -> list[ir.Graph]:
    """The bodies of one node, not those inside them."""
    found: list[ir.Graph] = []
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            found.append(attribute.as_graph())
        elif attribute.type == ir.AttributeType.GRAPHS:
            found.extend(attribute.as_graphs())
    return found


def all_bodies(node: ir.Node) -> Iterator[ir.Graph]:
    """The bodies of one node and those inside them."""
    for body in direct_bodies(node):
        yield body
        for inner in body:
            yield from all_bodies(inner)


def branch_outputs(graph: ir.Graph) -> dict[ir.Value, list[ir.Value]]:
    """What each value that a branch of an If returns is called outside: outputs of the If."""
    outer: dict[ir.Value, list[ir.Value]] = {}
    for node in all_nodes(graph):
        for body in direct_bodies(node) if node.op_type == "If" else ():
            for inner, output in zip(body.outputs, node.outputs, strict=True):
                outer.setdefault(inner, []).append(output)
    return outer
