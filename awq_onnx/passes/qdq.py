"""Replace a linear layer by DequantizeLinear and MatMul of ai.onnx; its name, output, doc string and metadata stay.

The weight is dequantised as (K, N), along axis 0: onnxruntime makes a MatMulNBits of that form when it loads the model,
and none of a transposed one. Source: https://onnx.ai/onnx/operators/onnx__DequantizeLinear.html
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import onnx_ir as ir

from awq_onnx.passes import rewrite
from awq_onnx.passes.names import Names
from awq_onnx.passes.rewrite import PackedWeight
from awq_onnx.passes.sites import Site

OPSET, IR_VERSION = 21, 10  # the first with 4-bit types, and with block_size


def to_dequantized(
    graph: ir.Graph,
    site: Site,
    weight: PackedWeight,
    names: Names,
    *,
    block_size: int,
    metadata: Mapping[str, str],
    doc_string: str | None = None,
) -> Counter[str]:
    """Put the new nodes where the layer was; how many more of each op there are that run.

    weight: codes (K, N), scales and zero points (ceil(K / block_size), N), or (N,), one for each column.
    metadata, doc_string: as `rewrite.to_matmul_nbits` takes them.
    """
    old = site.node
    blocked = weight.scales.shape.rank() > 1
    read = [weight.codes, weight.scales, weight.zero_points]
    dequantize = ir.node(
        "DequantizeLinear",
        [_initializer(graph, old.graph, tensor, names) for tensor in read if tensor is not None],
        {"axis": 0, "block_size": block_size} if blocked else {"axis": 1},
        name=names.fresh(f"{site.name}/DequantizeLinear"),
    )
    made = dequantize.outputs[0]
    made.name = names.fresh(f"{site.name}.dequantized")
    made.dtype, made.shape = site.dtype, ir.Shape([site.K, site.N])
    product = ir.node(
        "MatMul",
        [site.input, made],
        name=old.name,
        doc_string=old.doc_string or doc_string,
        metadata_props={**old.metadata_props, **metadata},
    )
    nodes = [dequantize, product, *rewrite.bias_added(graph, product, weight.bias, site, names)]
    rewrite.replace_node(old, nodes)
    return Counter(node.op_type for node in nodes[1:]) - Counter([old.op_type])


def _initializer(graph: ir.Graph, holder: object, tensor: ir.TensorProtocol, names: Names) -> ir.Value:
    """An initializer of the body that the layer is in, which is where onnxruntime looks for one when it fuses."""
    if holder is graph or not isinstance(holder, ir.Graph):
        return rewrite.initializer(graph, tensor)
    known = next((value for value in holder.initializers.values() if value.const_value is tensor), None)
    if known is not None:
        return known
    value = ir.val(names.fresh(tensor.name or ""), tensor.dtype, tensor.shape.numpy(), const_value=tensor)
    holder.register_initializer(value)
    return value
