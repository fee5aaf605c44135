"""What holds for a whole model and its nodes do not say themselves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import onnx
import onnx_ir as ir

from awq_onnx.passes.constants import Opsets

Dims: TypeAlias = "tuple[int | None, ...]"


@dataclass(frozen=True)
class Facts:
    """opsets: of the model, by domain. shapes: of values by name, as far as they can be inferred; None: not fixed."""

    opsets: Opsets
    shapes: Mapping[str, Dims]

    def shape(self, value: ir.Value | None) -> Dims | None:
        return None if value is None else self.shapes.get(value.name or "")

    def last_axis(self, value: ir.Value | None) -> int | None:
        """The size of the last axis, where it is fixed."""
        shape = self.shape(value)
        return shape[-1] if shape else None


def facts_of(model: ir.Model) -> Facts:
    """Infer the shapes of a model's values. The model is not changed, no weight is read."""
    proto = ir.to_proto(model)
    try:
        inferred = onnx.shape_inference.infer_shapes(proto, data_prop=True)
    except Exception:  # the checks of onnx raise many classes; without shapes channels are traced instead
        inferred = proto
    return Facts(dict(model.graph.opset_imports), dict(_shapes(inferred.graph)))


def _shapes(graph: onnx.GraphProto) -> Iterator[tuple[str, Dims]]:
    for info in [*graph.input, *graph.output, *graph.value_info]:
        tensor = info.type.tensor_type
        if tensor.HasField("shape"):
            yield (
                info.name,
                tuple(dim.dim_value if dim.HasField("dim_value") else None for dim in tensor.shape.dim),
            )
    for node in graph.node:
        for attribute in node.attribute:
            for body in [attribute.g, *attribute.graphs]:
                yield from _shapes(body)
