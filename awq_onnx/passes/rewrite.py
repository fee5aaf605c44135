"""Replace a linear layer by `com.microsoft::MatMulNBits`; its name, output, doc string and metadata stay."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import onnx_ir as ir

from awq_onnx.passes.fold import remove_unread
from awq_onnx.passes.names import Names
from awq_onnx.passes.sites import Site

DOMAIN = "com.microsoft"


@dataclass(frozen=True)
class PackedWeight:
    """The constant inputs of a MatMulNBits, or of a DequantizeLinear and an Add.

    zero_points: None where they are in the middle. bias: None, or what the layer itself added.
    """

    codes: ir.TensorProtocol
    scales: ir.TensorProtocol
    zero_points: ir.TensorProtocol | None
    bias: ir.TensorProtocol | None = None


def weight_names(sites: Sequence[Site]) -> dict[Site, str]:
    """What the packed tensors of each site are called, before their suffix: its node's name where that is unique."""
    taken = Counter(name for site in sites for name in {site.node.name, site.output.name})
    return {
        site: site.node.name if site.node.name and taken[site.node.name] == 1 else site.output.name or ""
        for site in sites
    }


def to_matmul_nbits(
    model: ir.Model,
    site: Site,
    weight: PackedWeight,
    *,
    block_size: int,
    bits: int,
    accuracy_level: int,
    metadata: Mapping[str, str],
    doc_string: str | None = None,
    bias_names: Names | None = None,
) -> list[ir.Node]:
    """Put the new node where the layer was; the old weight goes if nothing else reads it.

    metadata: beside what the layer has. doc_string: where it has none. bias_names: for an Add behind the node, where
    the bias must not be an input of it.
    """
    graph, old = model.graph, site.node
    inside = weight if bias_names is None else replace(weight, bias=None)
    node = ir.node(
        "MatMulNBits",
        [site.input, *_inputs(graph, inside)],
        {
            "K": site.K,
            "N": site.N,
            "bits": bits,
            "block_size": block_size,
            "accuracy_level": accuracy_level,
        },
        domain=DOMAIN,
        name=old.name,
        doc_string=old.doc_string or doc_string,
        metadata_props={**old.metadata_props, **metadata},
    )
    added = [] if bias_names is None else bias_added(graph, node, weight.bias, site, bias_names)
    replace_node(old, [node, *added])
    model.opset_imports.setdefault(DOMAIN, 1)
    return [node, *added]


def bias_added(
    graph: ir.Graph, product: ir.Node, bias: ir.TensorProtocol | None, site: Site, names: Names
) -> list[ir.Node]:
    """An Add of the bias to what a node makes in the place of a layer; none where there is no bias."""
    if bias is None:
        return []
    made = product.outputs[0]
    made.name = names.fresh(f"{site.name}.product")
    made.type, made.shape = site.output.type, site.output.shape
    return [ir.node("Add", [made, initializer(graph, bias)], name=names.fresh(f"{site.name}/Add"))]


def replace_node(old: ir.Node, nodes: Sequence[ir.Node]) -> None:
    """Put nodes, of which the last makes what `old` made, in its place; constants that only it read go."""
    take_over(old.outputs[0], nodes[-1].outputs[0])
    holder = old.graph
    assert isinstance(holder, ir.Graph)
    holder.insert_before(old, nodes)
    read = old.inputs[1:]
    holder.remove(old, safe=True)
    for value in read:
        remove_unread(value)


def _inputs(graph: ir.Graph, weight: PackedWeight) -> list[ir.Value | None]:
    """B, scales, zero_points, g_idx (never), bias; what is left out at the end is not there at all."""
    tensors = [weight.codes, weight.scales, weight.zero_points, None, weight.bias]
    while tensors[-1] is None:
        tensors.pop()
    return [None if tensor is None else initializer(graph, tensor) for tensor in tensors]


def initializer(graph: ir.Graph, tensor: ir.TensorProtocol) -> ir.Value:
    """An initializer of the main graph, where bodies see it too; the same one for the same tensor."""
    known = graph.initializers.get(tensor.name or "")
    if known is not None and known.const_value is tensor:
        return known
    value = ir.val(tensor.name or "", tensor.dtype, tensor.shape.numpy(), const_value=tensor)
    graph.register_initializer(value)
    return value


def take_over(old: ir.Value, new: ir.Value) -> None:
    """`new` is what `old` was, for every reader: name, type and shape too, so that shape inference goes on."""
    name = old.name
    new.type, new.shape, new.doc_string = old.type, old.shape, old.doc_string
    new.metadata_props.update(old.metadata_props)
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
    old.name = None
    new.name = name
