"""Tell where the output of a layer is normalised head by head, as q and k are before they meet (q_norm, k_norm)."""

from __future__ import annotations

import onnx_ir as ir

from awq_onnx.passes.constants import is_computed
from awq_onnx.passes.facts import Facts

# What may stand between the layer and the norm: its bias, and the split into heads.
BEFORE_NORM = frozenset({"Reshape", "Transpose", "Cast", "Identity", "Add", "Squeeze", "Unsqueeze"})
# A norm, or what one begins with where an exporter decomposes it.
NORM_BEGINS = frozenset(
    {"LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization", "LpNormalization", "Pow", "ReduceL2"}
)


def head_size(output: ir.Value, N: int, facts: Facts) -> int | None:
    """How many neighbouring columns of a layer with N are normalised together; None where none are, or all at once."""
    size = _normalized_axis(output, facts)
    return size if size is not None and 1 < size < N and N % size == 0 else None


def _normalized_axis(value: ir.Value, facts: Facts) -> int | None:
    for use in value.uses():
        node = use.node
        if node.op_type in NORM_BEGINS and use.idx == 0:
            return facts.last_axis(value)
        others = [other for other in node.inputs if other is not value]
        if node.op_type in BEFORE_NORM and (node.op_type != "Add" or all(is_computed(one) for one in others)):
            found = _normalized_axis(node.outputs[0], facts)
            if found is not None:
                return found
    return None
