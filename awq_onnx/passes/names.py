"""Names for new nodes and values."""

from __future__ import annotations

from itertools import count

import onnx_ir as ir

from awq_onnx.passes.bodies import all_nodes


class Names:
    """The names of all nodes and values of a graph and its bodies; what is handed out is taken from then on."""

    def __init__(self, graph: ir.Graph) -> None:
        graphs = {node.graph for node in all_nodes(graph) if isinstance(node.graph, ir.Graph)} | {graph}
        values = [value for one in graphs for value in (*one.inputs, *one.initializers.values())]
        values += [output for node in all_nodes(graph) for output in node.outputs]
        self._taken = {value.name for value in values} | {node.name for node in all_nodes(graph)}

    def fresh(self, wanted: str) -> str:
        """`wanted`, or that with a number where the name is taken."""
        name = next(name for n in count() if (name := f"{wanted}.{n}" if n else wanted) not in self._taken)
        self._taken.add(name)
        return name
