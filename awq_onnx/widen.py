"""A half-precision model as float32: onnxruntime's CPU has few kernels for float16, and hardly any for bfloat16.

Every half-precision weight is read where it lies and cast; every type in between is float32. Nothing else changes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

Types = Collection[int]  # of TensorProto.DataType

BFLOAT16: Types = (TensorProto.BFLOAT16,)
HALF: Types = (TensorProto.BFLOAT16, TensorProto.FLOAT16)
HALVES = (np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16))


def has_any(proto: onnx.ModelProto, types: Types) -> bool:
    """Whether anything in the model's graphs or functions is of one of `types`."""
    attributes = [attribute for one in proto.functions for node in one.node for attribute in node.attribute]
    graphs = [*_graphs(proto.graph), *(body for attribute in attributes for body in _bodies(attribute))]
    return any(_has_any(graph, types) for graph in graphs) or any(_mentions(a, types) for a in attributes)


def float32_twin(model: bytes, types: Types = BFLOAT16) -> bytes:
    """The serialised model with float32 in the place of `types`; the same bytes where there are none."""
    proto = onnx.ModelProto.FromString(model)
    if not has_any(proto, types):
        return model
    for graph in list(_graphs(proto.graph))[::-1]:  # bodies before the nodes that hold them are copied
        _widen(graph, types)
    for function in proto.functions:
        for node in function.node:
            for body in [one for attribute in node.attribute for one in _bodies(attribute)][::-1]:
                _widen(body, types)
            _widen_attributes(node, types)
    return bytes(proto.SerializeToString())


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            yield from _bodies(attribute)


def _bodies(attribute: onnx.AttributeProto) -> Iterator[onnx.GraphProto]:
    for body in [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]:
        yield from _graphs(body)


def _has_any(graph: onnx.GraphProto, types: Types) -> bool:
    return (
        any(tensor.data_type in types for tensor in graph.initializer)
        or any(_is_one(info, types) for info in _infos(graph))
        or any(_mentions(attribute, types) for node in graph.node for attribute in node.attribute)
    )


def _infos(graph: onnx.GraphProto) -> list[onnx.ValueInfoProto]:
    return [*graph.input, *graph.output, *graph.value_info]


def _is_one(info: onnx.ValueInfoProto, types: Types) -> bool:
    return _tensor_type(info).elem_type in types


def _tensor_type(info: onnx.ValueInfoProto) -> onnx.TypeProto.Tensor:
    """Of a value, or of the elements of a sequence."""
    type_ = info.type.sequence_type.elem_type if info.type.HasField("sequence_type") else info.type
    tensor_type: onnx.TypeProto.Tensor = type_.tensor_type
    return tensor_type


def _mentions(attribute: onnx.AttributeProto, types: Types) -> bool:
    if attribute.name in ("to", "dtype", "output_dtype", "output_datatype", "stash_type", "softmax_precision"):
        return attribute.i in types
    return bool(attribute.HasField("t") and attribute.t.data_type in types)


def _widen(graph: onnx.GraphProto, types: Types) -> None:
    for info in _infos(graph):
        if _is_one(info, types):
            _tensor_type(info).elem_type = TensorProto.FLOAT
    for node in graph.node:
        _widen_attributes(node, types)
    lookups = _lookups(graph)
    before: list[onnx.NodeProto] = []
    after: dict[str, onnx.NodeProto] = {}  # by the output of a lookup
    for tensor in graph.initializer:
        if tensor.data_type not in types:
            continue
        half = TensorProto.DataType.Name(tensor.data_type).lower()
        if any(tensor.name == info.name for info in graph.input):  # the default of an input
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype("float32"), tensor.name))
        elif tensor.name in lookups:  # an embedding: only the rows that are looked up are cast
            for gather in lookups[tensor.name]:
                made, rows = gather.output[0], f"{gather.output[0]}.{half}"
                after[rows] = helper.make_node("Cast", [rows], [made], to=TensorProto.FLOAT)
                gather.output[0] = rows
        else:
            kept = f"{tensor.name}.{half}"
            before.append(helper.make_node("Cast", [kept], [tensor.name], to=TensorProto.FLOAT))
            tensor.name = kept
    nodes = [*before]
    for node in graph.node:
        nodes += [node, *(after[name] for name in node.output if name in after)]
    del graph.node[:]
    graph.node.extend(nodes)


def _lookups(graph: onnx.GraphProto) -> dict[str, list[onnx.NodeProto]]:
    """The tables that nothing but Gathers of this graph read, each with these."""
    gathers: dict[str, list[onnx.NodeProto]] = {}
    others = {value.name for value in graph.output}
    for node in graph.node:
        is_gather = node.op_type == "Gather" and node.domain in ("", "ai.onnx")
        if is_gather:
            gathers.setdefault(node.input[0], []).append(node)
        others.update(node.input[1:] if is_gather else node.input)
        for attribute in node.attribute:
            for body in _bodies(attribute):
                others.update(name for inner in body.node for name in inner.input)
                others.update(value.name for value in body.output)
    return {name: nodes for name, nodes in gathers.items() if name not in others}


def _widen_attributes(node: onnx.NodeProto, types: Types) -> None:
    for attribute in node.attribute:
        if not _mentions(attribute, types):
            continue
        if attribute.HasField("t"):
            values = numpy_helper.to_array(attribute.t).astype("float32")
            attribute.t.CopyFrom(numpy_helper.from_array(values, attribute.t.name))
        else:
            attribute.i = TensorProto.FLOAT
