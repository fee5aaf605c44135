"""A bfloat16 model as float32, to run it where there are no bfloat16 kernels: onnxruntime's CPU has hardly any.

Every bfloat16 weight is read where it lies and cast; every type in between is float32. Nothing else changes.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx
from onnx import TensorProto, helper, numpy_helper


def has_bfloat16(proto: onnx.ModelProto) -> bool:
    """Whether anything in the model's graphs or functions is bfloat16."""
    attributes = (attribute for one in proto.functions for node in one.node for attribute in node.attribute)
    return any(_has_bfloat16(graph) for graph in _graphs(proto.graph)) or any(map(_mentions_bfloat16, attributes))


def float32_twin(model: bytes) -> bytes:
    """The serialised model without bfloat16; the same bytes where there is none."""
    proto = onnx.ModelProto.FromString(model)
    if not has_bfloat16(proto):
        return model
    for graph in list(_graphs(proto.graph))[::-1]:  # bodies before the nodes that hold them are copied
        _widen(graph)
    for function in proto.functions:
        for node in function.node:
            for body in [one for attribute in node.attribute for one in _bodies(attribute)][::-1]:
                _widen(body)
            _widen_attributes(node)
    return bytes(proto.SerializeToString())


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            yield from _bodies(attribute)


def _bodies(attribute: onnx.AttributeProto) -> Iterator[onnx.GraphProto]:
    for body in [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]:
        yield from _graphs(body)


def _has_bfloat16(graph: onnx.GraphProto) -> bool:
    return (
        any(tensor.data_type == TensorProto.BFLOAT16 for tensor in graph.initializer)
        or any(_is_bfloat16(info) for info in _infos(graph))
        or any(_mentions_bfloat16(attribute) for node in graph.node for attribute in node.attribute)
    )


def _infos(graph: onnx.GraphProto) -> list[onnx.ValueInfoProto]:
    return [*graph.input, *graph.output, *graph.value_info]


def _is_bfloat16(info: onnx.ValueInfoProto) -> bool:
    return bool(info.type.tensor_type.elem_type == TensorProto.BFLOAT16)


def _mentions_bfloat16(attribute: onnx.AttributeProto) -> bool:
    if attribute.name in ("to", "dtype", "output_dtype", "stash_type", "softmax_precision"):
        return bool(attribute.i == TensorProto.BFLOAT16)
    return bool(attribute.HasField("t") and attribute.t.data_type == TensorProto.BFLOAT16)


def _widen(graph: onnx.GraphProto) -> None:
    for info in _infos(graph):
        if _is_bfloat16(info):
            info.type.tensor_type.elem_type = TensorProto.FLOAT
    for node in graph.node:
        _widen_attributes(node)
    casts = []
    for tensor in graph.initializer:
        if tensor.data_type != TensorProto.BFLOAT16:
            continue
        if any(tensor.name == info.name for info in graph.input):  # the default of an input
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype("float32"), tensor.name))
        else:
            stored = f"{tensor.name}.bfloat16"
            casts.append(helper.make_node("Cast", [stored], [tensor.name], to=TensorProto.FLOAT))
            tensor.name = stored
    nodes = [*casts, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)


def _widen_attributes(node: onnx.NodeProto) -> None:
    for attribute in node.attribute:
        if not _mentions_bfloat16(attribute):
            continue
        if attribute.HasField("t"):
            values = numpy_helper.to_array(attribute.t).astype("float32")
            attribute.t.CopyFrom(numpy_helper.from_array(values, attribute.t.name))
        else:
            attribute.i = TensorProto.FLOAT
