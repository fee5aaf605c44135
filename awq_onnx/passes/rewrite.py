"""Replace a linear layer by `com.microsoft::MatMulNBits`; its name, output, doc string and metadata stay."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from awq_onnx.passes.fold import remove_unread
from awq_onnx.passes.sites import Site

DOMAIN = "com.microsoft"


@dataclass(frozen=True)
class PackedWeight:
    """The constant inputs of a MatMulNBits.

    zero_points: None for a symmetric grid (they are then in the middle). bias: None, or what the layer itself added.
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
) -> ir.Node:
    """Put the new node where the layer was; the old weight goes if nothing else reads it.

    metadata: beside what the layer has. doc_string: where it has none.
    """
    graph, old = model.graph, site.node
    node = ir.node(
        "MatMulNBits",
        [site.input, *_inputs(graph, weight)],
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
    take_over(old.outputs[0], node.outputs[0])
    holder = old.graph
    assert isinstance(holder, ir.Graph)
    holder.insert_before(old, node)
    read = old.inputs[1:]
    holder.remove(old, safe=True)
    for value in read:
        remove_unread(value)
    model.opset_imports.setdefault(DOMAIN, 1)
    return node


def _inputs(graph: ir.Graph, weight: PackedWeight) -> list[ir.Value | None]:
    """B, scales, zero_points, g_idx (never), bias; what is left out at the end is not there at all."""
    tensors = [weight.codes, weight.scales, weight.zero_points, None, weight.bias]
    while tensors[-1] is None:
        tensors.pop()
    return [None if tensor is None else _initializer(graph, tensor) for tensor in tensors]


def _initializer(graph: ir.Graph, tensor: ir.TensorProtocol) -> ir.Value:
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
