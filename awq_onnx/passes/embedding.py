"""Embeddings: rows of packed bytes that `com.microsoft::GatherBlockQuantized` looks up.

It reads what MatMulNBits' B holds, in another shape, (V, D * bits / 8), so that an embedding whose table is the weight
of the lm_head needs no bytes of its own. Source: onnxruntime's docs/ContribOperators.md.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from awq_onnx import codec
from awq_onnx.passes.bodies import all_nodes
from awq_onnx.passes.constants import STANDARD_DOMAINS, constant
from awq_onnx.passes.fold import remove_unread
from awq_onnx.passes.rewrite import DOMAIN, take_over
from awq_onnx.passes.sites import QUANTIZABLE_DTYPES, Site, is_token, is_view, node_name


@dataclass(frozen=True, eq=False)
class Table:
    """An embedding: a table (V, D). name: of the first node that looks up its rows.

    reason: why it has to stay: not all of its `readers` look up rows; None where they do.
    """

    name: str
    value: ir.Value
    tensor: ir.TensorProtocol
    readers: tuple[ir.Node, ...]
    V: int
    D: int
    reason: str | None


def tables(graph: ir.Graph) -> list[Table]:
    """The tables that tokens are looked up in."""
    found: dict[ir.Value, Table] = {}
    for node in all_nodes(graph):
        value = node.inputs[0] if node.op_type == "Gather" and is_token(node.inputs[1]) else None
        tensor = constant(value)
        if value is None or value in found or tensor is None or tensor.dtype not in QUANTIZABLE_DTYPES:
            continue
        if len(tensor.shape) == 2:
            found[value] = _table(node, value, tensor)
    return list(found.values())


def _table(node: ir.Node, value: ir.Value, tensor: ir.TensorProtocol) -> Table:
    readers = [(use.node, use.idx) for use in value.uses()]
    others = [reader for reader, index in readers if index != 0 or not _looks_up_rows(reader)]
    reason = f"{others[0].op_type} reads the table of the embedding as well" if others else None
    V, D = tensor.shape.numpy()
    return Table(node_name(node), value, tensor, tuple(reader for reader, _ in readers), int(V), int(D), reason)


def _looks_up_rows(node: ir.Node) -> bool:
    return node.op_type == "Gather" and node.domain in STANDARD_DOMAINS and node.attributes.get_int("axis", 0) == 0


def look_up(graph: ir.Graph, table: Table, tensors: list[ir.TensorProtocol], bits: int, block_size: int) -> int:
    """Let rows be looked up in packed `tensors` (codes, scales, zero points); how many nodes do that."""
    values = [ir.val(one.name or "", one.dtype, one.shape.numpy(), const_value=one) for one in tensors]
    for value in values:
        graph.register_initializer(value)
    for gather in table.readers:
        _replace(gather, [values[0], gather.inputs[1], *values[1:]], bits, block_size)
    return len(table.readers)


def lookups(site: Site) -> list[ir.Node]:
    """The Gathers that look up rows of just the weight of `site`, where it is seen as (V, D)."""
    if site.factor != 1 or site.tensor.dtype != site.dtype:
        return []
    return list(_row_lookups(site.weight, site.transposed))


def _row_lookups(value: ir.Value, rows_are_tokens: bool) -> Iterator[ir.Node]:
    for use in value.uses():
        node = use.node
        if use.idx != 0 or node.domain not in STANDARD_DOMAINS:
            continue
        if node.op_type == "Transpose" and is_view(node.outputs[0]):
            yield from _row_lookups(node.outputs[0], not rows_are_tokens)
        elif node.op_type == "Identity":
            yield from _row_lookups(node.outputs[0], rows_are_tokens)
        elif _looks_up_rows(node) and rows_are_tokens:
            yield node


def share(model: ir.Model, layer: ir.Node, gathers: list[ir.Node]) -> Counter[str]:
    """Let `gathers` look up the packed weight of `layer`, a MatMulNBits; the nodes that were added and run, by op.

    Where a row does not fill its blocks the layouts differ, and the table stays.
    """
    graph = model.graph
    K, N, bits, block_size = (layer.attributes[name].as_int() for name in ("K", "N", "bits", "block_size"))
    if K % block_size or not gathers:
        return Counter()
    codes, scales, zero_points = (*layer.inputs[1:], None, None)[:3]
    assert codes is not None
    shape = _constant(graph, f"{codes.name}.rows", np.array([N, K * bits // 8], np.int64))
    rows = ir.node("Reshape", [codes, shape], name=f"{codes.name}.Reshape")
    rows.outputs[0].name = f"{codes.name}.as_rows"
    rows.outputs[0].dtype, rows.outputs[0].shape = ir.DataType.UINT8, ir.Shape([N, K * bits // 8])
    graph.insert_before(graph[0], rows)
    if zero_points is None:  # the defaults of providers differ, so it is told
        middle = np.full((K // block_size, N), codec.middle_code(bits), np.float32)
        zero_points = _constant(graph, f"{codes.name}.middle", codec.pack_zero_points(middle, bits))
    for gather in gathers:
        _replace(gather, [rows.outputs[0], gather.inputs[1], scales, zero_points], bits, block_size)
    return Counter({"GatherBlockQuantized": len(gathers)})


def _constant(graph: ir.Graph, name: str, values: NDArray[Any]) -> ir.Value:
    tensor = ir.Tensor(values, name=name)
    value = ir.val(name, tensor.dtype, tensor.shape.numpy(), const_value=tensor)
    graph.register_initializer(value)
    return value


def _replace(gather: ir.Node, inputs: list[ir.Value | None], bits: int, block_size: int) -> None:
    node = ir.node(
        "GatherBlockQuantized",
        inputs,
        {"bits": bits, "block_size": block_size, "gather_axis": 0, "quantize_axis": 1},
        domain=DOMAIN,
        name=gather.name,
        doc_string=gather.doc_string,
        metadata_props=gather.metadata_props,
    )
    take_over(gather.outputs[0], node.outputs[0])
    holder, table = gather.graph, gather.inputs[0]
    assert isinstance(holder, ir.Graph)
    holder.insert_before(gather, node)
    holder.remove(gather, safe=True)
    remove_unread(table)
