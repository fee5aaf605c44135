"""Raise the version of ai.onnx that a model is written in, without changing what it computes.

A node means the same in two versions where its schema is the same one. For the operators whose schema changed between
versions 13 and 21, `SAME` lists those that only got more types, and inputs and attributes whose defaults are what was
before; a few are written in another way (`ADAPTERS`). Anything else is refused. Source: the operators' changelog,
https://github.com/onnx/onnx/blob/main/docs/Changelog.md
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import onnx
import onnx_ir as ir

from awq_onnx.errors import ModelError
from awq_onnx.passes.bodies import all_nodes
from awq_onnx.passes.constants import STANDARD_DOMAINS
from awq_onnx.passes.names import Names
from awq_onnx.passes.sites import node_name

OLDEST, NEWEST = 13, 21  # between these `SAME` and `ADAPTERS` hold
SAME = frozenset(
    {
        "Add", "AveragePool", "BatchNormalization", "Cast", "CastLike", "Constant", "ConstantOfShape",
        "CumSum", "DequantizeLinear", "Div", "Equal", "Flatten", "GRU", "GreaterOrEqual", "Identity", "If",
        "IsInf", "IsNaN", "LSTM", "LeakyRelu", "LessOrEqual", "Loop", "LpPool", "Mul", "OptionalGetElement",
        "OptionalHasElement", "PRelu", "Pad", "Pow", "QLinearMatMul", "QuantizeLinear", "RNN", "Relu",
        "Reshape", "Resize", "Scan", "ScatterElements", "ScatterND", "Shape", "Size", "Squeeze", "Sub",
        "Transpose", "Unsqueeze", "Where",
    }
)  # fmt: skip
OF_ONNXRUNTIME = frozenset({"SimplifiedLayerNormalization"})  # which it keeps in ai.onnx, in one version


def _axes_as_input(node: ir.Node, graph: ir.Graph, names: Names) -> None:
    """Version 18: the axes of a reduction are an input."""
    axes = node.attributes.pop("axes", None)
    if axes is None:
        return
    name = names.fresh(f"{node_name(node)}.axes")
    value = ir.val(name, const_value=ir.Tensor(np.array(axes.as_ints(), np.int64), name=name))
    graph.register_initializer(value)
    node.resize_inputs(2)
    node.replace_input_with(1, value)


def _counted(node: ir.Node, *_: object) -> None:
    """Version 18: a Split that is not told sizes is told into how many parts."""
    if len(node.inputs) < 2 or node.inputs[1] is None:
        node.attributes.add(ir.AttrInt64("num_outputs", len(node.outputs)))


_REDUCTIONS = ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "SumSquare")
ADAPTERS: Mapping[str, tuple[int, Callable[[ir.Node, ir.Graph, Names], None]]] = {
    **{f"Reduce{name}": (18, _axes_as_input) for name in _REDUCTIONS},
    "Split": (18, _counted),
}


def version_of(model: ir.Model) -> int:
    """Of ai.onnx; the newest that is known where the model has nothing of it."""
    return next((version for domain, version in model.opset_imports.items() if domain in STANDARD_DOMAINS), NEWEST)


def check_raisable(model: ir.Model, version: int) -> None:
    """Raise ModelError where `raise_to` cannot keep what the model computes."""
    had = version_of(model)
    if had >= version:
        return
    wanted = f"format qdq needs opset {version}, the model has {had}"
    if had < OLDEST:
        raise ModelError(f"{wanted}; export it with opset {OLDEST} or later")
    for node in all_nodes(model.graph):
        if node.domain in STANDARD_DOMAINS and not _is_known(node.op_type, had, version):
            raise ModelError(
                f"{wanted}, where {node_name(node)} ({node.op_type}) may mean something else; export it so"
            )


def _is_known(op_type: str, had: int, version: int) -> bool:
    if op_type in SAME or op_type in ADAPTERS or op_type in OF_ONNXRUNTIME:
        return True
    try:
        schemas = [onnx.defs.get_schema(op_type, max_inclusive_version=one, domain="") for one in (had, version)]
    except onnx.defs.SchemaError:
        return False
    return schemas[0].since_version == schemas[1].since_version and not schemas[1].deprecated


def raise_to(model: ir.Model, version: int, ir_version: int) -> None:
    """Write the model in at least these versions. What `check_raisable` refuses must not come here."""
    had, names = version_of(model), Names(model.graph)
    for node in list(all_nodes(model.graph)):
        since, adapt = ADAPTERS.get(node.op_type, (0, None))
        if node.domain in STANDARD_DOMAINS and adapt is not None and had < since <= version:
            adapt(node, model.graph, names)
    domain = next((domain for domain in model.opset_imports if domain in STANDARD_DOMAINS), "")
    model.opset_imports[domain] = max(had, version)
    model.ir_version = max(model.ir_version, ir_version)
