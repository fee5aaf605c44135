"""Let a model run with rounded layers in it: with many, or with the one that an input of the graph asks for.

That one is in an If at every place, so that nothing else runs; a place without a rounded layer gets noise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto, helper, numpy_helper

from awq_onnx.passes.names import Names
from awq_onnx.passes.rewrite import DOMAIN

NOISE = 0.1  # relative: about what 4 bits do
NOBODY = -1  # as a place
INPUTS = ("codes", "scales", "zero_points", "g_idx", "bias")  # of a MatMulNBits, after what it reads


@dataclass(frozen=True)
class StandIn:
    """A rounded layer, to be asked for in the place of the original.

    input: the name of what it reads. path: a .npz file with `codes` and `zero_points` as MatMulNBits reads them,
    `scales` float32 (N, G), `bias` float32 (N,), and `inverse` float32 (K,), which multiplies the input; only the first
    and the scales have to be there.
    """

    input: str
    path: Path
    K: int
    N: int
    bits: int
    block_size: int


def add_switches(model: onnx.ModelProto, places: Sequence[str], stand_ins: Mapping[str, StandIn]) -> str:
    """Let a new input, whose name is returned, say at which of `places` there is an error: a number, or `NOBODY`.

    The error is the stand-in for the layer that makes the value, where there is one, else noise.
    """
    names = Names(ir.from_proto(model).graph)
    which = names.fresh("place")
    model.graph.input.append(helper.make_tensor_value_info(which, TensorProto.INT64, []))
    numbers = {place: number for number, place in enumerate(places)}
    nodes = []
    for node in model.graph.node:
        nodes.append(node)
        for at, output in enumerate(node.output):
            if output not in numbers:
                continue
            node.output[at] = names.fresh(f"{output}.clean")
            own = names.fresh(f"{output}.number")
            model.graph.initializer.append(numpy_helper.from_array(np.array(numbers[output], np.int64), own))
            if output in stand_ins:
                wrong = _stand_in(model.graph, names, output, stand_ins[output])
            else:
                wrong = _with_noise(names, node.output[at], output, numbers[output])
            nodes += _switch(names, node.output[at], output, wrong, (which, own))
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    _import_domain(model)
    return which


def substitute(model: onnx.ModelProto, stand_ins: Mapping[str, StandIn]) -> None:
    """Put stand-ins in the place of the nodes that make these values, by their names."""
    names = Names(ir.from_proto(model).graph)
    nodes = []
    for node in model.graph.node:
        made = [output for output in node.output if output in stand_ins]
        for output in made:
            nodes += _stand_in(model.graph, names, output, stand_ins[output])
            nodes[-1].output[0] = output
        nodes += [] if made else [node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    _import_domain(model)


def _import_domain(model: onnx.ModelProto) -> None:
    if all(one.domain != DOMAIN for one in model.opset_import):
        model.opset_import.append(helper.make_opsetid(DOMAIN, 1))


def _with_noise(names: Names, clean: str, output: str, seed: int) -> list[onnx.NodeProto]:
    """Every value times 1 +- NOISE."""
    factors, noisy = names.fresh(f"{output}.factors"), names.fresh(f"{output}.noisy")
    return [
        helper.make_node("RandomNormalLike", [clean], [factors], mean=1.0, scale=NOISE, seed=float(seed)),
        helper.make_node("Mul", [clean, factors], [noisy]),
    ]


def _stand_in(graph: onnx.GraphProto, names: Names, output: str, layer: StandIn) -> list[onnx.NodeProto]:
    with np.load(layer.path) as arrays:
        constants = {what: numpy_helper.from_array(arrays[what], names.fresh(f"{output}.{what}")) for what in arrays}
    graph.initializer.extend(constants.values())
    inputs = [constants[what].name if what in constants else "" for what in INPUTS]
    read, nodes = layer.input, []
    if "inverse" in constants:
        read = names.fresh(f"{output}.scaled")
        nodes.append(helper.make_node("Mul", [layer.input, constants["inverse"].name], [read]))
    inputs.insert(0, read)
    while not inputs[-1]:
        inputs.pop()
    made = names.fresh(f"{output}.rounded")
    node = helper.make_node("MatMulNBits", inputs, [made], domain=DOMAIN)
    sizes = {"K": layer.K, "N": layer.N, "bits": layer.bits, "block_size": layer.block_size}
    node.attribute.extend(helper.make_attribute(name, size) for name, size in sizes.items())
    return [*nodes, node]


def _switch(
    names: Names, clean: str, output: str, wrong: Sequence[onnx.NodeProto], equal: tuple[str, str]
) -> tuple[onnx.NodeProto, onnx.NodeProto]:
    """Nodes that make `output`: where two numbers are equal what `wrong` makes, else `clean`."""
    asked, kept = names.fresh(f"{output}.asked"), names.fresh(f"{output}.kept")
    branches = {
        branch: helper.make_graph(nodes, branch, [], [helper.make_empty_tensor_value_info(nodes[-1].output[0])])
        for branch, nodes in (
            ("then_branch", wrong),
            ("else_branch", [helper.make_node("Identity", [clean], [kept])]),
        )
    }
    return helper.make_node("Equal", list(equal), [asked]), helper.make_node("If", [asked], [output], **branches)
