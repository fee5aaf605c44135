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
    return any(_has_any(graph, types) for graph in _graphs(proto.graph)) or any(_mentions(a, types) for a in attributes)


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
    return info.type.tensor_type.elem_type in types


def _mentions(attribute: onnx.AttributeProto, types: Types) -> bool:
    if attribute.name in ("to", "dtype", "output_dtype", "stash_type", "softmax_precision"):
        return attribute.i in types
    return bool(attribute.HasField("t") and attribute.t.data_type in types)


def _widen(graph: onnx.GraphProto, types: Types) -> None:
    for info in _infos(graph):
        if _is_one(info, types):
            info.type.tensor_type.elem_type = TensorProto.FLOAT
    for node in graph.node:
        _widen_attributes(node, types)
    casts = []
    for tensor in graph.initializer:
        if tensor.data_type not in types:
            continue
        if any(tensor.name == info.name for info in graph.input):  # the default of an input
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype("float32"), tensor.name))
        else:
            kept = f"{tensor.name}.{TensorProto.DataType.Name(tensor.data_type).lower()}"
            casts.append(helper.make_node("Cast", [kept], [tensor.name], to=TensorProto.FLOAT))
            tensor.name = kept
    nodes = [*casts, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)


def _widen_attributes(node: onnx.NodeProto, types: Types) -> None:
    for attribute in node.attribute:
        if not _mentions(attribute, types):
            continue
        if attribute.HasField("t"):
            values = numpy_helper.to_array(attribute.t).astype("float32")
            attribute.t.CopyFrom(numpy_helper.from_array(values, attribute.t.name))
        else:
            attribute.i = TensorProto.FLOAT
